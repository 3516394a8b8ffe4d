"""``sogclr`` and ``isogclr``: a running mean, per anchor, of what normalises its softmax."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr, ValidationInfo, field_validator
from torch import Tensor

from gossamer.algorithms.contrastive.losses import (
    ContrastiveLoss,
    Rows,
    Setting,
    Visit,
    Weights,
    last_of_each,
)
from gossamer.runtime.errors import ConfigError

__all__ = ["ISogCLR", "SogCLR"]


class _RunningMean(ContrastiveLoss, ABC):
    """u of every anchor, a running mean over visits of the mean of exp(score) over negatives.

    Kept as log u, which no inverse temperature overflows. An anchor is an example, whose two views'
    means are averaged; where views do not change, and of pairs, each view is one.
    """

    remembers: ClassVar[str | None] = "running means"

    gamma: float = Field(default=0.9, gt=0, le=1)
    """Weight of a visit in the running mean: u <- (1 - gamma) u + gamma * (its mean)."""
    gamma_decay_steps: int | None = Field(default=None, ge=1)
    """The weight falls from 1 to ``gamma`` by half a cosine over so many steps; None: it is
    ``gamma`` from the start."""
    first_visit: Literal["example", "epoch"] = "example"
    """``example``: an anchor's first mean stands for u whenever it comes; ``epoch``: the means of
    the first epoch do, and who is first seen later starts from u = 0, as in LibAUC."""

    _log_u: Tensor = PrivateAttr()

    @abstractmethod
    def _scores(self, rows: Rows, slots: Tensor) -> Tensor:
        """Return the logarithms (2b, 2B) of what is averaged."""

    def setup(self, setting: Setting) -> None:
        """Start with no anchor seen."""
        super().setup(setting)
        self._log_u = setting.table(-torch.inf)

    def _weight(self, visit: Visit, log_u: Tensor) -> Tensor:
        """Return gamma of each row (2b,): 1 at what counts as a first visit."""
        gamma, over = self.gamma, self.gamma_decay_steps
        if over is not None and visit.step < over:
            gamma += (1.0 - gamma) * 0.5 * (1.0 + math.cos(math.pi * visit.step / over))
        if self.first_visit == "example":
            return torch.full_like(log_u, gamma).masked_fill_(log_u.isinf(), 1.0)
        batch = self._setting.comm.n * self._setting.local_batch
        is_first = (visit.number + 1) * batch <= self._setting.owners.examples
        return torch.full_like(log_u, 1.0 if is_first else gamma)

    def _normalised(self, visit: Visit, rows: Rows, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return w = e / (u * number of negatives) and log u with this visit in it, and keep u."""
        scores = torch.where(rows.valid, self._scores(rows, slots), -torch.inf)
        log_count = rows.negatives.to(scores.dtype).log()
        old = self._log_u[rows.place][slots]
        gamma = self._weight(visit, old)
        mean = torch.logsumexp(scores, dim=1) - log_count
        new = torch.logaddexp(torch.log1p(-gamma) + old, gamma.log() + mean)
        weights = (scores - (new + log_count)[:, None]).exp_().nan_to_num_(nan=0.0)
        if visit.advances:
            self._keep(rows, self._log_u, slots, self._over_views(new, logarithms=True))
        return weights, new

    def _over_views(self, values: Tensor, logarithms: bool = False) -> Tensor:
        """Return rows' values (2b,), or where an example has one state, their means over views."""
        if self._setting.per_example == 2:
            return values
        halves = values.view(2, -1)
        mean = torch.logsumexp(halves, 0) - math.log(2) if logarithms else halves.mean(0)
        return torch.cat([mean, mean])

    def _keep(self, rows: Rows, table: Tensor, slots: Tensor, values: Tensor) -> None:
        last = last_of_each(rows.ids)
        both = torch.cat([last, last + len(rows.ids)]).to(table.device)
        both = both[rows.valid[both].any(dim=1)]  # who met no negative has nothing new
        table[rows.place, slots[both]] = values[both]

    def state_dict(self) -> dict[str, Tensor]:
        """Return log u."""
        return {"log_u": self._log_u}


class SogCLR(_RunningMean):
    """One inverse temperature for all anchors (arXiv:2202.12387)."""

    name: Literal["sogclr"] = "sogclr"
    compat: Literal["none", "official"] = "none"
    """``official``: the released code of EMC^2 leaves beta out and adds the two views, so that its
    gradient is 2 / beta times this one."""

    def _scores(self, rows: Rows, slots: Tensor) -> Tensor:
        return self.beta * rows.cosines

    def weigh(self, visit: Visit) -> list[Weights]:
        """Return e / (u * number of negatives): its rows do not add up to 1."""
        scale = 2.0 if self.compat == "official" else self.beta
        slots = [self._setting.slots(rows) for rows in visit.rows]
        return [
            Weights(self._normalised(visit, rows, s)[0], scale)
            for rows, s in zip(visit.rows, slots, strict=True)
        ]


class ISogCLR(_RunningMean):
    """A temperature of its own for each anchor, which is learnt beside u (arXiv:2305.11965).

    The objective is tau_i * (log-mean-exp) + rho * tau_i; ``beta`` is what temperatures start at,
    as 1 / beta, and what evaluations use.
    """

    remembers: ClassVar[str | None] = "running means and temperatures"

    name: Literal["isogclr"] = "isogclr"
    rho: float = Field(default=0.3, ge=0)
    """Price of a temperature."""
    tau_min: float = Field(default=0.05, gt=0)
    """Least temperature."""
    tau_max: float = Field(default=0.7, gt=0, validate_default=True)
    """Greatest temperature."""
    tau_lr: float = Field(default=0.01, gt=0)
    """Step of a temperature along its averaged gradient."""
    tau_momentum: float = Field(default=0.1, ge=0, lt=1)
    """Share of the former average; LibAUC's `beta` of 0.9 is that of the new gradient."""

    _tau: Tensor = PrivateAttr()
    _velocity: Tensor = PrivateAttr()

    @field_validator("tau_max")
    @classmethod
    def _bounds_are_in_order(cls, most: float, info: ValidationInfo) -> float:
        least = info.data.get("tau_min", 0.0)
        if most < least:
            raise ValueError(f"must be at least tau_min, {least:g}")
        return most

    def setup(self, setting: Setting) -> None:
        """Start all temperatures at 1 / beta.

        Raises:
            ConfigError: that is out of bounds.
        """
        super().setup(setting)
        if not self.tau_min <= 1 / self.beta <= self.tau_max:
            raise ConfigError(
                f"oracle.loss.beta: temperatures start at 1 / beta, which must be in "
                f"{self.tau_min:g}..{self.tau_max:g}, got 1 / {self.beta:g}; change it, tau_min or "
                "tau_max"
            )
        self._tau = setting.table(1 / self.beta)
        self._velocity = setting.table(0.0)

    def _scores(self, rows: Rows, slots: Tensor) -> Tensor:
        return rows.cosines / self._tau[rows.place][slots][:, None]

    def weigh(self, visit: Visit) -> list[Weights]:
        """Return weights as SogCLR's, each row's by its own temperature, and move temperatures."""
        found = []
        for rows in visit.rows:
            slots = self._setting.slots(rows)
            tau = self._tau[rows.place][slots]
            weights, log_u = self._normalised(visit, rows, slots)
            slope = log_u + self.rho - (weights * rows.cosines).sum(dim=1) / tau
            if visit.advances:
                old = self._velocity[rows.place][slots]
                share = 1.0 - self.tau_momentum
                velocity = self.tau_momentum * old + share * self._over_views(slope)
                moved = (tau - self.tau_lr * velocity).clamp(self.tau_min, self.tau_max)
                self._keep(rows, self._velocity, slots, velocity)
                self._keep(rows, self._tau, slots, moved)
            figures = {"temperature": float(tau.mean())}
            found.append(Weights(weights, 1.0, figures=figures))
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """Return log u, the temperatures and their averaged gradients."""
        return {**super().state_dict(), "tau": self._tau, "velocity": self._velocity}
