"""Quasi-global momentum (arXiv:2102.04761): momentum from the way x moved, not from gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from gossamer.algorithms.decentralized.fixed_rule import FixedRule
from gossamer.algorithms.estimates import Metrics
from gossamer.algorithms.optimizers.adam import adam_direction
from gossamer.algorithms.problems import Batches
from gossamer.algorithms.protocols import Oracle
from gossamer.algorithms.schedules import inverse_rate
from gossamer.runtime import Communicator, combine, row_norm

__all__ = ["QGAdam", "QGDSGDm"]


@dataclass
class QGState:
    """Attributes: x, the (local, d) parameters; h, the (local, d) quasi-global momentum."""

    x: Tensor
    h: Tensor


class QGDSGDm(FixedRule):
    """QG-DSGDm: heavy ball along the way that mixing moved x (arXiv:2102.04761, Alg. 1).

    m = beta h + g;  x+ = W(x - lr m);  h = mu h + (1 - mu) (x - x+) / lr

    (QG-DSGDm-N steps along g + beta m.) W must be doubly stochastic. With different data on the
    ranks plain momentum amplifies DSGD's bias by 1 / (1 - beta); this does not. No extra message.
    """

    sends: ClassVar[str] = "its parameters"
    name: Literal["qg-dsgdm"] = "qg-dsgdm"
    beta: float = Field(default=0.9, ge=0, lt=1)
    """Share of the momentum in the local step."""
    mu: float = Field(default=0.9, ge=0, lt=1)
    """Share of the old momentum that stays."""
    nesterov: bool = False
    """Step along g + beta * m (QG-DSGDm-N)."""

    def init(self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches) -> QGState:
        """Start at x, at rest."""
        return QGState(x=x, h=torch.zeros_like(x))

    def step(self, comm: Communicator, oracle: Oracle, state: QGState, batches: Batches) -> Metrics:
        """One gradient, one exchange of d elements."""
        x, h, lr = state.x, state.h, self.optimizer.rate(comm)
        estimate, g = self.estimate(comm, oracle, x, batches[0])
        m = combine([(self.beta, h), (1.0, g)])
        if self.nesterov:
            m = combine([(1.0, g), (self.beta, m)])
        moved = combine([(1.0, x), (-lr, m)])
        comm.neighbor_average(moved, out=moved)
        combine([(self.mu, h), ((1.0 - self.mu) * inverse_rate(lr), x - moved)], out=h)
        x.copy_(moved)
        return {"loss": estimate.loss, **estimate.metrics}


@dataclass
class QGAdamState:
    """The parameters and the quasi-global moments.

    Attributes:
        x: (local, d).
        m: (local, d), moving average of the normalised moves.
        v: (local, d), moving average of their squares.
        t: steps since the start.
    """

    x: Tensor
    m: Tensor
    v: Tensor
    t: int = 0


class QGAdam(FixedRule):
    """QG-Adam: Adam whose moments follow the normalised moves of x (arXiv:2102.04761).

    With c1, c2 Adam's bias corrections::

        x+ = W(x - lr * (beta1 m + g) / c1 / (sqrt((beta2 v + (1 - beta2) g^2) / c2) + eps))
        q = (x - x+) / ||x - x+||;  m = beta1 m + (1 - beta1) q;  v = beta2 v + (1 - beta2) q^2

    g enters the first moment with factor 1, not 1 - beta1, as in the authors' code (which adds 1e-8
    to the norm; here a move of length 0 gives q = 0). W must be doubly stochastic.
    """

    sends: ClassVar[str] = "its parameters"
    name: Literal["qg-adam"] = "qg-adam"
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Share of the old first moment that stays."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Share of the old second moment that stays."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""

    def init(self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches) -> QGAdamState:
        """Start at x with moments of zero."""
        return QGAdamState(x=x, m=torch.zeros_like(x), v=torch.zeros_like(x))

    def step(
        self, comm: Communicator, oracle: Oracle, state: QGAdamState, batches: Batches
    ) -> Metrics:
        """One gradient, one exchange of d elements."""
        x, m, v = state.x, state.m, state.v
        estimate, g = self.estimate(comm, oracle, x, batches[0])
        state.t += 1
        first = combine([(self.beta1, m), (1.0, g)])
        second = combine([(self.beta2, v), (1.0 - self.beta2, g * g)])
        direction = adam_direction(first, second, self.beta1, self.beta2, self.eps, state.t)
        moved = combine([(1.0, x), (-self.optimizer.rate(comm), direction)])
        comm.neighbor_average(moved, out=moved)
        move = x - moved
        length = row_norm(move)
        q = combine([(torch.where(length > 0, 1.0 / length, 0.0), move)])
        combine([(self.beta1, m), (1.0 - self.beta1, q)], out=m)
        combine([(self.beta2, v), (1.0 - self.beta2, q * q)], out=v)
        x.copy_(moved)
        return {"loss": estimate.loss, **estimate.metrics}
