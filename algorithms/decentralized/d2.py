"""D2 (arXiv:1803.07068), also Exact Diffusion (arXiv:1702.05122), and EDM, its momentum form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from gossamer.algorithms.conditions import Lazy, lazy_above, require_static, require_symmetric
from gossamer.algorithms.decentralized.fixed_rule import FixedRule
from gossamer.algorithms.estimates import Metrics
from gossamer.algorithms.problems import Batches
from gossamer.algorithms.protocols import Oracle
from gossamer.runtime import Communicator, combine
from gossamer.topologies import Topology

__all__ = ["D2", "EDM"]


@dataclass
class D2State:
    """Attributes: x, the (local, d) parameters; psi, the (local, d) last adapted point."""

    x: Tensor
    psi: Tensor


class D2(FixedRule):
    """D2 / Exact Diffusion: DSGD with its last move added back; different data leave no bias.

    psi = x - lr g;  x = W(psi + x - psi_old), with psi_old = x0 at first

    which is x+ = W(2 x - x_old - lr g + lr_old g_old), the form of the paper, at half its state.
    W must be one fixed symmetric matrix with lambda_min(W) > -1/3 (a ring of even size sits on
    -1/3), else the iterates diverge; (I + W) / 2 always qualifies, and has the same limit.
    """

    sends: ClassVar[str] = "its parameters"
    name: Literal["d2"] = "d2"
    lazy: Lazy = "auto"
    """``auto``: W if lambda_min(W) > -1/3, else (I + W) / 2 with a warning; ``never``: refuse."""

    def adapt(self, topology: Topology) -> Topology:
        """Take a fixed symmetric W, made lazy where lambda_min asks for it."""
        require_static(self.name, require_symmetric(self.name, topology))
        return lazy_above(self.name, topology, -1 / 3, self.lazy)

    def init(self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches) -> D2State:
        """Start at x with psi = x."""
        return D2State(x=x, psi=x.clone())

    def step(self, comm: Communicator, oracle: Oracle, state: D2State, batches: Batches) -> Metrics:
        """One gradient, one exchange of d elements."""
        estimate, g = self.estimate(comm, oracle, state.x, batches[0])
        exact_diffusion_(comm, state.x, state.psi, self.optimizer.rate(comm), g)
        return {"loss": estimate.loss, **estimate.metrics}


def exact_diffusion_(comm: Communicator, x: Tensor, psi: Tensor, lr: float, g: Tensor) -> None:
    """``psi+ = x - lr g; x = W(psi+ + x - psi); psi = psi+``, in place."""
    adapted = combine([(1.0, x), (-lr, g)])
    combine([(1.0, adapted), (1.0, x), (-1.0, psi)], out=x)
    comm.neighbor_average(x, out=x)
    psi.copy_(adapted)


@dataclass
class EDMState(D2State):
    """Attributes: x and psi as in D2; m, the (local, d) momentum."""

    m: Tensor


class EDM(FixedRule):
    """EDM: Exact Diffusion with momentum.

    m = beta m + (1 - beta) g;  psi = x - lr m;  x = Wl(psi + x - psi_old),  Wl = (I + W) / 2

    Needs what D2 needs of W. With beta = 0 it is D2 on the same matrix. The rule is from a survey;
    its own code was not found.
    """

    sends: ClassVar[str] = "its parameters"
    name: Literal["edm"] = "edm"
    beta: float = Field(default=0.9, ge=0, lt=1)
    """Share of the old momentum that stays."""
    lazy: Lazy = "always"
    """``always``, the rule's: (I + W) / 2; ``auto``: W where lambda_min(W) > -1/3."""

    def adapt(self, topology: Topology) -> Topology:
        """Take a fixed symmetric W and make it lazy."""
        require_static(self.name, require_symmetric(self.name, topology))
        return lazy_above(self.name, topology, -1 / 3, self.lazy)

    def init(self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches) -> EDMState:
        """Start at x with psi = x, at rest."""
        return EDMState(x=x, psi=x.clone(), m=torch.zeros_like(x))

    def step(
        self, comm: Communicator, oracle: Oracle, state: EDMState, batches: Batches
    ) -> Metrics:
        """One gradient, one exchange of d elements."""
        estimate, g = self.estimate(comm, oracle, state.x, batches[0])
        combine([(self.beta, state.m), (1.0 - self.beta, g)], out=state.m)
        exact_diffusion_(comm, state.x, state.psi, self.optimizer.rate(comm), state.m)
        return {"loss": estimate.loss, **estimate.metrics}
