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

    With ``per_layer`` (LOMO, arXiv:2306.09782; GaLore, arXiv:2403.03507) each parameter is
    averaged and updated as soon as backward has its gradient, which is freed then: no whole
    gradient is held, but the same bits come out. The bytes are those of the whole row without its
    padding; messages are one per parameter, not one per step. No gradient norm is evaluated
    unless ``evaluate_gradient`` asks for it, with a row of memory. A process with several ranks
    (simulation) holds their gradients as ever.
    """

    uses: ClassVar[Literal["rows", "mean"]] = "mean"
    objective: ClassVar[Literal["ranks", "examples"] | None] = "examples"
    sweeps: ClassVar[bool] = True
    sends: ClassVar[str] = "its gradient"
    name: Literal["all-reduce"] = "all-reduce"
    optimizer: Optimizer = Field(exclude=True)
    """The local update; any optimizer."""
    per_layer: bool = False
    """Update each parameter as soon as backward has its gradient, and free that."""

    @property
    def defers(self) -> bool:
        """Yes."""
        return True

    def adapt(self, topology: Topology) -> Topology:
        """Take any graph: it is not used."""
        return topology

    def mean_delay(self, topology: Topology) -> int:
        """Return 0: a mean is applied in the step that makes it."""
        return 0

    @property
    def streams(self) -> bool:
        """Whether it is per layer."""
        return self.per_layer

    def init(
        self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches
    ) -> AllReduceState:
        """Start at x, the optimizer at rest."""
        return AllReduceState(x=x, optimizer=self.optimizer.init(x))

    def step(
        self, comm: Communicator, oracle: Oracle, state: AllReduceState, batches: Batches
    ) -> Metrics:
        """One gradient, one all-reduce of d elements, or of what makes them."""
        if self.per_layer:
            return self._step_per_layer(comm, oracle, state, batches)
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

    def _step_per_layer(
        self, comm: Communicator, oracle: Oracle, state: AllReduceState, batches: Batches
    ) -> Metrics:
        """One gradient, one all-reduce per parameter while it is computed."""
        with self.optimizer.in_parts(state.optimizer, state.x, comm) as update:

            def reduce_and_update(columns: slice, grad: Tensor) -> None:
                mean = comm.all_reduce(grad, "mean") if comm.n > 1 else grad
                update(columns, mean.expand(comm.local, -1))

            estimate = oracle(state.x, batches[0], sink=reduce_and_update)
        return {"loss": estimate.loss, **estimate.metrics}
