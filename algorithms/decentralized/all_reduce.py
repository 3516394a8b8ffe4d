"""All-reduce SGD: synchronous data-parallel training, the reference of every other method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from gossamer.algorithms.estimates import Metrics
from gossamer.algorithms.problems import Batches
from gossamer.algorithms.protocols import Algorithm, Optimizer, Oracle
from gossamer.runtime import Communicator
from gossamer.topologies import Topology

__all__ = ["AllReduce"]


@dataclass
class AllReduceState:
    """Attributes: x, the (local, d) parameters, equal rows; optimizer, its own state."""

    x: Tensor
    optimizer: Any


class AllReduce(Algorithm):
    """All-reduce SGD (DDP): every rank steps along the mean gradient of all ranks.

    g = mean_i g_i(x); x -= lr * direction(g), with any local optimizer. The sum runs in ascending
    rank, so the rows stay equal to the bit. The graph is not used; 2 (n - 1) / n d elements a step,
    or a number per random direction where these make the gradient (``zeroth-order``).
    """

    uses: ClassVar[Literal["rows", "mean"]] = "mean"
    objective: ClassVar[Literal["ranks", "examples"] | None] = "examples"
    sweeps: ClassVar[bool] = True
    sends: ClassVar[str] = "its gradient"
    name: Literal["all-reduce"] = "all-reduce"
    optimizer: Optimizer = Field(exclude=True)
    """The local update; any optimizer."""

    def adapt(self, topology: Topology) -> Topology:
        """Take any graph: it is not used."""
        return topology

    def mean_delay(self, topology: Topology) -> int:
        """Return 0: a mean is applied in the step that makes it."""
        return 0

    def init(
        self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches
    ) -> AllReduceState:
        """Start at x, the optimizer at rest."""
        return AllReduceState(x=x, optimizer=self.optimizer.init(x))

    def step(
        self, comm: Communicator, oracle: Oracle, state: AllReduceState, batches: Batches
    ) -> Metrics:
        """One gradient, one all-reduce of d elements, or of what makes them."""
        skipped = 0
        for estimate in oracle.sweep_over(state.x, batches[0]):
            mean = estimate.mean(comm)
            if mean is None:
                skipped += 1
                continue
            if not isinstance(mean, Tensor):
                self._tell(mean)
            self.optimizer.apply_(state.optimizer, state.x, mean, comm, estimate.mean_origin)
        figures = {"loss": estimate.loss, **estimate.metrics}
        return figures | {"skipped": float(skipped)} if skipped else figures
