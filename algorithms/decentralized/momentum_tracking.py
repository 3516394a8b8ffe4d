"""Momentum tracking (arXiv:2209.15505): momentum without the bias of different data."""

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

__all__ = ["MomentumTracking"]


@dataclass
class MomentumTrackingState:
    """The row [x | p] and what stays local.

    Attributes:
        row: (local, 2 d): x and p = u - c, which travel together.
        u: (local, d), the momentum.
        c: (local, d), the correction; the sum over ranks is 0.
    """

    row: Tensor
    u: Tensor
    c: Tensor

    @property
    def x(self) -> Tensor:
        """The parameters, a view."""
        return self.row[:, : self.u.shape[1]]

    @property
    def p(self) -> Tensor:
        """The corrected momentum, a view."""
        return self.row[:, self.u.shape[1] :]


class MomentumTracking(FixedRule):
    """Momentum tracking: each rank steps along its momentum minus a tracked correction.

    u = beta u + g;  x = W x - lr (u - c);  c = W(c - u) + u   (arXiv:2209.15505)

    The sum of c over ranks stays 0. W must be doubly stochastic. c starts at 0; the authors' code
    starts it at the momentum's difference from the mean, at the price of an all-reduce.
    """

    sends: ClassVar[str] = "its parameters and its corrected momentum"
    name: Literal["momentum-tracking"] = "momentum-tracking"
    beta: float = Field(default=0.9, ge=0, lt=1)
    """Share of the old momentum that stays."""

    def init(
        self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches
    ) -> MomentumTrackingState:
        """Start at x, at rest, uncorrected."""
        d = x.shape[1]
        row = comm.alloc(2 * d, x.dtype)
        row[:, :d] = x
        return MomentumTrackingState(row=row, u=torch.zeros_like(x), c=torch.zeros_like(x))

    def step(
        self, comm: Communicator, oracle: Oracle, state: MomentumTrackingState, batches: Batches
    ) -> Metrics:
        """One gradient, one exchange of 2 d elements."""
        x, p, u, c = state.x, state.p, state.u, state.c
        estimate, g = self.estimate(comm, oracle, x, batches[0])
        combine([(self.beta, u), (1.0, g)], out=u)
        combine([(1.0, u), (-1.0, c)], out=p)
        d, mixed = x.shape[1], comm.neighbor_average(state.row)
        wx, wp = mixed[:, :d], mixed[:, d:]
        combine([(1.0, wx), (-self.optimizer.rate(comm), p)], out=x)
        combine([(1.0, u), (-1.0, wp)], out=c)  # W(c - u) + u
        return {"loss": estimate.loss, **estimate.metrics}
