"""Decentralized SGD (Lian et al., arXiv:1705.09056) with any local optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from gossamer.algorithms.protocols import Algorithm, Batches, Metrics, Optimizer, Oracle
from gossamer.runtime import Communicator, combine

__all__ = ["DSGD"]


@dataclass
class DSGDState:
    """Attributes: x, the (local, d) parameters; optimizer, its own state."""

    x: Tensor
    optimizer: Any


class DSGD(Algorithm):
    """Decentralized SGD: step locally, average with the neighbours.

    ``atc`` (adapt then combine): x = W(x - lr * g(x)). ``cta`` (combine then adapt): x = W x - lr *
    g(x) with the gradient at the unmixed x, so that mixing overlaps the gradient. With a constant
    rate and different data on the ranks both stop at a distance ~ (lr rho / (1 - rho))^2 from
    consensus. With ``optimizer: momentum`` this is DmSGD.
    """

    name: Literal["dsgd"] = "dsgd"
    order: Literal["atc", "cta"] = "atc"
    """Which comes first: adapt (the local step) or combine (the average)."""
    optimizer: Optimizer = Field(exclude=True)

    def init(self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches) -> DSGDState:
        """Start at x, the optimizer at rest."""
        return DSGDState(x=x, optimizer=self.optimizer.init(x))

    def step(
        self, comm: Communicator, oracle: Oracle, state: DSGDState, batches: Batches
    ) -> Metrics:
        """One gradient, one exchange of d elements with each neighbour."""
        x = state.x
        if self.order == "atc":
            estimate = oracle(x, batches[0])
            self.optimizer.update_(state.optimizer, x, estimate.grad, comm)
            comm.neighbor_average(x, out=x)
        else:
            mixed = comm.neighbor_average_async(x)  # x is only read meanwhile
            estimate = oracle(x, batches[0])
            direction = self.optimizer.direction(state.optimizer, x, estimate.grad, comm.step)
            combine([(1.0, mixed.wait()), (-self.optimizer.rate(comm), direction)], out=x)
        return {"loss": estimate.loss, **estimate.metrics}
