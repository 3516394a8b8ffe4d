"""DAMSGrad: decentralized AMSGrad with tracked second moments (arXiv:2109.03194)."""

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

__all__ = ["DAMSGrad", "DAMSGradState"]


@dataclass
class DAMSGradState:
    """The exchanged row [x | ut] and the local moments.

    Attributes:
        row: (local, 2 d), parameters x and tracked second moment ut: one message.
        m: (local, d), first moment.
        v: (local, d), second moment.
        vh: (local, d), its running maximum; sum ut = sum vh over ranks.
        k: steps since the moments began.
    """

    row: Tensor
    m: Tensor
    v: Tensor
    vh: Tensor
    k: int = 0

    @property
    def x(self) -> Tensor:
        """The parameters, a view."""
        return self.row[:, : self.m.shape[1]]

    @property
    def ut(self) -> Tensor:
        """The tracked second moment, a view."""
        return self.row[:, self.m.shape[1] :]


class DAMSGrad(FixedRule):
    """DAMSGrad (arXiv:2109.03194, Alg. 3): Adam whose denominators agree over ranks.

    m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;  vh = max(vh, v)
    u = max(ut, eps)                                (ut = vh at first)
    x = W x - lr m / sqrt(u);  ut = W (ut + vh - vh_old)

    Plain decentralized Adam (dsgd with ``optimizer: adam``) divides by each rank's own denominator
    and fails on different data, even on the complete graph; here the ranks' denominators are
    averaged by gossip and only grow. No bias correction, as in the paper. W must be doubly
    stochastic. x and ut travel as one message of 2 d elements.
    """

    sends: ClassVar[str] = "its parameters and its tracked second moments"
    name: Literal["damsgrad"] = "damsgrad"
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Share of the old first moment that stays."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Share of the old second moment that stays."""
    eps: float = Field(default=1e-6, gt=0)
    """Least denominator, before the root."""

    def init(
        self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches
    ) -> DAMSGradState:
        """Start at x with zero moments."""
        d = x.shape[1]
        row = comm.alloc(2 * d, x.dtype)
        row[:, :d] = x
        return DAMSGradState(row, torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x))

    def step(
        self, comm: Communicator, oracle: Oracle, state: DAMSGradState, batches: Batches
    ) -> Metrics:
        """One gradient, one exchange of 2 d elements."""
        x, ut, m, v, vh = state.x, state.ut, state.m, state.v, state.vh
        estimate, g = self.estimate(comm, oracle, x, batches[0])
        combine([(self.beta1, m), (1 - self.beta1, g)], out=m)
        combine([(self.beta2, v), (1 - self.beta2, g * g)], out=v)
        vh_old = vh.clone()
        torch.maximum(vh, v, out=vh)
        u = (ut if state.k else vh).clamp(min=self.eps)
        combine([(1.0, ut), (1.0, vh), (-1.0, vh_old)], out=ut)
        comm.neighbor_average(state.row, out=state.row)
        combine([(1.0, x), (-self.optimizer.rate(comm), m / u.sqrt_())], out=x)
        state.k += 1
        return {"loss": estimate.loss, **estimate.metrics}
