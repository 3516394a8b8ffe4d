"""Messages over the edges of the round, kept apart.

What a rank hears from each neighbour, messages of one length or of many, and the way back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from gossamer.runtime.collectives import RankGroup
from gossamer.runtime.errors import RoundMismatch
from gossamer.runtime.exchange import ExchangePlan, ReturnPlan, plan_exchange, plan_return
from gossamer.runtime.messages import Edge, Messages, RaggedMessages
from gossamer.runtime.native import DTYPES, weighted_sum
from gossamer.runtime.rows import empty_rows
from gossamer.runtime.transports.base import Transport
from gossamer.topologies import Topology

__all__ = ["NeighborGroup"]

_ROUNDS_AHEAD = 64
"""How many rounds of a schedule that never repeats are compared between processes at once."""


class NeighborGroup(RankGroup):
    """The ranks of a run on a schedule of graphs.

    Attributes:
        topology: the schedule of graphs; W(t) is of round ``self.round``.
        round: t, the schedule's index; moved by the loop after each step.
    """

    def __init__(
        self, topology: Topology, transport: Transport, *, timeout_s: float, check_rounds: bool
    ) -> None:
        """Join the run; every process passes the same topology.

        Args:
            topology: the schedule.
            transport: how bytes move.
            timeout_s: bound of every wait.
            check_rounds: compare a hash of each new round between processes before it is used.

        Raises:
            RoundMismatch: the processes passed different topologies; on every one of them.
        """
        super().__init__(topology.n, transport, timeout_s=timeout_s)
        self.topology = topology
        self.round = 0
        self._period = topology.period
        self._check_rounds = check_rounds and transport.processes > 1
        self._plans = lru_cache(maxsize=max(64, topology.period or 0))(self._plan)
        self._returns = lru_cache(maxsize=max(64, topology.period or 0))(self._return_plan)
        self._agreed: set[int] = set()
        self._scratch: dict[tuple[int, int, torch.dtype], Tensor] = {}
        if self._check_rounds and not self.same(topology.digest()):
            raise RoundMismatch(
                f"topology: the processes hold different topologies; this one has {topology!r}"
            )

    def neighbor_gather(self, x: Tensor) -> Messages:
        """Return the rows that each hosted rank receives in round t, kept apart.

        For compression and robust aggregation. Rows may be of any dtype (packed bytes too); all
        ranks send rows of one length.

        Args:
            x: (local, m), rows contiguous; kept.
        """
        width = self._width("neighbor_gather", x)
        plan = self._plan_now()
        self._settle()
        self.traffic.count(plan.degree, 1, width * x.itemsize)
        return self._gather(plan, x)

    def neighbor_gather_adjoint(self, values: Tensor) -> Tensor:
        """Return the sums of what comes back when each message of round t returns to its source.

        The transpose of ``neighbor_gather``: over all ranks, ``<neighbor_gather(x).values, y>`` is
        ``<x, neighbor_gather_adjoint(y)>``, so that it turns the gradient of the messages into that
        of the rows. Weights are not applied. A message of m elements travels against each edge,
        counted where it starts; a rank adds those that come back in ascending rank.

        Args:
            values: (edges, m), in the order of ``neighbor_gather(x).values`` of the same round; a
                dtype of the kernels; kept.

        Returns:
            (local, m); zeros for a rank that sends nothing in round t.

        Raises:
            ValueError: another number of messages, dtype or device; nothing was sent.
        """
        plan = self._returns(self._place_in_schedule())
        if (
            values.dim() != 2
            or len(values) != plan.num_edges
            or values.dtype not in DTYPES
            or values.is_cpu != self._is_cpu
        ):
            raise ValueError(
                f"neighbor_gather_adjoint: values must be ({plan.num_edges}, m) floating on "
                f"{self.device}, got {tuple(values.shape)} {values.dtype} on {values.device}"
            )
        self._settle()
        width = values.shape[1]
        self.traffic.count(plan.degree, 1, width * values.itemsize)
        values = values.contiguous()
        received = values.new_empty(plan.num_received, width)
        blocks = received.split([count for _, count in plan.receives])
        self._exchange(
            [(peer, values[torch.from_numpy(rows).to(values.device)]) for peer, rows in plan.sends],
            [(peer, block) for (peer, _), block in zip(plan.receives, blocks, strict=True)],
            f"neighbor_gather_adjoint (round {self.round})",
        )
        return weighted_sum([values, received], plan.terms, values.new_empty(self.local, width))

    def neighbor_gather_ragged(self, rows: Sequence[Tensor]) -> RaggedMessages:
        """Return the messages that each hosted rank receives in round t, each of its own length.

        For compression whose size depends on the values. The lengths travel first: 8 bytes more
        per message, which are counted.

        Args:
            rows: one per hosted rank, (m_i,) contiguous, of one dtype on every rank; m_i may be 0.
        """
        plan = self._plan_now()
        if len(rows) != self.local:
            raise ValueError(
                f"neighbor_gather_ragged: needs a row for each of {self.local} hosted ranks, got "
                f"{len(rows)}"
            )
        self._check_messages("neighbor_gather_ragged", rows)
        self._settle()
        lengths = torch.tensor([[len(row)] for row in rows], device=self.device)
        sizes = 8 + lengths.flatten().numpy(force=True) * rows[0].itemsize
        self.traffic.messages_sent[:] += plan.degree
        self.traffic.bytes_sent[:] += plan.degree * sizes
        coming = self._receive(plan, lengths, "neighbor_gather_ragged").flatten().tolist()
        received = [rows[0].new_empty(length) for length in coming]
        self._transfer(plan, rows, received, "neighbor_gather_ragged")
        table = [*rows, *received]
        return RaggedMessages(
            values=[table[column] for column in plan.columns],
            source=torch.from_numpy(plan.sources.astype(np.int64)),
            target=torch.from_numpy(plan.targets),
            weight=torch.from_numpy(plan.weights.copy()),
        )

    def neighbor_all_to_all(
        self, messages: Mapping[Edge, Tensor], received: Mapping[Edge, Tensor]
    ) -> None:
        """Send a message of its own over each edge of round t, where there is something to say.

        Both ends know how long a message is, so no lengths travel.

        Args:
            messages: (source, target) -> (m,) contiguous, of hosted sources; kept.
            received: (source, target) -> where to write, (m,), of hosted targets: an entry for each
                message to them, of its length and dtype.

        Raises:
            ValueError: an edge is not one of round t, or does not begin or end here, or only one
                end knows of a message between hosted ranks; nothing was sent.
        """
        self._plan_now()  # the processes agree on round t
        round_ = self.topology.round(self._place_in_schedule())
        for edges, others, end in ((messages, received, 0), (received, messages, 1)):
            for edge in edges:
                if edge[end] not in self.ranks or edge[0] not in round_.recv(edge[1])[0]:
                    raise ValueError(f"neighbor_all_to_all: no edge {edge} at ranks {self.ranks}")
                if edge[1 - end] in self.ranks and edge not in others:
                    raise ValueError(f"neighbor_all_to_all: one end of {edge} has no message")
        sends = []
        for edge in sorted(messages):  # both ends of a pair of processes keep this order
            message, (source, target) = messages[edge], edge
            row = source - self.ranks.start
            self.traffic.bytes_sent[row] += message.nbytes
            self.traffic.messages_sent[row] += 1
            if target in self.ranks:
                received[edge].copy_(message)
            else:
                sends.append((self.placement.owner_of(target), message))
        receives = [
            (self.placement.owner_of(edge[0]), received[edge])
            for edge in sorted(received)
            if edge[0] not in self.ranks
        ]
        self._exchange(sends, receives, f"neighbor_all_to_all (round {self.round})")

    # --- inside -----------------------------------------------------------------------------

    def _place_in_schedule(self) -> int:
        return self.round % self._period if self._period else self.round

    def _plan_now(self) -> ExchangePlan:
        return self._plans(self._place_in_schedule())

    def _plan(self, t: int) -> ExchangePlan:
        self._agree_on_round(t)
        return plan_exchange(self.topology.round(t), self.placement, self.transport.process)

    def _return_plan(self, t: int) -> ReturnPlan:
        self._agree_on_round(t)
        return plan_return(self.topology.round(t), self.placement, self.transport.process)

    def _agree_on_round(self, t: int) -> None:
        """Compare a hash of round t between processes, once.

        Of a schedule that never repeats, 64 rounds together: asking everyone in every step would
        cost more than a step's few messages.
        """
        count = 1 if self.topology.period else _ROUNDS_AHEAD
        first = t // count * count
        if not self._check_rounds or first in self._agreed:
            return
        digests = [self.topology.round(first + k).digest() for k in range(count)]
        row = torch.tensor([digests], dtype=torch.int64, device=self.device)
        rows = self._gather_rows(row.expand(self.local, count).contiguous(), "agreement on rounds")
        apart = (rows != rows[0]).any(dim=0).nonzero()
        if len(apart):
            raise RoundMismatch(
                f"topology: the processes hold different rounds t={first + int(apart[0])} of "
                f"{self.topology.name}; a schedule must be a function of t alone, the same on "
                "every process"
            )
        self._agreed.add(first)

    def _gather(self, plan: ExchangePlan, x: Tensor) -> Messages:
        received = self._receive(plan, x, "neighbor_gather")
        columns = torch.from_numpy(plan.columns)
        rows = torch.cat([x, received]) if plan.num_received else x
        return Messages(
            values=rows[columns.to(x.device)],
            source=torch.from_numpy(plan.sources.astype(np.int64)),
            target=torch.from_numpy(plan.targets),
            weight=torch.from_numpy(plan.weights.copy()),
        )

    def _receive(self, plan: ExchangePlan, x: Tensor, operation: str) -> Tensor:
        """Return the rows of other processes that the plan asks for, (num_received, m)."""
        received = self._buffer(plan.num_received, x)
        self._transfer(plan, x, received, operation)
        return received

    def _transfer(
        self,
        plan: ExchangePlan,
        rows: Tensor | Sequence[Tensor],
        received: Tensor | Sequence[Tensor],
        operation: str,
    ) -> None:
        """Fill ``received``, in the plan's order, with rows of other processes."""
        if not plan.sends and not plan.receives:
            return
        sends = [(peer, rows[row]) for peer, wanted in plan.sends for row in wanted]
        receives, at = [], 0
        for peer, count in plan.receives:
            receives += [(peer, received[k]) for k in range(at, at + count)]
            at += count
        with self.traffic.span("wait", operation, self.step):
            pending = self.transport.exchange(sends, receives, self._where(operation))
            pending.wait(self.timeout_s)

    def _where(self, operation: str) -> str:
        return f"step {self.step}: {operation} (round {self.round})"

    def _buffer(self, rows: int, like: Tensor) -> Tensor:
        key = (rows, like.shape[1], like.dtype)
        if key not in self._scratch:
            self._scratch[key] = empty_rows(rows, like.shape[1], like.dtype, like.device)
        return self._scratch[key]
