"""The baselines of the D-NASA paper as its code runs them (arXiv:2402.08821, decen_mpi4py).

They differ from the textbook forms, so figures of that paper are reproduced with these. ``form:
network`` is its neural-network code, whose local losses carry a factor 1/n: the rate that reaches
the mean loss is lr / n. ``form: synthetic`` is its streaming least-squares code, which takes the
gradient before the exchange and uses it one step late. The rates of both are spelt with the
optimizer: lr / sqrt(k), k from 1, is ``schedule: sqrt``; lr * sqrt(n / k) is that with lr *
sqrt(n). W must be doubly stochastic (the code's own random graph is not).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from gossamer.algorithms.decentralized.fixed_rule import FixedRule
from gossamer.algorithms.decentralized.gradient_tracking import previous_round
from gossamer.algorithms.estimates import Metrics
from gossamer.algorithms.problems import Batches
from gossamer.algorithms.protocols import Oracle
from gossamer.algorithms.schedules import horizon
from gossamer.runtime import Communicator, combine

__all__ = ["DASAGT", "OfficialDSGD", "OfficialDSGT"]


@dataclass
class OfficialState:
    """The parameters, the direction and the last gradient.

    Attributes:
        x: (local, d).
        v: (local, d), the gradient or, tracked, its estimate of the mean.
        g_old: (local, d), the last gradient; None without tracking.
    """

    x: Tensor
    v: Tensor
    g_old: Tensor | None


class _Official(FixedRule):
    tracks: ClassVar[bool]
    form: Literal["network", "synthetic"] = "network"
    """Which of the authors' two programs."""

    def init(
        self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches
    ) -> OfficialState:
        """Start at x with v = g_old = 0."""
        g_old = torch.zeros_like(x) if self.tracks else None
        return OfficialState(x=x, v=torch.zeros_like(x), g_old=g_old)

    def step(
        self, comm: Communicator, oracle: Oracle, state: OfficialState, batches: Batches
    ) -> Metrics:
        """One gradient; x travels twice (network) or once, the tracker once."""
        x, v, g_old, lr = state.x, state.v, state.g_old, self.optimizer.rate(comm)
        if self.form == "network":
            mixing = comm.neighbor_average_async(x)
            estimate, g = self.estimate(comm, oracle, x, batches[0])  # while x travels
            if g_old is None:
                v.copy_(g)
            else:
                with previous_round(comm):
                    comm.neighbor_average(v, out=v)  # 0 before the first step
                combine([(1.0, v), (1.0, g), (-1.0, g_old)], out=v)
                g_old.copy_(g)
            moved = combine([(1.0, mixing.wait()), (-lr / comm.n, v)])
            comm.neighbor_average(moved, out=x)
        else:
            x_half = combine([(1.0, x), (-lr, v)])
            mixing = comm.neighbor_average_async(x_half, out=x)
            estimate, g = self.estimate(comm, oracle, x_half, batches[0])  # while x_half travels
            if g_old is None:
                v.copy_(g)
            else:
                combine([(1.0, v), (1.0, g), (-1.0, g_old)], out=v)
                comm.neighbor_average(v, out=v)
                g_old.copy_(g)
            mixing.wait()
        return {"loss": estimate.loss, **estimate.metrics}


class OfficialDSGD(_Official):
    """DSGD as the D-NASA paper ran it: x travels twice a step.

    network: y = g(x);  x = W(W x - lr / n * y).  synthetic: xh = x - lr v;  v = g(xh);  x = W xh
    """

    tracks: ClassVar[bool] = False
    sends: ClassVar[str] = "its parameters"
    name: Literal["official-dsgd"] = "official-dsgd"


class OfficialDSGT(_Official):
    """DSGT as the D-NASA paper ran it: x travels twice a step.

    network: y = W y + g(x) - g_old (y = g at first);  x = W(W x - lr / n * y).
    synthetic: xh = x - lr v;  v = W(v + g(xh) - g_old);  x = W xh
    """

    tracks: ClassVar[bool] = True
    sends: ClassVar[str] = "its parameters and its tracked gradient"
    name: Literal["official-dsgt"] = "official-dsgt"


@dataclass
class DASAGTState:
    """Attributes: row, (local, 2 d), is [x | z]; d, the length of one part."""

    row: Tensor
    d: int

    @property
    def x(self) -> Tensor:
        """The parameters, a view."""
        return self.row[:, : self.d]

    @property
    def z(self) -> Tensor:
        """The moving average of gradients, a view."""
        return self.row[:, self.d :]


class DASAGT(FixedRule):
    """D-ASAGT (Prox-DASA-GT without its prox, arXiv:2302.09766) as the D-NASA paper ran it.

    network: x = W((1 - a_k) x + a_k (x - lr / n * z));  z = W((1 - a_k) z + a_k g(x)), both from
    the old x and z, a_k = a min(1, sqrt(n / k)), k from 1.
    synthetic: xh = x - lr z;  z = W((1 - a_k) z + a_k g(xh));  x = W xh, a_k = a sqrt(n / k)
    """

    sends: ClassVar[str] = "its parameters and its moving average of gradients"
    name: Literal["d-asagt"] = "d-asagt"
    form: Literal["network", "synthetic"] = "network"
    """Which of the authors' two programs."""
    a: float | None = Field(default=None, gt=0)
    """Base of the averaging weight; None: 0.3 (network) or 1 (synthetic), the authors'."""
    schedule: Literal["diminishing", "constant"] = "diminishing"
    """a_k falls with the step k, or is that of the horizon (k = T)."""

    def init(self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches) -> DASAGTState:
        """Start at x with z = 0."""
        d = x.shape[1]
        row = comm.alloc(2 * d, x.dtype)
        row[:, :d] = x
        return DASAGTState(row=row, d=d)

    def step(
        self, comm: Communicator, oracle: Oracle, state: DASAGTState, batches: Batches
    ) -> Metrics:
        """One gradient, one exchange of [x | z] (network) or of each apart."""
        x, z, lr, a = state.x, state.z, self.optimizer.rate(comm), self._weight(comm)
        if self.form == "network":
            estimate, g = self.estimate(comm, oracle, x, batches[0])
            combine([(1.0, x), (-a * lr / comm.n, z)], out=x)
            combine([(1.0 - a, z), (a, g)], out=z)
            comm.neighbor_average(state.row, out=state.row)
        else:
            x_half = combine([(1.0, x), (-lr, z)])
            mixing = comm.neighbor_average_async(x_half, out=x)
            estimate, g = self.estimate(comm, oracle, x_half, batches[0])  # while x_half travels
            combine([(1.0 - a, z), (a, g)], out=z)
            comm.neighbor_average(z, out=z)
            mixing.wait()
        return {"loss": estimate.loss, **estimate.metrics}

    def _weight(self, comm: Communicator) -> float:
        constant = self.schedule == "constant"
        k = horizon(comm, "algorithm.schedule: constant") if constant else comm.step + 1
        share = math.sqrt(comm.n / k)
        if self.form == "synthetic":
            return share if self.a is None else self.a * share
        return (0.3 if self.a is None else self.a) * min(1.0, share)
