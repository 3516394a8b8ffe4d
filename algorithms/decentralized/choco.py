"""CHOCO-SGD: compressed differences of public copies (arXiv:1902.00340, arXiv:1907.09356)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from gossamer.algorithms.conditions import require_doubly_stochastic, require_static
from gossamer.algorithms.decentralized.compressors import Contraction, TopK
from gossamer.algorithms.decentralized.diagonal import self_weights
from gossamer.algorithms.estimates import Metrics
from gossamer.algorithms.problems import Batches
from gossamer.algorithms.protocols import Algorithm, Optimizer, Oracle
from gossamer.runtime import Communicator, Messages, combine
from gossamer.topologies import Topology

__all__ = ["Choco", "ChocoState"]


@dataclass
class ChocoState:
    """Parameters and public copies.

    Attributes:
        x: (local, d), the parameters.
        h: (local, d), the public copy of x: what the neighbours know of it.
        s: (local, d), sum_j w_ij h_j over the rank itself and its neighbours, kept as a running
            sum in place of a copy per neighbour; in order B without what ``message`` will bring.
        message: (local, bytes) uint8, order B: C(x - h) of the last step, which travels in this
            one.
        optimizer: the optimizer's own state.
    """

    x: Tensor
    h: Tensor
    s: Tensor
    message: Tensor | None
    optimizer: Any


class Choco(Algorithm):
    """CHOCO-SGD: gossip public copies, send only the compressed change of one's own.

    With a compressor C and h_j = 0 at first, both orders start with the local step
    x = x - lr direction(g(x)); then::

        A (arXiv:1902.00340):  q = C(x - h);  h += q for self and neighbours;  x += gamma (s - h)
        B (arXiv:1907.09356):  x += gamma (s - h) with the old h;  q = C(x - h);  h += q

    where s_i = sum_j w_ij h_j. B, which the official codes use, does not need the neighbours' q
    until the next average: it travels while the next gradient is computed. C must be a contraction,
    E ||C(v) - v||^2 <= (1 - delta) ||v||^2. W must be doubly stochastic and fixed, since s is kept
    as a running sum. Order A with the identity and gamma 1 is DSGD, adapt then combine. The
    compressor works on each parameter tensor by itself.
    """

    sends: ClassVar[str] = "compressed changes of its parameters"
    name: Literal["choco"] = "choco"
    compressor: Contraction = TopK()
    """What is sent of a difference: top-k, random-k, sign, qsgd or identity, with its options."""
    gamma: float = Field(default=0.2, gt=0, le=1)
    """Consensus step. The theory's bound is far below what works; tune .1 to .6 (as measured: .1
    for a random tenth, .2 for a top tenth, .4 for sign, .6 for qsgd; less if it diverges)."""
    order: Literal["A", "B"] = "B"
    """A: exchange, then average. B: average with the old copies, then exchange."""
    optimizer: Optimizer = Field(exclude=True)
    """The local update; any optimizer."""

    @property
    def defers(self) -> bool:
        """Yes."""
        return True

    def adapt(self, topology: Topology) -> Topology:
        """Ask for a fixed, doubly stochastic W."""
        return require_static(self.name, require_doubly_stochastic(self.name, topology))

    def init(self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches) -> ChocoState:
        """Start at x; all public copies are 0, and so is what order B sends first."""
        h = torch.zeros_like(x)
        message = self.compressor.pack(comm, oracle.layout, h) if self.order == "B" else None
        return ChocoState(
            x=x, h=h, s=torch.zeros_like(x), message=message, optimizer=self.optimizer.init(x)
        )

    def step(
        self, comm: Communicator, oracle: Oracle, state: ChocoState, batches: Batches
    ) -> Metrics:
        """One gradient, one compressed message to each neighbour."""
        x, sent = state.x, state.message
        arriving = None if sent is None else comm.neighbor_gather_async(sent)
        estimate = oracle.deferred(x, batches[0])  # B: while the last step's message travels
        self.optimizer.apply_(state.optimizer, x, estimate.grad, comm, estimate.origin)
        if arriving is None:
            message = self._change(comm, oracle, state)
            self._hear(comm, oracle, state, comm.neighbor_gather(message), comm.step)
            self._approach(state)
        else:
            self._hear(comm, oracle, state, arriving.wait(), max(0, comm.step - 1))
            self._approach(state)
            state.message = self._change(comm, oracle, state)
        return {"loss": estimate.loss, **estimate.metrics}

    def _approach(self, state: ChocoState) -> None:
        """``x += gamma * sum_j w_ij (h_j - h_i)``."""
        combine([(1.0, state.x), (self.gamma, state.s), (-self.gamma, state.h)], out=state.x)

    def _change(self, comm: Communicator, oracle: Oracle, state: ChocoState) -> Tensor:
        """``q = C(x - h); h += q; s += w_ii q``; return the message that brings q to others."""
        difference = combine([(1.0, state.x), (-1.0, state.h)])
        message = self.compressor.pack(comm, oracle.layout, difference)
        q = self.compressor.unpack(comm, oracle.layout, message, comm.ranks)
        combine([(1.0, state.h), (1.0, q)], out=state.h)
        combine([(1.0, state.s), (self_weights(comm), q)], out=state.s)
        return message

    def _hear(
        self, comm: Communicator, oracle: Oracle, state: ChocoState, heard: Messages, step: int
    ) -> None:
        """``s += sum_j w_ij q_j`` over the neighbours, whose q are of ``step``."""
        senders = heard.source.tolist()
        q = self.compressor.unpack(comm, oracle.layout, heard.values, senders, step)
        combine(
            [(1.0, state.s), (1.0, heard.weighted_sum(q, torch.zeros_like(state.s)))], out=state.s
        )
