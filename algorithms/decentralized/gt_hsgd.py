"""GT-HSGD: gradient tracking of a hybrid variance-reduced estimate (arXiv:2102.06752)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from gossamer.algorithms.decentralized.fixed_rule import FixedRule
from gossamer.algorithms.estimates import Metrics
from gossamer.algorithms.problems import Batches
from gossamer.algorithms.protocols import Oracle
from gossamer.runtime import Communicator, combine

__all__ = ["GTHSGD", "GTHSGDState"]


@dataclass
class GTHSGDState:
    """Parameters, tracker and estimate.

    Attributes:
        x: (local, d), the parameters.
        x_old: (local, d), those of the step before.
        y: (local, d), the tracker; its mean over ranks is that of v.
        v: (local, d), the variance-reduced estimate of the local gradient.
        k: steps since the estimate began.
    """

    x: Tensor
    x_old: Tensor
    y: Tensor
    v: Tensor
    k: int = 0


class GTHSGD(FixedRule):
    """GT-HSGD (arXiv:2102.06752, Alg. 1): two gradients on one sample s reduce the variance.

    v = g(x; s) + (1 - beta) (v - g(x_old; s))      (v = g(x; s) at first)
    y = W (y + v - v_old);  x = W (x - lr y)        (y = v_old = 0 at first)

    The oracle forms g(x; s) - (1 - beta) g(x_old; s) on the same examples. mean(y) = mean(v)
    always. W must be doubly stochastic. Two exchanges of d elements, two gradients a step. beta 1
    is gradient tracking, adapt then combine, with fresh samples (and one more average of y at the
    start). The paper takes the first v from a larger batch: ``initial_batches``.

    The optimizer's ``max_norm`` bounds v, decay included.
    """

    sends: ClassVar[str] = "its parameters and its tracked gradient"
    name: Literal["gt-hsgd"] = "gt-hsgd"
    beta: float = Field(default=0.1, gt=0, le=1)
    """Share of the plain gradient in the estimate; .01 to .1, 1 is plain gradient tracking."""
    initial_batches: int = Field(default=1, ge=1)
    """The first so many steps stay at x0 and average their batches into the first v (the paper's
    b0 = initial_batches * batch_size, 32 or so), mixing y meanwhile."""

    def init(self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches) -> GTHSGDState:
        """Start at x with y = v = 0."""
        return GTHSGDState(x, x.clone(), torch.zeros_like(x), torch.zeros_like(x))

    def step(
        self, comm: Communicator, oracle: Oracle, state: GTHSGDState, batches: Batches
    ) -> Metrics:
        """One sample at two points, two exchanges of d elements."""
        x, x_old, y, v = state.x, state.x_old, state.y, state.v
        gathering = state.k < self.initial_batches - 1
        # At x = x_old, beta = 1 / (k + 1) makes v the mean of the first k + 1 gradients.
        beta = 1 / (state.k + 1) if state.k < self.initial_batches else self.beta

        points = [(1.0, x), (beta - 1.0, x_old)] if beta < 1 else [(1.0, x)]
        estimate = oracle(x, batches[0], combine=points if beta < 1 else None)
        grad = estimate.grad
        for c, point in points:
            grad = self.optimizer.decayed(point, grad, scale=c)
        v_new = self.optimizer.clipped(combine([(1.0, grad), (1.0 - beta, v)]))

        combine([(1.0, y), (1.0, v_new), (-1.0, v)], out=y)
        v.copy_(v_new)
        comm.neighbor_average(y, out=y)
        x_old.copy_(x)
        if not gathering:
            combine([(1.0, x), (-self.optimizer.rate(comm), y)], out=x)
            comm.neighbor_average(x, out=x)
        state.k += 1
        return {"loss": estimate.loss, **estimate.metrics}
