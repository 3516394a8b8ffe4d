"""K-GT (arXiv:2301.01313): local steps with a tracked correction."""

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

__all__ = ["KGT"]


@dataclass
class KGTState:
    """The row [x | D] and the correction.

    Attributes:
        row: (local, 2 d): x, and the mean local direction D, which travels with it.
        c: (local, d), the correction; the sum over ranks is 0.
    """

    row: Tensor
    c: Tensor

    @property
    def x(self) -> Tensor:
        """The parameters, a view."""
        return self.row[:, : self.c.shape[1]]

    @property
    def mean_direction(self) -> Tensor:
        """The letter D of the rule, a view."""
        return self.row[:, self.c.shape[1] :]


class KGT(FixedRule):
    """K-GT: K corrected local steps, then one exchange of x and of the mean direction.

    From y = x do K times  y -= lr (g(y) + c);  then, with D = (x - y) / (K lr)::

        c = c - D + W D;  x = W(x - outer_lr K lr D)       (arXiv:2301.01313)

    The corrections sum to 0 over ranks, so local steps on different data do not drift apart. W must
    be doubly stochastic. The outer rate 1 takes the local end point.
    """

    sends: ClassVar[str] = "its parameters and its mean local gradient"
    name: Literal["k-gt"] = "k-gt"
    local_steps: int = Field(default=10, ge=1)
    """K, local updates between two exchanges; each draws a batch."""
    outer_lr: float = Field(default=1.0, gt=0)
    """Share of the local move that x makes."""

    @property
    def batches_per_step(self) -> int:
        """One draw per local update."""
        return self.local_steps

    def init(self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches) -> KGTState:
        """Start at x, uncorrected."""
        d = x.shape[1]
        row = comm.alloc(2 * d, x.dtype)
        row[:, :d] = x
        return KGTState(row=row, c=torch.zeros_like(x))

    def step(
        self, comm: Communicator, oracle: Oracle, state: KGTState, batches: Batches
    ) -> Metrics:
        """K gradients, one exchange of 2 d elements; the loss is that of the first."""
        x, D, c, lr = state.x, state.mean_direction, state.c, self.optimizer.rate(comm)
        y = x.clone()
        estimates = []
        for k in range(self.local_steps):
            estimate, g = self.estimate(comm, oracle, y, batches[k])
            combine([(1.0, y), (-lr, g), (-lr, c)], out=y)
            estimates.append(estimate)
        move = x - y
        combine([(inverse_rate(self.local_steps * lr), move)], out=D)
        combine([(1.0, c), (-1.0, D)], out=c)
        combine([(1.0, x), (-self.outer_lr, move)], out=x)
        comm.neighbor_average(state.row, out=state.row)
        combine([(1.0, c), (1.0, D)], out=c)  # D is W D now
        return {"loss": estimates[0].loss, **estimates[0].metrics}
