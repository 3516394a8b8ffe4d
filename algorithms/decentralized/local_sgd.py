"""Local SGD: several local steps between two averages (arXiv:1805.09767; FedAvg, 1602.05629)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from gossamer.algorithms.estimates import Metrics
from gossamer.algorithms.problems import Batches
from gossamer.algorithms.protocols import Algorithm, Optimizer, Oracle
from gossamer.runtime import Communicator, combine

__all__ = ["LocalSGD", "LocalSGDState", "take_local_steps"]


@dataclass
class LocalSGDState:
    """Attributes: x, the (local, d) parameters; optimizer, its own state."""

    x: Tensor
    optimizer: Any


class LocalSGD(Algorithm):
    """Local SGD: K local steps, then one average, x = W x.

    A step of the run is one such round. On the complete graph with uniform weights (W = J) this is
    FedAvg with full participation. W must be doubly stochastic and may change over time. With
    different data on the ranks and a constant rate, drift between averages leaves a bias that grows
    with K; k-gt removes it. The optimizer's state stays on its rank; its rate moves once a round.
    """

    sends: ClassVar[str] = "its parameters"
    name: Literal["local-sgd"] = "local-sgd"
    local_steps: int = Field(default=10, ge=1)
    """K, local updates between two averages; 1 is DSGD, adapt then combine."""
    optimizer: Optimizer = Field(exclude=True)
    """The local update; any optimizer."""

    @property
    def batches_per_step(self) -> int:
        """One batch per local update."""
        return self.local_steps

    def init(
        self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches
    ) -> LocalSGDState:
        """Start at x, the optimizer at rest."""
        return LocalSGDState(x=x, optimizer=self.optimizer.init(x))

    def step(
        self, comm: Communicator, oracle: Oracle, state: LocalSGDState, batches: Batches
    ) -> Metrics:
        """K gradients, one exchange of d elements."""
        figures = take_local_steps(self.optimizer, comm, oracle, state.optimizer, state.x, batches)
        comm.neighbor_average(state.x, out=state.x)
        return figures


def take_local_steps(
    optimizer: Optimizer,
    comm: Communicator,
    oracle: Oracle,
    state: Any,
    x: Tensor,
    batches: Batches,
) -> Metrics:
    """Make one local update of x (local, d) per batch, in place, without any message.

    The rate is that of the round; the optimizer's own step counts updates.

    Returns:
        The mean of the losses, and what the oracle said last.
    """
    rate, losses = optimizer.rate(comm), []
    for batch in batches:
        estimate = oracle(x, batch)
        direction = optimizer.direction(state, x, estimate.grad, comm, estimate.origin)
        combine([(1.0, x), (-rate, direction)], out=x)
        losses.append(estimate.loss)
    return {"loss": sum(losses[1:], losses[0]) / len(losses), **estimate.metrics}
