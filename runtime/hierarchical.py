"""Averages over machines of several ranks, where the machines are the transport's hosts.

W = W_M kron J_L is applied sharded: the processes of a machine sum its rows, each a slice of the
columns; process p exchanges its slice with process p of the neighbour machines; at last each
machine's processes gather the slices. Between hosts a process so sends 1/P of a row per neighbour
machine, where the flat W sends whole rows to each of their P processes.

Sums add the machine's ranks in ascending order, then machines as W_M does (own first): the bits
depend on neither the split of ranks over processes nor the transport, but differ from those of the
flat W, which multiplies every row by its own weight. They are equal to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from gossamer.runtime.collectives import RankGroup
from gossamer.runtime.exchange import ExchangePlan, plan_exchange
from gossamer.runtime.native import DTYPES, Terms, weighted_sum
from gossamer.runtime.placement import Placement
from gossamer.runtime.traffic import Traffic
from gossamer.runtime.transports.base import Transport
from gossamer.runtime.transports.hybrid import HybridTransport
from gossamer.topologies import HierarchicalTopology, Topology

__all__ = ["Machine", "ShardedPlan", "machine_of"]

_ALIGN = 64
"""Elements: slices then begin on cache lines in every dtype."""


@dataclass(frozen=True)
class ShardedPlan(ExchangePlan):
    """One process's part of a round that is executed sharded.

    The inherited fields are those of the flat round, for ``neighbor_gather`` and for what counts as
    sent: bytes are the algorithm's, the same for every transport.

    Attributes:
        machine: this process's.
        between: the round among machines, one row each.
    """

    machine: Machine
    between: ExchangePlan


class Machine(RankGroup):
    """The ranks of one machine: this process hosts a block of them, its host all."""

    def __init__(
        self,
        topology: HierarchicalTopology,
        transport: HybridTransport,
        traffic: Traffic,
        timeout_s: float,
    ) -> None:
        """Stand for this process's machine; ``machine_of`` says when there is one."""
        super().__init__(topology.local, transport.inside, timeout_s=timeout_s)
        self.traffic = traffic  # the communicator's own
        self._among = topology.machines
        self._between = transport.between
        self._machine = [transport.process in host for host in transport.hosts].index(True)
        self._counterparts = [host[self.transport.process] for host in transport.hosts]
        self._rows: dict[tuple[int, torch.dtype], Tensor] = {}
        n, local = self.n, self.local
        self._mean = Terms(np.array([0, n]), np.arange(n), np.full(n, 1 / n))
        self._copies = Terms(np.arange(local + 1), np.zeros(local, np.int64), np.ones(local))

    def plan(self, t: int, flat: ExchangePlan) -> ShardedPlan:
        """Add what happens between machines in round ``t`` to the flat round's plan."""
        round_ = self._among.round(t)
        between = plan_exchange(round_, Placement(round_.n, round_.n), self._machine)
        return ShardedPlan(**vars(flat), machine=self, between=between)

    def average(
        self,
        plan: ExchangePlan,
        x: Tensor,
        out: Tensor,
        axpy: tuple[float, Tensor] | None,
        rounds: int,
        operation: str,
    ) -> Tensor:
        """Write W^rounds x + a y into ``out``; J_L^2 = J_L, so only W_M is repeated.

        Args:
            plan: the round among machines.
            x: (local, d), rows contiguous.
            out: like ``x``; may be ``x``.
            axpy: ``(a, y)``.
            rounds: how often the round is applied.
            operation: for messages.

        Raises:
            ValueError: a dtype that the kernels do not take; nothing was sent.
            CommError: as ``Communicator.neighbor_average``; ``x`` is as it was.
        """
        if x.dtype not in DTYPES:
            raise ValueError(f"neighbor_average: dtype {x.dtype} is not one of {list(DTYPES)}")
        slices = _slices(x.shape[1], self.transport.processes)
        mine = slices[self.transport.process]
        row = self._row(x)
        shard = row[:, mine]
        parts = self._swap(lambda p: x[:, slices[p]].contiguous(), x[:, mine], operation)
        weighted_sum(parts, self._mean, shard)
        if shard.numel() > 0:
            for _ in range(rounds):
                self._average_shard(plan, shard, operation)
        self._exchange(
            [(p, shard[0]) for p in self._others()],
            [(p, row[0, slices[p]]) for p in self._others()],
            operation,
        )
        with self.traffic.span("communicate", "weighted sum", self.step):
            return weighted_sum([row], self._copies, out, axpy=axpy)

    def _average_shard(self, plan: ExchangePlan, shard: Tensor, operation: str) -> None:
        count, width = plan.num_received, shard.shape[1]
        received = self._received_rows(count * width, shard)[: count * width].view(count, width)
        sends = [(self._counterparts[machine], shard[0]) for machine, _ in plan.sends]
        peers = [self._counterparts[machine] for machine, _ in plan.receives]
        receives = list(zip(peers, received, strict=True))
        with self.traffic.span("wait", operation, self.step):
            where = f"step {self.step}: {operation}"
            self._between.exchange(sends, receives, where).wait(self.timeout_s)
        with self.traffic.span("communicate", "weighted sum", self.step):
            weighted_sum([shard, received], plan.terms, shard)

    def _row(self, like: Tensor) -> Tensor:
        """Return scratch (1, d) that the machine's other processes read in place."""
        key = like.shape[1], like.dtype
        if key not in self._rows:
            assert self.transport.shared is not None
            self._rows[key] = self.transport.shared.alloc(1, *key)
        return self._rows[key]


def machine_of(
    topology: Topology,
    transport: Transport,
    placement: Placement,
    traffic: Traffic,
    timeout_s: float,
) -> Machine | None:
    """Return this process's machine where W can be applied sharded, else None.

    It can where the topology is hierarchical and its machines are the transport's hosts: each host
    hosts exactly the ranks of one machine, all in equally many processes.
    """
    if not isinstance(topology, HierarchicalTopology) or not isinstance(transport, HybridTransport):
        return None
    size = topology.local
    for machine, host in enumerate(transport.hosts):
        ranks = [rank for process in host for rank in placement.ranks(process)]
        if ranks != list(range(machine * size, (machine + 1) * size)):
            return None
        if len(host) != len(transport.hosts[0]):
            return None
    return Machine(topology, transport, traffic, timeout_s)


def _slices(d: int, parts: int) -> list[slice]:
    """Cut ``d`` columns into slices of whole cache lines; some are empty where d is small."""
    lines = -(-d // _ALIGN)
    ends = [min(d, lines * p // parts * _ALIGN) for p in range(parts + 1)]
    return [slice(begin, end) for begin, end in pairwise(ends)]
