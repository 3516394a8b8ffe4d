"""SGD with weight decay and heavy-ball or Nesterov momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from gossamer.algorithms.estimates import PLAIN, Directions, Origin
from gossamer.algorithms.optimizers.decay import Decaying
from gossamer.runtime.communicator import Communicator
from gossamer.runtime.rows import combine

__all__ = ["SGD", "Momentum", "SignSGD"]


class SGD(Decaying):
    """Plain stochastic gradient descent: x -= lr * (g + weight_decay * x)."""

    name: Literal["sgd"] = "sgd"

    def init(self, x: Tensor) -> None:
        """Keep no state."""

    def rule(
        self, state: None, x: Tensor, grad: Tensor, comm: Communicator, origin: Origin
    ) -> Tensor:
        """Return the gradient, decayed."""
        return self.decayed(x, grad)

    def apply_(
        self,
        state: None,
        x: Tensor,
        grad: Tensor | Directions,
        comm: Communicator,
        origin: Origin = PLAIN,
    ) -> Tensor:
        """``update_``; Directions are added to x as they are made, unless there is more to do."""
        if isinstance(grad, Tensor) or self.weight_decay or self.needs_whole:
            return super().apply_(state, x, grad, comm, origin)
        return grad.add_to_(x, -self.rate(comm))


@dataclass
class MomentumState:
    """Attributes: m, the (local, d) running sum of gradients."""

    m: Tensor


class Momentum(Decaying):
    """Momentum: m = beta * m + g; x -= lr * m (Nesterov: x -= lr * (g + beta * m))."""

    name: Literal["momentum"] = "momentum"
    beta: float = Field(default=0.9, ge=0, lt=1)
    """Share of the old momentum that stays."""
    nesterov: bool = False
    """Step along g + beta * m with the new m."""

    def init(self, x: Tensor) -> MomentumState:
        """Start at rest."""
        return MomentumState(m=torch.zeros_like(x))

    def rule(
        self, state: MomentumState, x: Tensor, grad: Tensor, comm: Communicator, origin: Origin
    ) -> Tensor:
        """Move the momentum and return it."""
        if origin.restart:
            state.m.zero_()
        grad = self.decayed(x, grad)
        combine([(self.beta, state.m), (1.0, grad)], out=state.m)
        return combine([(1.0, grad), (self.beta, state.m)]) if self.nesterov else state.m


class SignSGD(Decaying):
    """SGD along signs (arXiv:1802.04434): x -= lr * (sign(g) + weight_decay * x), elementwise."""

    name: Literal["sign-sgd"] = "sign-sgd"
    weight_decay: float = Field(default=0.0, ge=0)
    """Decay of the parameters, times the learning rate; signs do not see it."""

    def init(self, x: Tensor) -> None:
        """Keep no state."""

    def rule(
        self, state: None, x: Tensor, grad: Tensor, comm: Communicator, origin: Origin
    ) -> Tensor:
        """Return the signs, decayed."""
        return self.decayed(x, grad.sign())
