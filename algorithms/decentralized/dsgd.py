"""Decentralized SGD (Lian et al., arXiv:1705.09056) with any local optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from gossamer.algorithms.estimates import Metrics
from gossamer.algorithms.optimizers.sgd import Momentum
from gossamer.algorithms.problems import Batches
from gossamer.algorithms.protocols import Algorithm, Optimizer, Oracle
from gossamer.runtime import Communicator, combine

__all__ = ["DSGD"]


@dataclass
class DSGDState:
    """Attributes: x, the (local, d) parameters; optimizer, its own state."""

    x: Tensor
    optimizer: Any


class DSGD(Algorithm):
    """Decentralized SGD: step locally, average with the neighbours (arXiv:1705.09056).

    ``atc`` (adapt then combine): x = W(x - lr * g(x)). ``cta`` (combine then adapt): x = W x - lr *
    g(x) with the gradient at the unmixed x, so that mixing overlaps the gradient. W must be doubly
    stochastic. With a constant rate and different data on the ranks both stop at a distance ~ (lr
    rho / (1 - rho))^2 from consensus.

    With ``optimizer: momentum`` this is DmSGD (or DSGDm-N, with ``nesterov``), and the distance
    grows like 1 / (1 - beta)^2. ``mix_momentum``: m = W(beta m + g); x = W x - lr m.
    """

    sends: ClassVar[str] = "its parameters (with mix_momentum, its momentum too)"
    name: Literal["dsgd"] = "dsgd"
    order: Literal["atc", "cta"] = "atc"
    """Which comes first: adapt (the local step) or combine (the average)."""
    mix_momentum: bool = False
    """Average the momentum too, a second message of d: needs order: cta, optimizer: momentum."""
    optimizer: Optimizer = Field(exclude=True)
    """The local update; any optimizer."""

    @model_validator(mode="after")
    def _check_mixed_momentum(self) -> Self:
        plain = isinstance(self.optimizer, Momentum) and not self.optimizer.nesterov
        if self.mix_momentum and not (plain and self.order == "cta"):
            raise ValueError(
                "mix_momentum: averages the heavy-ball momentum beside x; it needs order: cta and "
                "optimizer: {name: momentum} without nesterov"
            )
        return self

    @property
    def defers(self) -> bool:
        """With ``atc``."""
        return self.order == "atc"

    def init(self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches) -> DSGDState:
        """Start at x, the optimizer at rest."""
        return DSGDState(x=x, optimizer=self.optimizer.init(x))

    def step(
        self, comm: Communicator, oracle: Oracle, state: DSGDState, batches: Batches
    ) -> Metrics:
        """One gradient, one exchange of d elements with each neighbour."""
        x = state.x
        if self.order == "atc":
            estimate = oracle.deferred(x, batches[0])
            self.optimizer.apply_(state.optimizer, x, estimate.grad, comm, estimate.origin)
            comm.neighbor_average(x, out=x)
        else:
            mixing = comm.neighbor_average_async(x)
            estimate = oracle(x, batches[0])  # while x travels
            direction = self.optimizer.direction(
                state.optimizer, x, estimate.grad, comm, estimate.origin
            )
            if self.mix_momentum:
                comm.neighbor_average(direction, out=direction)  # it is the momentum's own row
            combine([(1.0, mixing.wait()), (-self.optimizer.rate(comm), direction)], out=x)
        return {"loss": estimate.loss, **estimate.metrics}
