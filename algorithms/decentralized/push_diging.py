"""Push-DIGing: gradient tracking over directed graphs (arXiv:1607.03218)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gossamer.algorithms.conditions import require_column_stochastic, require_own_weight
from gossamer.algorithms.decentralized.fixed_rule import FixedRule
from gossamer.algorithms.estimates import Metrics
from gossamer.algorithms.problems import Batches
from gossamer.algorithms.protocols import Oracle
from gossamer.runtime import Communicator, combine
from gossamer.topologies import Topology

__all__ = ["PushDIGing", "PushDIGingState"]


@dataclass
class PushDIGingState:
    """The exchanged row [u | y | v] and what stays local.

    Attributes:
        x: (local, d), u / v: where gradients are taken and what is evaluated.
        row: (local, 2 d + 1), biased parameters u, mixed tracker P y, push-sum weight v.
        g_old: (local, d), the last gradient, on its own examples.
    """

    x: Tensor
    row: Tensor
    g_old: Tensor

    @property
    def u(self) -> Tensor:
        """The biased parameters, a view."""
        return self.row[:, : self.x.shape[1]]

    @property
    def y(self) -> Tensor:
        """The tracker, a view; between steps already mixed."""
        return self.row[:, self.x.shape[1] : -1]

    @property
    def v(self) -> Tensor:
        """The push-sum weight, a view (local, 1)."""
        return self.row[:, -1:]


class PushDIGing(FixedRule):
    """Push-DIGing (arXiv:1607.03218, Alg. 2): the exact limit on directed and changing graphs.

    With a column-stochastic P and g the gradient at x = u / v::

        y = P y + g - g_old  (y = g at first)
        u = P (u - lr y);  v = P v;  x = u / v        v = 1 at first

    sum y = sum g, sum u and sum v = n are kept. The rounds must connect all ranks and each rank
    keeps a share (p_ii > 0). P y is formed in the step before, with the P of that step as in the
    paper, so that u, y and v travel as one message of 2 d + 1 elements.
    """

    sends: ClassVar[str] = "its parameters, its tracked gradient and its push-sum weight"
    name: Literal["push-diging"] = "push-diging"

    def adapt(self, topology: Topology) -> Topology:
        """Ask for a column-stochastic W where every rank keeps a share."""
        return require_own_weight(self.name, require_column_stochastic(self.name, topology))

    def init(
        self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches
    ) -> PushDIGingState:
        """Start at x with y = g_old = 0 and weight 1."""
        state = PushDIGingState(x, comm.alloc(2 * x.shape[1] + 1, x.dtype), torch.zeros_like(x))
        state.u.copy_(x)
        state.v.fill_(1.0)
        return state

    def step(
        self, comm: Communicator, oracle: Oracle, state: PushDIGingState, batches: Batches
    ) -> Metrics:
        """One gradient at x, one exchange of 2 d + 1 elements."""
        x, u, y, v, g_old = state.x, state.u, state.y, state.v, state.g_old
        estimate, g = self.estimate(comm, oracle, x, batches[0])
        combine([(1.0, y), (1.0, g), (-1.0, g_old)], out=y)
        g_old.copy_(g)
        combine([(1.0, u), (-self.optimizer.rate(comm), y)], out=u)
        comm.neighbor_average(state.row, out=state.row)
        torch.div(u, v, out=x)
        return {"loss": estimate.loss, **estimate.metrics}
