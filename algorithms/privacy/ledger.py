"""The releases of a run: how many there were, with which noise, and the epsilon they cost."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gossamer.algorithms.privacy import accounting
from gossamer.algorithms.privacy.accounting import Segment
from gossamer.runtime.errors import ConfigError

__all__ = ["Ledger"]

_SEGMENTS = 16
"""How often sigma may change over the resumptions of a run."""


@dataclass
class Ledger:
    """What privacy is counted with, and what was released so far.

    Attributes:
        rates: per rank, the probability of an example and release.
        delta: of the guarantee.
        accountant: how epsilon is counted.
        target: epsilon at the end of the run; None where sigma was given.
        sigma: noise in the sum over the clip norm; that of the releases to come.
        planned: releases of the whole run; None when open-ended.
        history: (sigma, releases), in order.
    """

    rates: list[float]
    delta: float
    accountant: str
    target: float | None
    sigma: float = 0.0
    planned: int | None = None
    history: list[tuple[float, int]] = field(default_factory=list)

    @property
    def releases(self) -> int:
        """How many there were."""
        return sum(count for _, count in self.history)

    def calibrated(self, planned: int | None) -> float:
        """Return the sigma that ends at the target after ``planned`` releases.

        Raises:
            ConfigError: the run has no end, or no sigma reaches the target.
        """
        assert self.target is not None
        if planned is None:
            raise ConfigError("oracle.epsilon: needs a number of steps; or noise_multiplier")
        return accounting.calibrate(
            self.target, self.delta, max(self.rates), planned, self.accountant
        )

    def require_room(self) -> None:
        """Refuse a release that sigma was not found for."""
        if self.target is not None and self.planned is not None and self.releases >= self.planned:
            raise ConfigError(
                f"oracle.epsilon: the algorithm asks for more gradients than the {self.planned} "
                "that sigma was found for; use noise_multiplier"
            )

    def count(self) -> None:
        """Enter one release."""
        if self.history and self.history[-1][0] == self.sigma:
            self.history[-1] = (self.sigma, self.history[-1][1] + 1)
        else:
            self.history.append((self.sigma, 1))

    @property
    def worst(self) -> int:
        """The rank whose examples are protected least."""
        return max(range(len(self.rates)), key=self.rates.__getitem__)

    def segments(self, rank: int) -> tuple[Segment, ...]:
        """Return what to account for, of the examples of ``rank``."""
        return tuple(Segment(sigma, self.rates[rank], count) for sigma, count in self.history)

    def spent(self, rank: int) -> float:
        """Return the epsilon spent on the examples of ``rank``."""
        return accounting.spent(self.segments(rank), self.delta, self.accountant)

    def accountant_version(self) -> str:
        """Return who counted, with its version."""
        resolved = accounting.resolve(self.segments(self.worst), self.accountant)
        return accounting.accountant_version(resolved)

    # --- what a resume needs -----------------------------------------------------------------

    def state(self, local: int) -> dict[str, Tensor]:
        """Return the history, the same for each of ``local`` hosted ranks."""
        rows = torch.zeros(_SEGMENTS, 2, dtype=torch.float64)
        for row, (sigma, count) in zip(rows, self.history, strict=False):
            row[0], row[1] = sigma, count
        return {
            "history": rows.expand(local, *rows.shape).clone(),
            "planned": torch.full((local, 1), self.planned or 0, dtype=torch.int64),
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state`` returned.

        Raises:
            ConfigError: the releases to come would not compose with those before.
        """
        planned = int(state["planned"][0])
        if self.target is not None and planned != (self.planned or 0):
            raise ConfigError(
                f"oracle.epsilon: the noise so far was found for {planned} gradients, this run "
                f"asks for {self.planned}; resume with the same steps, or write noise_multiplier "
                "instead of epsilon"
            )
        rows = state["history"][0].tolist()
        self.history = [(sigma, int(count)) for sigma, count in rows if count > 0]
        if self.target is not None and self.history and self.history[-1][0] != self.sigma:
            raise ConfigError(
                f"oracle.epsilon: the releases so far had sigma {self.history[-1][0]:g}, this "
                f"target gives {self.sigma:g}; keep the target, or write noise_multiplier instead"
            )
        if len(self.history) >= _SEGMENTS:
            raise ConfigError(f"resume: sigma changed {_SEGMENTS} times; start a new run")
