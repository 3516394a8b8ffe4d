"""GT-NSGDm: normalized SGD with momentum and gradient tracking (arXiv:2505.03736)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from gossamer.algorithms.decentralized.dnsgd import inverse_norm
from gossamer.algorithms.decentralized.fixed_rule import FixedRule
from gossamer.algorithms.estimates import Metrics
from gossamer.algorithms.problems import Batches
from gossamer.algorithms.protocols import Oracle
from gossamer.runtime import Communicator, combine

__all__ = ["GTNSGDm", "GTNSGDmState"]


@dataclass
class GTNSGDmState:
    """Parameters, momentum and its tracker.

    Attributes:
        x: (local, d), the parameters.
        m: (local, d), the local moving average of gradients.
        y: (local, d), the tracker; its mean over ranks is that of m.
    """

    x: Tensor
    m: Tensor
    y: Tensor


class GTNSGDm(FixedRule):
    """GT-NSGDm (arXiv:2505.03736): normalise a tracked momentum, not the local gradient.

    m = (1 - alpha) m + alpha g;  y = W (y + m - m_old);  x = W (x - lr y / ||y||)

    with m = y = 0 at first; mean(y) = mean(m) always. W must be doubly stochastic. Two exchanges of
    d elements. A zero tracker moves nothing. For a horizon T and noise of bounded variance the
    theory takes alpha ~ T^(-1/2) and lr ~ T^(-3/4).
    """

    sends: ClassVar[str] = "its parameters and its tracked momentum"
    name: Literal["gt-nsgdm"] = "gt-nsgdm"
    alpha: float = Field(default=0.1, gt=0, le=1)
    """Share of the new gradient in the moving average."""
    eps: float = Field(default=1e-30, ge=0)
    """A tracker no longer than this is zero."""

    def init(self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches) -> GTNSGDmState:
        """Start at x with m = y = 0."""
        return GTNSGDmState(x=x, m=torch.zeros_like(x), y=torch.zeros_like(x))

    def step(
        self, comm: Communicator, oracle: Oracle, state: GTNSGDmState, batches: Batches
    ) -> Metrics:
        """One gradient, two exchanges of d elements."""
        x, m, y = state.x, state.m, state.y
        estimate, g = self.estimate(comm, oracle, x, batches[0])
        m_old = m.clone()
        combine([(1 - self.alpha, m), (self.alpha, g)], out=m)
        combine([(1.0, y), (1.0, m), (-1.0, m_old)], out=y)
        comm.neighbor_average(y, out=y)
        combine([(1.0, x), (-self.optimizer.rate(comm) * inverse_norm(y, self.eps), y)], out=x)
        comm.neighbor_average(x, out=x)
        return {"loss": estimate.loss, **estimate.metrics}
