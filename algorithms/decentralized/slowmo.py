"""SlowMo: slow momentum around local or gossiping SGD (arXiv:1910.00643)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from gossamer.algorithms.conditions import require_doubly_stochastic
from gossamer.algorithms.decentralized.local_sgd import take_local_steps
from gossamer.algorithms.estimates import Metrics
from gossamer.algorithms.problems import Batches
from gossamer.algorithms.protocols import Algorithm, Optimizer, Oracle
from gossamer.runtime import Communicator, combine
from gossamer.topologies import Topology

__all__ = ["SlowMo", "SlowMoState"]


@dataclass
class SlowMoState:
    """Parameters, and the slow ones.

    Attributes:
        x: (local, d), the parameters.
        x_outer: (local, d), where the ranks last agreed; equal rows.
        u: (local, d), the slow momentum; equal rows.
        optimizer: the inner optimizer's own state.
    """

    x: Tensor
    x_outer: Tensor
    u: Tensor
    optimizer: Any


class SlowMo(Algorithm):
    """SlowMo (arXiv:1910.00643, Alg. 1): every tau updates, a step of slow momentum.

    From x_outer, tau updates of the base method, then with the mean a of all ranks::

        u = beta u + (x_outer - a) / lr;  x_outer -= alpha lr u;  x = x_outer

    Base ``local`` is local SGD: tau updates make one step, the graph is not used. Base ``gossip``
    is DSGD, adapt then combine, on the graph: one update makes a step, W must be doubly
    stochastic. Exchanged: an all-reduce of d elements every tau updates, and with ``gossip`` d to
    each neighbour per update. beta 0, alpha 1 is plain averaging. The inner optimizer's state stays
    on its rank (the paper's "maintain").
    """

    sends: ClassVar[str] = "its parameters"
    name: Literal["slowmo"] = "slowmo"
    tau: int = Field(default=12, ge=1)
    """Updates between two slow ones; 12 is the paper's for local SGD on CIFAR-10."""
    alpha: float = Field(default=1.0, gt=0)
    """Slow learning rate, in multiples of the inner one; 1 as in the official code."""
    beta: float = Field(default=0.7, ge=0, lt=1)
    """Slow momentum; .5 to .7 served in the paper."""
    base: Literal["local", "gossip"] = "local"
    """What happens between: local updates only, or an average with the neighbours after each."""
    optimizer: Optimizer = Field(exclude=True)
    """The inner update; any optimizer."""

    @property
    def batches_per_step(self) -> int:
        """One batch per update."""
        return self.tau if self.base == "local" else 1

    def adapt(self, topology: Topology) -> Topology:
        """Ask for a doubly stochastic W where it is used."""
        if self.base == "local":
            return topology
        return require_doubly_stochastic(self.name, topology)

    def init(self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches) -> SlowMoState:
        """Start at x, everything at rest."""
        return SlowMoState(x, x.clone(), torch.zeros_like(x), self.optimizer.init(x))

    def step(
        self, comm: Communicator, oracle: Oracle, state: SlowMoState, batches: Batches
    ) -> Metrics:
        """Tau gradients and an all-reduce; or one gradient and an average, at times both."""
        x = state.x
        figures = take_local_steps(self.optimizer, comm, oracle, state.optimizer, x, batches)
        if self.base == "gossip":
            comm.neighbor_average(x, out=x)
        if self.base == "local" or (comm.step + 1) % self.tau == 0:
            self._slow_step(comm, state)
        return figures

    def _slow_step(self, comm: Communicator, state: SlowMoState) -> None:
        x_outer, u, lr = state.x_outer, state.u, self.optimizer.rate(comm)
        if lr == 0:  # of a warm-up's first step: how far a move of no length goes is not known
            return
        a = comm.all_reduce(state.x, "mean").expand_as(x_outer)
        moved = combine([(1.0, x_outer), (-1.0, a)])
        combine([(self.beta, u), (1.0 / lr, moved)], out=u)
        combine([(1.0, x_outer), (-self.alpha * lr, u)], out=x_outer)
        state.x.copy_(x_outer)
