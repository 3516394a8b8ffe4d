"""DiLoCo: many inner AdamW steps, one outer Nesterov step (arXiv:2311.08105)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from gossamer.algorithms.decentralized.local_sgd import take_local_steps
from gossamer.algorithms.estimates import Metrics
from gossamer.algorithms.problems import Batches
from gossamer.algorithms.protocols import Algorithm, Optimizer, Oracle
from gossamer.runtime import Communicator, combine
from gossamer.topologies import Topology

__all__ = ["DiLoCo", "DiLoCoState"]


@dataclass
class DiLoCoState:
    """Parameters, and the outer ones.

    Attributes:
        x: (local, d), the parameters; equal rows after a step.
        x_outer: (local, d), where the ranks last agreed; equal rows.
        m: (local, d), the outer momentum; equal rows.
        optimizer: the inner optimizer's own state.
    """

    x: Tensor
    x_outer: Tensor
    m: Tensor
    optimizer: Any


class DiLoCo(Algorithm):
    """DiLoCo (arXiv:2311.08105, Alg. 1): H inner steps, then a Nesterov step on their mean.

    From x_outer every rank takes H inner updates to x_H; then with the outer gradient
    D = x_outer - mean(x_H)::

        m = mu m + D;  x_outer -= outer_lr (D + mu m);  x = x_outer

    A step of the run is one such round: H gradients, one all-reduce of d elements; the graph is not
    used. The paper's inner optimizer is ``adamw`` with lr 4e-4; its state stays on its rank.
    outer_lr 1 and mu 0 is FedAvg.
    """

    sends: ClassVar[str] = "its parameters"
    name: Literal["diloco"] = "diloco"
    local_steps: int = Field(default=500, ge=1)
    """H, inner updates in a round; 500 is the paper's."""
    outer_lr: float = Field(default=0.7, gt=0)
    """Learning rate of the outer step; .7 is the paper's."""
    outer_momentum: float = Field(default=0.9, ge=0, lt=1)
    """mu, Nesterov momentum of the outer step; .9 is the paper's."""
    optimizer: Optimizer = Field(exclude=True)
    """The inner update; adamw with lr 4e-4 in the paper."""

    @property
    def batches_per_step(self) -> int:
        """One batch per inner update."""
        return self.local_steps

    def adapt(self, topology: Topology) -> Topology:
        """Take any graph: it is not used."""
        return topology

    def init(self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches) -> DiLoCoState:
        """Start at x, everything at rest."""
        return DiLoCoState(x, x.clone(), torch.zeros_like(x), self.optimizer.init(x))

    def step(
        self, comm: Communicator, oracle: Oracle, state: DiLoCoState, batches: Batches
    ) -> Metrics:
        """H gradients, one all-reduce of d elements."""
        x, x_outer, m = state.x, state.x_outer, state.m
        figures = take_local_steps(self.optimizer, comm, oracle, state.optimizer, x, batches)
        mean = comm.all_reduce(x, "mean").expand_as(x)
        outer_gradient = combine([(1.0, x_outer), (-1.0, mean)])
        mu, lr = self.outer_momentum, self.outer_lr
        combine([(mu, m), (1.0, outer_gradient)], out=m)
        combine([(1.0, x_outer), (-lr, outer_gradient), (-lr * mu, m)], out=x_outer)
        x.copy_(x_outer)
        return figures
