"""Learning-rate schedules: a rate as a function of the step k (from 0) and the horizon T."""

from __future__ import annotations

import math

from gossamer.runtime.communicator import Communicator
from gossamer.runtime.errors import ConfigError

__all__ = ["horizon", "scheduled"]


def scheduled(lr: float, schedule: str, warmup: int, comm: Communicator) -> float:
    """Return the rate of ``comm.step``.

    ``constant``: lr. ``sqrt``: lr / sqrt(k + 1). ``sqrt_n_over_t``: lr * min(1, sqrt(n / (k + 1))).
    ``linear`` and ``cosine``: from lr after the warm-up down to 0 at the horizon.

    Raises:
        ConfigError: the schedule needs a horizon and the run is open-ended.
    """
    k = comm.step
    if k < warmup:
        return lr * (k + 1) / (warmup + 1)
    if schedule == "sqrt":
        return lr / math.sqrt(k + 1)
    if schedule == "sqrt_n_over_t":
        return lr * min(1.0, math.sqrt(comm.n / (k + 1)))
    if schedule in ("linear", "cosine"):
        progress = (k - warmup) / max(1, horizon(comm, f"schedule: {schedule}") - warmup)
        shape = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return lr * shape
    return lr


def horizon(comm: Communicator, what: str) -> int:
    """Return T, the number of steps of the run.

    Raises:
        ConfigError: the run is open-ended; names ``what`` needs it.
    """
    if comm.steps is None:
        raise ConfigError(f"{what} needs the number of steps; give 'steps', or choose another")
    return comm.steps
