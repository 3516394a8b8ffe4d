"""DecentLaM (arXiv:2104.11981): momentum that does not amplify the bias of DSGD."""

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
from gossamer.algorithms.schedules import inverse_rate
from gossamer.runtime import Communicator, combine

__all__ = ["DecentLaM"]


@dataclass
class DecentLaMState:
    """Attributes: x, the (local, d) parameters; m, the (local, d) momentum."""

    x: Tensor
    m: Tensor


class DecentLaM(FixedRule):
    """DecentLaM: heavy ball over the whole move of DSGD, mixing included (arXiv:2104.11981).

    g~ = (x - W(x - lr g)) / lr;  m = beta m + g~;  x = x - lr m

    W must be doubly stochastic; a positive semidefinite one is advised. The fixed point is that of
    DSGD with the same rate, whatever beta.
    """

    sends: ClassVar[str] = "its parameters"
    name: Literal["decentlam"] = "decentlam"
    beta: float = Field(default=0.9, ge=0, lt=1)
    """Share of the old momentum that stays."""

    def init(
        self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches
    ) -> DecentLaMState:
        """Start at x, at rest."""
        return DecentLaMState(x=x, m=torch.zeros_like(x))

    def step(
        self, comm: Communicator, oracle: Oracle, state: DecentLaMState, batches: Batches
    ) -> Metrics:
        """One gradient, one exchange of d elements."""
        x, m, lr = state.x, state.m, self.optimizer.rate(comm)
        estimate, g = self.estimate(comm, oracle, x, batches[0])
        moved = combine([(1.0, x), (-lr, g)])
        comm.neighbor_average(moved, out=moved)
        combine([(self.beta, m), (inverse_rate(lr), x - moved)], out=m)
        combine([(1.0, x), (-lr, m)], out=x)
        return {"loss": estimate.loss, **estimate.metrics}
