"""Steps that are taken where they help (ZO-SGD-Cons, arXiv:2402.11592)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from gossamer.algorithms.estimates import Directions, Metrics
from gossamer.algorithms.optimizers.sgd import SGD
from gossamer.algorithms.problems import Batches
from gossamer.algorithms.protocols import Algorithm, Oracle
from gossamer.runtime import Communicator, combine
from gossamer.topologies import Topology

__all__ = ["Conservative"]


@dataclass
class ConservativeState:
    """Attributes: x, the (local, d) parameters, equal rows; kept, where they were."""

    x: Tensor
    kept: Tensor


class Conservative(Algorithm):
    """The best of x, x - lr g and x + lr g, by the losses on the step's own examples.

    g = mean_i g_i(x), as under ``all-reduce``; the losses are means over ranks (over examples where
    f is), the same on every rank, and so is the choice: with L0, L1 and L2 in that order, x where
    L0 < L1 and L0 < L2, else x - lr g where L1 <= L0 and L1 < L2, else x + lr g (arXiv:2402.11592,
    ZO-SGD-Cons as released, ties included). 3 losses more than the estimate takes, and a second row
    that holds x.
    """

    uses: ClassVar[Literal["rows", "mean"]] = "mean"
    objective: ClassVar[Literal["ranks", "examples"] | None] = "examples"
    sends: ClassVar[str] = "its gradient and three losses"
    name: Literal["conservative"] = "conservative"
    optimizer: SGD = Field(exclude=True)
    """The rate; plain sgd."""

    @property
    def defers(self) -> bool:
        """Yes."""
        return True

    def adapt(self, topology: Topology) -> Topology:
        """Take any graph: it is not used."""
        return topology

    def keeps_equal(self, topology: Topology) -> bool:
        """All ranks make the same choice."""
        return True

    def init(
        self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches
    ) -> ConservativeState:
        """Start at x."""
        return ConservativeState(x=x, kept=torch.zeros_like(x))

    def step(
        self, comm: Communicator, oracle: Oracle, state: ConservativeState, batches: Batches
    ) -> Metrics:
        """One gradient, three losses of each rank, one choice."""
        x, batch = state.x, batches[0]
        estimate = oracle.deferred(x, batch)
        mean = estimate.mean(comm)
        if mean is not None and self.optimizer.needs_whole:
            rows = mean if isinstance(mean, Tensor) else mean.dense()
            mean = self.optimizer.clipped(rows)
        figures = {"loss": estimate.loss, **estimate.metrics}
        if mean is None:
            return {**figures, "skipped": 1.0}
        if "forwards" in figures:
            figures["forwards"] = figures["forwards"] + 3
        state.kept.copy_(x)
        losses = [oracle.loss(x, batch)]
        for sign in (-1.0, 1.0):
            x.copy_(state.kept)
            self._move_(x, mean, sign * self.optimizer.rate(comm))
            losses.append(oracle.loss(x, batch))
        stay, down, up = self._means(comm, oracle, losses, estimate.weight)
        if not math.isfinite(stay + down + up):  # on all ranks alike
            x.copy_(state.kept)
            return {**figures, "skipped": 1.0}
        if down > stay and stay < up:
            taken = 0.0
            x.copy_(state.kept)
        elif down <= stay and down < up:
            taken = -1.0
            x.copy_(state.kept)
            self._move_(x, mean, -self.optimizer.rate(comm))
        else:
            taken = 1.0  # where x is
        return {**figures, "taken": taken}

    def _move_(self, x: Tensor, mean: Tensor | Directions, scale: float) -> None:
        if isinstance(mean, Tensor):
            combine([(1.0, x), (scale, mean)], out=x)
        else:
            mean.add_to_(x, scale)

    def _means(
        self, comm: Communicator, oracle: Oracle, losses: list[Tensor], weight: Tensor
    ) -> list[float]:
        """Return the means over ranks of the losses, by examples where f is."""
        weights = weight if oracle.weighting == "examples" else torch.ones_like(weight)
        rows = torch.stack([*(loss * weights for loss in losses), weights], dim=1)
        sums = comm.all_reduce(rows.to(comm.device), "mean")[0]
        return (sums[:3] / sums[3]).tolist()
