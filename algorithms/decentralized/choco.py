"""CHOCO-SGD: compressed differences of public copies (arXiv:1902.00340, arXiv:1907.09356)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from gossamer.algorithms.conditions import require_doubly_stochastic, require_static
from gossamer.algorithms.decentralized.compressors import (
    Contraction,
    TopK,
    average_compressed,
)
from gossamer.algorithms.decentralized.diagonal import self_weights
from gossamer.algorithms.protocols import Algorithm, Batches, Metrics, Optimizer, Oracle
from gossamer.runtime import Communicator, combine
from gossamer.topologies import Topology

__all__ = ["Choco", "ChocoState"]


@dataclass
class ChocoState:
    """Parameters and public copies.

    Attributes:
        x: (local, d), the parameters.
        h: (local, d), the public copy of x: what the neighbours know of it.
        s: (local, d), sum_j w_ij h_j over the rank itself and its neighbours, kept as a running
            sum in place of a copy per neighbour.
        optimizer: the optimizer's own state.
    """

    x: Tensor
    h: Tensor
    s: Tensor
    optimizer: Any


class Choco(Algorithm):
    """CHOCO-SGD: gossip public copies, send only the compressed change of one's own.

    With a compressor C and h_j = 0 at first, both orders start with the local step
    x = x - lr direction(g(x)); then::

        A (arXiv:1902.00340):  q = C(x - h);  h += q for self and neighbours;  x += gamma (s - h)
        B (arXiv:1907.09356):  x += gamma (s - h) with the old h;  q = C(x - h);  h += q

    where s_i = sum_j w_ij h_j. B, which the official codes use, does not need q until the next
    step's end. C must be a contraction, E ||C(v) - v||^2 <= (1 - delta) ||v||^2. W must be doubly
    stochastic and fixed, since s is kept as a running sum. Order A with the identity and gamma 1 is
    DSGD, adapt then combine. The compressor works on each parameter tensor by itself.
    """

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

    def adapt(self, topology: Topology) -> Topology:
        """Ask for a fixed, doubly stochastic W."""
        return require_static(self.name, require_doubly_stochastic(self.name, topology))

    def init(self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches) -> ChocoState:
        """Start at x; all public copies are 0."""
        zeros = torch.zeros_like
        return ChocoState(x=x, h=zeros(x), s=zeros(x), optimizer=self.optimizer.init(x))

    def step(
        self, comm: Communicator, oracle: Oracle, state: ChocoState, batches: Batches
    ) -> Metrics:
        """One gradient, one compressed message to each neighbour."""
        x = state.x
        estimate = oracle(x, batches[0])
        self.optimizer.update_(state.optimizer, x, estimate.grad, comm)
        if self.order == "A":
            self._publish(comm, oracle, state)
            self._approach(state)
        else:
            self._approach(state)
            self._publish(comm, oracle, state)
        return {"loss": estimate.loss, **estimate.metrics}

    def _approach(self, state: ChocoState) -> None:
        """``x += gamma * sum_j w_ij (h_j - h_i)``."""
        combine([(1.0, state.x), (self.gamma, state.s), (-self.gamma, state.h)], out=state.x)

    def _publish(self, comm: Communicator, oracle: Oracle, state: ChocoState) -> None:
        """``q = C(x - h); h += q``, here and at the neighbours: ``s += W q``."""
        h, s = state.h, state.s
        difference = combine([(1.0, state.x), (-1.0, h)])
        q, heard = average_compressed(self.compressor, comm, oracle.layout, difference)
        combine([(1.0, h), (1.0, q)], out=h)
        combine([(1.0, s), (self_weights(comm), q), (1.0, heard)], out=s)
