"""MT-DSGT: gradient tracking with several, accelerated averages a step (as arXiv:2006.08085)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from gossamer.algorithms.conditions import require_static, require_symmetric
from gossamer.algorithms.decentralized.gradient_tracking import GradientTrackingState
from gossamer.algorithms.estimates import Metrics
from gossamer.algorithms.problems import Batches
from gossamer.algorithms.protocols import Algorithm, Optimizer, Oracle
from gossamer.runtime import Communicator, combine
from gossamer.topologies import Topology, spectrum

__all__ = ["MTDSGT"]


@dataclass
class MTDSGTState(GradientTrackingState):
    """Attributes: as in gradient tracking; a, the weight of the Chebyshev recursion."""

    a: float = 0.0


class MTDSGT(Algorithm):
    """MT-DSGT: gradient tracking with R rounds of Chebyshev gossip in place of one average.

    y = C(y + g - g_old)  (y = g at first);  x = C(x - lr y), where C applies R times

    v_new = (1 + a) W v - a v_old,  a = (1 - s) / (1 + s),  s = sqrt(1 - rho^2),  v_old = v at first

    so that disagreement falls like (1 - sqrt(1 - rho))^R; the mean is kept. W must be one fixed
    symmetric doubly stochastic matrix. The rule is from memory, and not checked against a code.
    """

    sends: ClassVar[str] = "its parameters and its tracked gradient"
    name: Literal["mt-dsgt"] = "mt-dsgt"
    rounds: int = Field(default=2, ge=1)
    """R, averages in place of one."""
    chebyshev: bool = True
    """False: apply W plainly, R times."""
    optimizer: Optimizer = Field(exclude=True)
    """The local update; any optimizer, fed with y."""

    def adapt(self, topology: Topology) -> Topology:
        """Take a fixed symmetric W."""
        return require_static(self.name, require_symmetric(self.name, topology))

    def init(self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches) -> MTDSGTState:
        """Start at x with y = g_old = 0."""
        d = x.shape[1]
        row = comm.alloc(2 * d, x.dtype)
        row[:, :d] = x
        # Rank 0's rho for all: the last bits of an eigensolver's answer may vary.
        rho = torch.full((comm.local, 1), spectrum(comm.topology).rho, dtype=torch.float64)
        agreed = comm.broadcast(rho.to(comm.device), count=False).item()
        s = math.sqrt(max(0.0, 1.0 - agreed * agreed))
        return MTDSGTState(
            row=row,
            g_old=torch.zeros_like(x),
            optimizer=self.optimizer.init(row[:, :d]),
            a=(1.0 - s) / (1.0 + s),
        )

    def step(
        self, comm: Communicator, oracle: Oracle, state: MTDSGTState, batches: Batches
    ) -> Metrics:
        """One gradient, 2 R messages of d elements."""
        x, y, g_old = state.x, state.y, state.g_old
        estimate = oracle(x, batches[0])
        combine([(1.0, y), (1.0, estimate.grad), (-1.0, g_old)], out=y)
        if state.k > 0:
            self._gossip_(comm, state, y)
        self.optimizer.update_(state.optimizer, x, y, comm)
        self._gossip_(comm, state, x)
        g_old.copy_(estimate.grad)
        state.k += 1
        return {"loss": estimate.loss, **estimate.metrics}

    def _gossip_(self, comm: Communicator, state: MTDSGTState, v: Tensor) -> None:
        """``v = C v``, in place."""
        if not self.chebyshev:
            comm.neighbor_average(v, out=v, rounds=self.rounds)
            return
        old, new = v, v.clone()
        for _ in range(self.rounds):
            mixed = comm.neighbor_average(new)
            old, new = new, combine([(1.0 + state.a, mixed), (-state.a, old)], out=mixed)
        v.copy_(new)
