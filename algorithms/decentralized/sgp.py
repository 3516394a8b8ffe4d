"""SGP: stochastic gradient push over directed graphs (arXiv:1811.10792)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from gossamer.algorithms.conditions import require_column_stochastic, require_own_weight
from gossamer.algorithms.decentralized.diagonal import self_weights
from gossamer.algorithms.estimates import Metrics
from gossamer.algorithms.problems import Batches
from gossamer.algorithms.protocols import Algorithm, Optimizer, Oracle
from gossamer.runtime import Communicator, combine
from gossamer.topologies import Topology

__all__ = ["SGP", "SGPState"]


@dataclass
class SGPState:
    """The exchanged row [x | w] and the point behind it.

    Attributes:
        x: (local, d), z = x / w: where gradients are taken and what is evaluated.
        row: (local, d + 1), the biased parameters x and the push-sum weight w: one message.
        sent: (local, d + 1), the row of the last step, still travelling; only with overlap.
        optimizer: the optimizer's own state.
    """

    x: Tensor
    row: Tensor
    sent: Tensor | None
    optimizer: Any


class SGP(Algorithm):
    """Stochastic gradient push (arXiv:1811.10792, Alg. 1), for directed and changing graphs.

    With a column-stochastic P (each rank sorts out what it sends, nobody what it receives)::

        x = P (x - lr direction(g(z)));  w = P w;  z = x / w        w = 1 at first

    sum x and sum w are kept, so z tends to the true mean on any graph whose rounds connect all
    ranks and where each keeps a share (p_ii > 0); gradients and evaluation are at z. If P is doubly
    stochastic, w = 1 and this is DSGD, adapt then combine. One message of d + 1 elements. With
    ``optimizer: momentum`` the momentum moves x along gradients at z, as in the paper.

    ``overlap`` is OSGP with staleness 1: a message travels during the next gradient and is added
    one step late, while the share p_ii stays; the mass on its way counts in the conserved sums.
    Unlike the official code w always travels, also where it is known to be 1.
    """

    sends: ClassVar[str] = "its parameters and its push-sum weight"
    name: Literal["sgp"] = "sgp"
    overlap: bool = False
    """Let a message travel during the next gradient; it arrives one step late (OSGP)."""
    optimizer: Optimizer = Field(exclude=True)
    """The local update; any optimizer."""

    def adapt(self, topology: Topology) -> Topology:
        """Ask for a column-stochastic W where every rank keeps a share."""
        return require_own_weight(self.name, require_column_stochastic(self.name, topology))

    def init(self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches) -> SGPState:
        """Start at x with weight 1, nothing on its way."""
        d = x.shape[1]
        row = comm.alloc(d + 1, x.dtype)
        row[:, :d] = x
        row[:, d:] = 1.0
        sent = comm.alloc(d + 1, x.dtype) if self.overlap else None
        return SGPState(x=x, row=row, sent=sent, optimizer=self.optimizer.init(x))

    def step(
        self, comm: Communicator, oracle: Oracle, state: SGPState, batches: Batches
    ) -> Metrics:
        """One gradient at z, one exchange of d + 1 elements."""
        z, row = state.x, state.row
        x, w = row[:, :-1], row[:, -1:]
        arriving = None if state.sent is None else comm.neighbor_average_async(state.sent)
        estimate = oracle(z, batches[0])  # meanwhile the last step's row travels
        direction = self.optimizer.direction(
            state.optimizer, z, estimate.grad, comm, estimate.origin
        )
        combine([(1.0, x), (-self.optimizer.rate(comm), direction)], out=x)
        if arriving is None or state.sent is None:
            comm.neighbor_average(row, out=row)
        else:
            _keep_and_add(comm, row, state.sent, arriving.wait())
        torch.div(x, w, out=z)
        return {"loss": estimate.loss, **estimate.metrics}


def _keep_and_add(comm: Communicator, row: Tensor, sent: Tensor, mixed: Tensor) -> None:
    """Keep the own share of ``row``, add what arrived; ``sent`` becomes what travels next.

    ``mixed`` is P(t) sent, of which the own share was kept a step ago. The share kept now is that
    of the round in which the rest will travel, so that no mass is lost when P changes.
    """
    now, next_ = self_weights(comm), self_weights(comm, ahead=1)
    kept = combine([(next_, row), (1.0, mixed), (-now, sent)])
    sent.copy_(row)
    row.copy_(kept)
