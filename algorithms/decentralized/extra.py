"""EXTRA (arXiv:1404.6264): exact first-order consensus optimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gossamer.algorithms.conditions import require_lambda_min, require_static, require_symmetric
from gossamer.algorithms.decentralized.fixed_rule import FixedRule
from gossamer.algorithms.estimates import Metrics
from gossamer.algorithms.problems import Batches
from gossamer.algorithms.protocols import Oracle
from gossamer.runtime import Communicator, combine
from gossamer.topologies import Topology

__all__ = ["Extra"]


@dataclass
class ExtraState:
    """Attributes: x, the (local, d) parameters; s, the (local, d) sum of (x - W x) / 2 so far."""

    x: Tensor
    s: Tensor


class Extra(FixedRule):
    """EXTRA: DSGD-CTA corrected by the sum of its disagreements (arXiv:1404.6264, Eq. 2.13).

    x+ = W x - lr g - s;  s = s + (x - W x) / 2

    which is x1 = W x0 - lr g0; x+ = (I + W) x - (I + W) / 2 x_old - lr g + lr_old g_old, the form
    with two steps' memory. W must be one fixed symmetric matrix with lambda_min(W) > -1. W x
    travels while the gradient is computed.
    """

    sends: ClassVar[str] = "its parameters"
    name: Literal["extra"] = "extra"

    def adapt(self, topology: Topology) -> Topology:
        """Take a fixed symmetric W with lambda_min > -1."""
        require_static(self.name, require_symmetric(self.name, topology))
        return require_lambda_min(self.name, topology, -1.0)

    def init(self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches) -> ExtraState:
        """Start at x with s = 0."""
        return ExtraState(x=x, s=torch.zeros_like(x))

    def step(
        self, comm: Communicator, oracle: Oracle, state: ExtraState, batches: Batches
    ) -> Metrics:
        """One gradient, one exchange of d elements beside it."""
        x, s = state.x, state.s
        mixing = comm.neighbor_average_async(x)
        estimate, g = self.estimate(comm, oracle, x, batches[0])  # while x travels
        wx, lr = mixing.wait(), self.optimizer.rate(comm)
        moved = combine([(1.0, wx), (-lr, g), (-1.0, s)])
        combine([(1.0, s), (0.5, x), (-0.5, wx)], out=s)
        x.copy_(moved)
        return {"loss": estimate.loss, **estimate.metrics}
