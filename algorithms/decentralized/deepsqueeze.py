"""DeepSqueeze: compressed gossip with error compensation (arXiv:1907.07346)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from gossamer.algorithms.decentralized.compressors import (
    Contraction,
    TopK,
    average_compressed,
)
from gossamer.algorithms.decentralized.diagonal import self_weights
from gossamer.algorithms.estimates import Metrics
from gossamer.algorithms.problems import Batches
from gossamer.algorithms.protocols import Algorithm, Optimizer, Oracle
from gossamer.runtime import Communicator, combine

__all__ = ["DeepSqueeze", "DeepSqueezeState"]


@dataclass
class DeepSqueezeState:
    """Parameters and compression errors.

    Attributes:
        x: (local, d), the parameters.
        e: (local, d), what compression has left unsaid.
        optimizer: the optimizer's own state.
    """

    x: Tensor
    e: Tensor
    optimizer: Any


class DeepSqueeze(Algorithm):
    """DeepSqueeze (arXiv:1907.07346, Alg. 1): send compressed parameters, carry the error along.

    With a compressor C and e = 0 at first::

        xh = x - lr direction(g(x))
        v = xh + e;  q = C(v);  e = v - q
        x = xh + gamma sum_j (w_ij - [i = j]) q_j

    W must be doubly stochastic and may change over time. Unlike CHOCO the parameters themselves are
    compressed, not their change: the error does not vanish, and gamma must be small for coarse
    compressors. The compressor works on each parameter tensor by itself.
    """

    sends: ClassVar[str] = "its compressed parameters"
    name: Literal["deepsqueeze"] = "deepsqueeze"
    compressor: Contraction = TopK()
    """What is sent: top-k, random-k, sign, qsgd or identity, with its options."""
    gamma: float = Field(default=0.1, gt=0, le=1)
    """Consensus step; tune it together with the compressor."""
    optimizer: Optimizer = Field(exclude=True)
    """The local update; any optimizer."""

    @property
    def defers(self) -> bool:
        """Yes."""
        return True

    def init(
        self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches
    ) -> DeepSqueezeState:
        """Start at x without error."""
        return DeepSqueezeState(x=x, e=torch.zeros_like(x), optimizer=self.optimizer.init(x))

    def step(
        self, comm: Communicator, oracle: Oracle, state: DeepSqueezeState, batches: Batches
    ) -> Metrics:
        """One gradient, one compressed message to each neighbour."""
        x, e = state.x, state.e
        estimate = oracle.deferred(x, batches[0])
        self.optimizer.apply_(state.optimizer, x, estimate.grad, comm, estimate.origin)
        v = combine([(1.0, x), (1.0, e)])
        q, heard = average_compressed(self.compressor, comm, oracle.layout, v)
        combine([(1.0, v), (-1.0, q)], out=e)
        own = self.gamma * (self_weights(comm) - 1)
        combine([(1.0, x), (own, q), (self.gamma, heard)], out=x)
        return {"loss": estimate.loss, **estimate.metrics}
