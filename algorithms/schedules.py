"""Learning-rate schedules: a rate as a function of the step k (from 0) and the horizon T."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from gossamer.runtime.communicator import Communicator
from gossamer.runtime.component import Component
from gossamer.runtime.errors import ConfigError

__all__ = ["Scheduled", "horizon", "inverse_rate"]

_FALLING = ("linear", "cosine", "cosine-restarts")


class Scheduled(Component):
    """A learning rate and how it moves."""

    lr: float = Field(gt=0)
    """Learning rate. Required: no value suits every model."""
    schedule: Literal[
        "constant", "sqrt", "sqrt_n_over_t", "linear", "cosine", "cosine-restarts"
    ] = "constant"
    """How the rate moves: lr; lr / sqrt(k + 1); lr * sqrt(n / (k + 1)) capped at lr; down to
    lr_floor at the end of the run, cosine-restarts rising from 0 after each cycle again (ReLoRA,
    arXiv:2307.05695)."""
    warmup: int = Field(default=0, ge=0)
    """Steps over which the rate rises linearly from 0, which is the rate of the first one."""
    lr_floor: float = Field(default=0.0, ge=0, lt=1)
    """Share of lr that is left at the end of the run, of schedules that fall until then; .1 is
    SLTrain's (arXiv:2406.02214)."""
    cycle: int | None = Field(default=None, ge=1)
    """Steps from one restart to the next, of cosine-restarts: those between ReLoRA's merges. The
    run's are a multiple."""
    rewarm: int = Field(default=0, ge=0)
    """Steps over which the rate rises from 0 after a restart; 100 is ReLoRA's."""

    @model_validator(mode="after")
    def _refuse_what_has_no_effect(self) -> Self:
        if self.lr_floor and self.schedule not in _FALLING:
            raise ValueError(
                f"lr_floor: has no effect on schedule: {self.schedule}; leave it out, or use "
                "schedule: cosine, cosine-restarts or linear"
            )
        if self.schedule != "cosine-restarts":
            given = "cycle" if self.cycle is not None else "rewarm" if self.rewarm else None
            if given:
                raise ValueError(
                    f"{given}: has no effect on schedule: {self.schedule}; leave it out, or use "
                    "schedule: cosine-restarts"
                )
        elif self.cycle is None:
            raise ValueError("cycle: cosine-restarts needs the steps between two restarts")
        elif max(self.rewarm, self.warmup) >= self.cycle:
            field = "rewarm" if self.rewarm >= self.cycle else "warmup"
            raise ValueError(f"{field}: must be less than cycle, {self.cycle}; use fewer steps")
        return self

    def require_steps(self, steps: int | None) -> None:
        """Refuse a run of so many steps, None when open-ended, that the schedule cannot follow.

        Raises:
            ConfigError: it needs an end, or one at a multiple of the cycle.
        """
        if self.schedule not in _FALLING:
            return
        if steps is None:
            raise _no_horizon(f"optimizer.schedule: {self.schedule}")
        if self.cycle is not None and steps % self.cycle:
            raise ConfigError(
                f"optimizer.cycle: {self.cycle} does not divide the run's {steps} steps; use "
                f"steps: {(steps // self.cycle + 1) * self.cycle}, or another cycle"
            )

    def rate(self, comm: Communicator) -> float:
        """Return the learning rate of this step, k.

        During the warm-up lr k / warmup. Then ``constant``: lr. ``sqrt``: lr / sqrt(k + 1).
        ``sqrt_n_over_t``: lr * min(1, sqrt(n / (k + 1))). ``linear`` and ``cosine``: e(k), from lr
        down to ``lr_floor`` lr at the horizon. ``cosine-restarts``: cosine, but (j / rewarm)
        e(k - j + rewarm) at j < rewarm steps after a restart.

        Raises:
            ConfigError: the schedule does not fit the number of steps.
        """
        k = comm.step
        if k < self.warmup:
            return self.lr * k / self.warmup
        if self.schedule == "sqrt":
            return self.lr / math.sqrt(k + 1)
        if self.schedule == "sqrt_n_over_t":
            return self.lr * min(1.0, math.sqrt(comm.n / (k + 1)))
        if self.schedule == "constant":
            return self.lr
        self.require_steps(comm.steps)
        assert comm.steps is not None, "refused by require_steps"
        if self.cycle is not None and k >= self.cycle and k % self.cycle < self.rewarm:
            j = k % self.cycle
            return self.lr * (j / self.rewarm) * self._fallen(k - j + self.rewarm, comm.steps)
        return self.lr * self._fallen(k, comm.steps)

    def _fallen(self, k: int, steps: int) -> float:
        """Return the share of lr that is left at step k."""
        progress = (k - self.warmup) / max(1, steps - self.warmup)
        linear = self.schedule == "linear"
        shape = 1 - progress if linear else 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr_floor + (1 - self.lr_floor) * shape


def inverse_rate(rate: float) -> float:
    """Return 1 / rate, by which a move becomes a direction; 0 of 0, where nothing has moved."""
    return 1.0 / rate if rate else 0.0


def horizon(comm: Communicator, what: str) -> int:
    """Return T, the number of steps of the run.

    Raises:
        ConfigError: the run is open-ended; names ``what`` needs it.
    """
    if comm.steps is None:
        raise _no_horizon(what)
    return comm.steps


def _no_horizon(what: str) -> ConfigError:
    return ConfigError(f"{what} needs the number of steps; give 'steps', or choose another")
