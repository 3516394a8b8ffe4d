"""Private training in experiments: problems, methods, and what one method gains over another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from gossamer.algorithms.privacy import accounting
from gossamer.launch.reproduce.simulation import Laboratory, Sample, Simulation

__all__ = [
    "BASELINE",
    "DISK",
    "DOPPLER",
    "FILTERS",
    "MOMENTUM",
    "Cell",
    "Gain",
    "Runs",
    "Setting",
    "best",
    "noise_multiplier",
    "run_cells",
]

Values = dict[str, Any]

BASELINE = "DP-SGD"
MOMENTUM = "momentum .9 at lr / 10"
"""DP-SGD with plain momentum: the impulse response of ema(.9), but for scale and bias."""

DOPPLER: dict[str, Values] = {
    "ema(.5)": {"name": "doppler", "filter": "ema", "beta": 0.5},
    "ema(.9)": {"name": "doppler", "filter": "ema", "beta": 0.9},
}
DISK: dict[str, Values] = {
    "DiSK .7": {"name": "disk", "kappa": 0.7, "gamma": 0.5},
    "DiSK .5": {"name": "disk", "kappa": 0.5, "gamma": 0},
    "DiSK .3": {"name": "disk", "kappa": 0.3, "gamma": 0},
    "DiSK .1": {"name": "disk", "kappa": 0.1, "gamma": 0},
}
"""By kappa. Where gamma is 0 a call takes one evaluation, as without the filter; else two."""
FILTERS = DOPPLER | DISK

Cell = tuple[float, float]
"""(epsilon, learning rate)."""
Runs = Mapping[tuple[str, float, float], Sample]
"""(method, epsilon, learning rate) -> its runs; equal seeds share x0, batches and noise."""


@cache
def noise_multiplier(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """Return sigma; found once for all runs of a laboratory, since a search can outlast a run."""
    return accounting.calibrate(epsilon, delta, rate, steps)


@dataclass(frozen=True)
class Setting:
    """A problem, and how many private steps are made on it.

    Attributes:
        title: of the problem, for claims.
        task: section of the configuration.
        examples: N, of the training set.
        steps: T.
        batch_size: expected size of a batch; None: every example at every step.
        delta: of the guarantee.
        loss: which loss stands beside the accuracy.
    """

    title: str
    task: Values
    examples: int
    steps: int
    batch_size: int | None = None
    delta: float = 1e-5
    loss: Literal["test_loss", "nonprivate_loss"] = "test_loss"

    @property
    def rate(self) -> float:
        """Probability of an example and step."""
        return 1.0 if self.batch_size is None else self.batch_size / self.examples

    def run(self, method: str, epsilon: float, lr: float, *more: Values) -> Simulation:
        """Return a run of ``BASELINE``, ``MOMENTUM`` or one of ``FILTERS``.

        Args:
            method: which.
            epsilon: at the end.
            lr: learning rate.
            more: oracles around the method's.
        """
        sampling: Values = (
            {"sampling": "full"} if self.batch_size is None else {"batch_size": self.batch_size}
        )
        private = {
            "name": "dp",
            "noise_multiplier": noise_multiplier(epsilon, self.delta, self.rate, self.steps),
            "delta": self.delta,
            "show_nonprivate": self.loss == "nonprivate_loss",
        }
        stack = [{"name": "backprop", **sampling}, private]
        stack += [FILTERS[method]] if method in FILTERS else []
        optimizer: Values = {"name": "sgd", "lr": lr}
        if method == MOMENTUM:
            optimizer = {"name": "momentum", "beta": 0.9, "lr": lr / 10}
        values = {
            "task": self.task,
            "oracle": [*stack, *more],
            "optimizer": optimizer,
            "algorithm": {"name": "all-reduce"},
            "ranks": 1,
            "steps": self.steps,
        }
        return Simulation(values, evaluator={"per_rank": False})


@dataclass(frozen=True)
class Gain:
    """A difference over paired seeds.

    Attributes:
        mean: over the seeds.
        error: the mean's standard error; NaN with one seed.
    """

    mean: float
    error: float

    @classmethod
    def of(cls, ours: np.ndarray, theirs: np.ndarray, unit: float = 1.0) -> Gain:
        """Return the mean of ``ours - theirs`` (seeds,), in units."""
        apart = (ours - theirs) / unit
        count = len(apart)
        error = float(apart.std(ddof=1)) / math.sqrt(count) if count > 1 else math.nan
        return cls(float(apart.mean()), error)

    def __str__(self) -> str:
        error = "" if math.isnan(self.error) else f" (se {self.error:.2g})"
        return f"{self.mean:+.3g}{error}"


def run_cells(
    lab: Laboratory, setting: Setting, methods: Iterable[str], cells: Iterable[Cell]
) -> Runs:
    """Run each method in each cell."""
    keys = [(method, *cell) for cell in cells for method in methods]
    found = lab.run({str(key): setting.run(*key) for key in keys})
    return {key: found[str(key)] for key in keys}


def best(
    runs: Runs, method: str, epsilon: float, rates: Sequence[float], figure: str = "accuracy"
) -> tuple[float, float]:
    """Return the highest mean over the seeds of a figure at the end, and its learning rate."""
    return max((float(runs[method, epsilon, lr].last(figure).mean()), lr) for lr in rates)
