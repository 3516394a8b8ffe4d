"""How far private gradients are from the gradients they stand for, as a run goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from gossamer.algorithms.estimates import Estimate, Sink
from gossamer.algorithms.oracles.wrapper import OracleWrapper
from gossamer.algorithms.privacy.clipping import make_clip
from gossamer.algorithms.problems import Batch, DataPlan, Dataset, Problem, RankBatches
from gossamer.algorithms.protocols import Oracle
from gossamer.launch.reproduce.claims import Claim, between, shown
from gossamer.launch.reproduce.private import BASELINE, Setting
from gossamer.launch.reproduce.simulation import Laboratory
from gossamer.runtime import Communicator

__all__ = ["WatchedGradients", "estimate_quality"]


class WatchedGradients(OracleWrapper):
    """Compares each gradient with the one of all examples at x, bounded alike, without noise.

    Adds to the metrics the means so far of |g - g*|^2 / |g*|^2 and of the cosine. One rank.
    """

    name: Literal["watched-gradients"] = "watched-gradients"
    after: int = Field(default=50, ge=0)
    """Steps before the first that counts."""
    clip_norm: float = Field(default=1.0, gt=0)
    """C of the flat bound."""

    _comm: Communicator = PrivateAttr()
    _all: list[Batch] = PrivateAttr()
    _sums: list[float] = PrivateAttr(default_factory=lambda: [0.0, 0.0, 0.0])

    def setup(self, comm: Communicator, problem: Problem) -> DataPlan:
        """Look all examples up."""
        assert comm.n == 1, "compares the one rank's gradient with that of all examples"
        train: Dataset = problem.train  # type: ignore[assignment]  # private data are finite
        self._comm = comm
        self._all = [Batch(train[torch.from_numpy(problem.shards[0])])]
        return super().setup(comm, problem)

    def __call__(
        self,
        x: Tensor,
        batch: RankBatches,
        *,
        combine: Sequence[tuple[float, Tensor]] | None = None,
        sink: Sink | None = None,
    ) -> Estimate:
        """Return the inner estimate, with what is seen of it."""
        estimate = self.inner(x, batch, combine=combine, sink=sink)
        if self._comm.step < self.after:
            return estimate
        kept = estimate.grad.clone()  # the base oracle has one row for all its results
        clip = make_clip("flat", self.clip_norm, 0.0, len(self.layout.slices))
        truth = _base(self).clipped(x, self._all, clip).grad / len(self._all[0])
        error = float((kept - truth).square().sum() / truth.square().sum())
        cosine = float(torch.cosine_similarity(kept, truth))
        self._sums = [a + b for a, b in zip(self._sums, (1.0, error, cosine), strict=True)]
        count, errors, cosines = self._sums
        seen = {"relative_error": errors / count, "cosine": cosines / count}
        return replace(estimate, grad=kept, metrics={**estimate.metrics, **seen})


def _base(oracle: Oracle) -> Oracle:
    return _base(oracle.inner) if isinstance(oracle, OracleWrapper) else oracle


def estimate_quality(
    lab: Laboratory, setting: Setting, cell: tuple[float, float], rho: Mapping[str, float]
) -> Iterator[Claim]:
    """Compare the error of filtered gradients with that of the noisy ones, in training.

    Args:
        lab: to run in.
        setting: the problem.
        cell: epsilon and learning rate.
        rho: method -> what theory leaves of the variance of white noise.
    """
    watch = {"name": f"{__name__}:WatchedGradients"}
    found = lab.run({m: setting.run(m, *cell, watch) for m in (BASELINE, *rho)})
    error = {m: float(sample.last("relative_error").mean()) for m, sample in found.items()}
    cosine = {m: float(sample.last("cosine").mean()) for m, sample in found.items()}
    epsilon, lr = cell
    where = f"Estimates: {setting.title}, epsilon = {epsilon:g}, lr = {lr:g}"
    note = f"cosine {cosine[BASELINE]:.3f}"
    yield shown(f"{where}: {BASELINE}: |g - g*|^2 / |g*|^2", error[BASELINE], lab.seeds, note)
    for method, theory in rho.items():
        yield between(
            f"The same, {method}: error / {BASELINE}'s (theory: {theory:.4f})",
            error[method] / error[BASELINE],
            0.8 * theory,
            1.2 * theory,
            lab.seeds,
            f"error {error[method]:.3g}, cosine {cosine[method]:.3f}",
        )
