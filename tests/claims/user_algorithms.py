"""Algorithms that stand in no registry: what goes wrong without the idea that a claim is about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import Tensor

from gossamer.algorithms.decentralized.compressors import AnyCompressor, Sign
from gossamer.algorithms.decentralized.dsgd import DSGD
from gossamer.algorithms.decentralized.fixed_rule import FixedRule
from gossamer.algorithms.estimates import Metrics
from gossamer.algorithms.problems import Batches
from gossamer.algorithms.protocols import Oracle
from gossamer.runtime import Communicator, combine
from gossamer.topologies import Topology


class RowStochasticDSGD(DSGD):
    """DSGD on a matrix whose columns do not sum to 1, which DSGD itself refuses."""

    name: Literal["row-stochastic-dsgd"] = "row-stochastic-dsgd"

    def adapt(self, topology: Topology) -> Topology:
        """Take any W."""
        return topology


@dataclass
class ForgetfulState:
    """Attributes: x, the (local, d) parameters."""

    x: Tensor


class ForgetfulGossip(FixedRule):
    """Exchange C(x) itself, no memory of what was sent: x -= lr g;  x += gamma (W - I) C(x)."""

    name: Literal["forgetful-gossip"] = "forgetful-gossip"
    compressor: AnyCompressor = Sign()
    gamma: float = Field(default=0.4, gt=0)

    def init(
        self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches
    ) -> ForgetfulState:
        """Start at x."""
        return ForgetfulState(x)

    def step(
        self, comm: Communicator, oracle: Oracle, state: ForgetfulState, batches: Batches
    ) -> Metrics:
        """One gradient, one compressed message."""
        estimate, g = self.estimate(comm, oracle, state.x, batches[0])
        combine([(1.0, state.x), (-self.optimizer.rate(comm), g)], out=state.x)
        message = self.compressor.pack(comm, oracle.layout, state.x)
        sent = self.compressor.unpack(comm, oracle.layout, message, comm.ranks)
        mixed = comm.neighbor_average(sent)
        combine([(1.0, state.x), (self.gamma, mixed), (-self.gamma, sent)], out=state.x)
        return {"loss": estimate.loss}
