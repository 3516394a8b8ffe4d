"""Naive decentralized normalized SGD: each rank normalises its own gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from gossamer.algorithms.decentralized.fixed_rule import FixedRule
from gossamer.algorithms.estimates import Metrics
from gossamer.algorithms.problems import Batches
from gossamer.algorithms.protocols import Oracle
from gossamer.runtime import Communicator, combine, row_norm

__all__ = ["DNSGD", "DNSGDState", "inverse_norm"]


@dataclass
class DNSGDState:
    """Attributes: x, the (local, d) parameters."""

    x: Tensor


class DNSGD(FixedRule):
    """Naive decentralized normalized SGD: x = W (x - lr g / ||g||).

    A mean of directions is not the direction of the mean: with different data, or noise, on the
    ranks the limit is biased, and the bias does not fall with the number of steps. It stands here
    to be compared with what normalises after averaging: d-nasa, gt-nsgdm. W must be doubly
    stochastic. One exchange of d elements. A zero gradient moves nothing.
    """

    sends: ClassVar[str] = "its parameters"
    name: Literal["dnsgd"] = "dnsgd"
    eps: float = Field(default=1e-30, ge=0)
    """A gradient no longer than this is zero."""

    def init(self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches) -> DNSGDState:
        """Start at x."""
        return DNSGDState(x=x)

    def step(
        self, comm: Communicator, oracle: Oracle, state: DNSGDState, batches: Batches
    ) -> Metrics:
        """One gradient, one exchange of d elements."""
        x = state.x
        estimate, g = self.estimate(comm, oracle, x, batches[0])
        combine([(1.0, x), (-self.optimizer.rate(comm) * inverse_norm(g, self.eps), g)], out=x)
        comm.neighbor_average(x, out=x)
        return {"loss": estimate.loss, **estimate.metrics}


def inverse_norm(v: Tensor, eps: float) -> Tensor:
    """Return 1 / ||v_i|| per row of v (local, d), 0 where ||v_i|| <= eps; (local, 1) float64."""
    length = row_norm(v)
    return torch.where(length > eps, 1 / length, 0.0)
