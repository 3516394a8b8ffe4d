"""The communicator: the only way for ranks to talk.

Every process calls every method in the same order with the same shapes. Operations run one at a
time, in the order they were called; ``*_async`` ones on a thread of their own while the caller
computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from gossamer.runtime import native
from gossamer.runtime.collectives import RankGroup
from gossamer.runtime.errors import RoundMismatch
from gossamer.runtime.exchange import ExchangePlan, plan_exchange
from gossamer.runtime.hierarchical import ShardedPlan, machine_of
from gossamer.runtime.messages import Edge, Messages, RaggedMessages
from gossamer.runtime.native import AveragePlan, weighted_sum
from gossamer.runtime.random import Random, Stream
from gossamer.runtime.rows import empty_rows, rows_overlap
from gossamer.runtime.transports.base import Transport
from gossamer.runtime.transports.hybrid import HybridTransport
from gossamer.runtime.work import Background, Work
from gossamer.topologies import Topology

__all__ = ["Communicator", "Work"]

T = TypeVar("T")

_ROUNDS_AHEAD = 64
"""How many rounds of a schedule that never repeats are compared between processes at once."""


class Communicator(RankGroup):
    """The handle through which the ranks of this process talk.

    Attributes:
        topology: the schedule of graphs; W(t) is of round ``self.round``.
        step: the algorithm's step; moved by the loop, counts random numbers.
        round: t, the schedule's index; moved by the loop after each step.
        steps: how many steps the run will make (the horizon T); None when open-ended.
        seed: the run's source of counted random numbers.

    Example:
        >>> import torch
        >>> from gossamer.runtime import Communicator, StackedTransport
        >>> from gossamer.topologies import build
        >>> comm = Communicator(build("ring", 4), StackedTransport())
        >>> comm.neighbor_average(torch.tensor([[0.0], [3.0], [6.0], [9.0]])).flatten().tolist()
        [4.0, 3.0, 6.0, 5.0]
    """

    def __init__(
        self,
        topology: Topology,
        transport: Transport,
        *,
        seed: int = 0,
        steps: int | None = None,
        timeout_s: float = 300.0,
        check_rounds: bool = True,
    ) -> None:
        """Join the run; every process passes the same topology and seed.

        Args:
            topology: the schedule.
            transport: how bytes move.
            seed: of the counted random numbers.
            steps: the horizon, for schedules that depend on it.
            timeout_s: bound of every wait.
            check_rounds: compare a hash of each new round between processes before it is used.

        Raises:
            RoundMismatch: the processes passed different topologies; on every one of them.
        """
        super().__init__(topology.n, transport, timeout_s=timeout_s)
        self.topology = topology
        self._period = topology.period
        self.round = 0
        self.steps = steps
        self.seed = Random(seed)
        inside = transport.inside if isinstance(transport, HybridTransport) else transport
        self._memory = inside.shared
        self._machine = machine_of(topology, transport, self.placement, self.traffic, timeout_s)
        self._check_rounds = check_rounds and transport.processes > 1
        self._plans = lru_cache(maxsize=max(64, topology.period or 0))(self._plan)
        self._compiled = lru_cache(maxsize=max(64, topology.period or 0))(self._compile)
        self._agreed: set[int] = set()
        self._scratch: dict[tuple[int, int, torch.dtype], Tensor] = {}
        self._line: Background | None = None
        if self._check_rounds and not self.same(topology.digest()):
            raise RoundMismatch(
                f"topology: the processes hold different topologies; this one has {topology!r}"
            )

    # --- averaging over the graph -----------------------------------------------------------

    def neighbor_average(
        self,
        x: Tensor,
        *,
        out: Tensor | None = None,
        axpy: tuple[float, Tensor] | None = None,
        rounds: int = 1,
    ) -> Tensor:
        """Return W(t) x: each row becomes the weighted sum of its neighbours' rows.

        Sends one message of d elements per edge; t is advanced by the loop, not here. Terms are
        added own row first, then in ascending rank, in float32 (float64 for float64 rows), so the
        bits do not depend on the transport. One call at a time.

        Where the machines of a hierarchical topology are the hosts of a ``hybrid`` transport, the
        average is sharded (``gossamer.runtime.hierarchical``): equal to rounding, and fewer bytes
        between hosts; what is counted as sent stays that of the edges.

        Args:
            x: (local, d), rows contiguous; kept unless it is also ``out``.
            out: where to write; a new tensor when None.
            axpy: ``(a, y)``: adds a*y after the (last) average, in the same pass.
            rounds: how many times the same W(t) is applied.

        Returns:
            ``out``.

        Raises:
            ValueError: wrong shape, dtype or layout; nothing was sent.
            CommTimeout: a neighbour did not answer in time; names peer and operation.
            PeerLost: a neighbour's process is gone; names peer and operation.
            RoundMismatch: the processes hold different rounds t; raised on all of them.
        """
        calls = self._calls
        if calls is not None and out is not None and not self.traffic.tracing:
            if self._last is not None:
                self._settle()
            a, y = (0.0, None) if axpy is None else axpy
            plan, threads = self._compiled(self._place_in_schedule()), native.num_threads()
            status = calls.average(plan, x, out, y, a, rounds, threads, self.timeout_s)
            if status == 0:
                return out
            if status > 0:
                self._check(status, f"neighbor_average (round {self.round})")
        out = self._output(x, out, axpy, rounds)
        self._settle()
        t = self._place_in_schedule()
        self.traffic.count(self._plans(t).degree, rounds, rounds * x.shape[1] * x.itemsize)
        return self._average(t, x, out, axpy, rounds)

    def neighbor_average_async(
        self,
        x: Tensor,
        *,
        out: Tensor | None = None,
        axpy: tuple[float, Tensor] | None = None,
        rounds: int = 1,
    ) -> Work[Tensor]:
        """Start ``neighbor_average`` and return at once; it progresses while the caller computes.

        ``x``, ``out`` and ``y`` belong to the operation until ``wait`` returns.
        """
        out = self._output(x, out, axpy, rounds)
        t = self._place_in_schedule()
        self.traffic.count(self._plans(t).degree, rounds, rounds * x.shape[1] * x.itemsize)
        return self._background("neighbor_average", self._average, t, x, out, axpy, rounds)

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

    def neighbor_gather_async(self, x: Tensor) -> Work[Messages]:
        """Start ``neighbor_gather`` and return at once; ``x`` belongs to it until ``wait``."""
        width = self._width("neighbor_gather", x)
        plan = self._plan_now()
        self.traffic.count(plan.degree, 1, width * x.itemsize)
        return self._background("neighbor_gather", self._gather, plan, x)

    def neighbor_gather_ragged(self, rows: Sequence[Tensor]) -> RaggedMessages:
        """Return the messages that each hosted rank receives in round t, each of its own length.

        For compression whose size depends on the values. The lengths travel first: 8 bytes more
        per message, which are counted.

        Args:
            rows: one per hosted rank, (m_i,) contiguous, of one dtype on every rank; m_i may be 0.
        """
        plan = self._plan_now()
        self._check_ragged(rows)
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
        self._exchange(sends, receives, self._where("neighbor_all_to_all"))

    def _check_ragged(self, rows: Sequence[Tensor]) -> None:
        dtypes = {row.dtype for row in rows}
        if len(rows) != self.local or len(dtypes) > 1:
            raise ValueError(
                f"neighbor_gather_ragged: needs a row for each of {self.local} hosted ranks, of "
                f"one dtype, got {len(rows)} of {sorted(map(str, dtypes))}"
            )
        for row in rows:
            if row.dim() != 1 or not row.is_contiguous() or row.is_cpu != self._is_cpu:
                raise ValueError(
                    f"neighbor_gather_ragged: rows must be (m,), contiguous, on {self.device}, "
                    f"got {tuple(row.shape)} with strides {row.stride()} on {row.device}"
                )

    # --- memory and random numbers ----------------------------------------------------------

    def alloc(self, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return zeros (local, d) where the transport reads rows without copies."""
        if self._memory is not None:
            return self._memory.alloc(self.local, d, dtype)
        return empty_rows(self.local, d, dtype, self.device)

    def random(self, name: str, *, ids: Iterable[int] | None = None, draw: int = 0) -> Stream:
        """Return the counted streams ``name`` at this step, one per id (default: hosted ranks)."""
        return self.seed.stream(name, self.ranks if ids is None else ids, self.step, draw)

    def close(self) -> None:
        """Finish what is in flight and leave the transport; may be called twice."""
        if self._line is not None:
            self._line.close()
            self._line = None
        self.transport.close()

    # --- inside -----------------------------------------------------------------------------

    def _output(
        self, x: Tensor, out: Tensor | None, axpy: tuple[float, Tensor] | None, rounds: int
    ) -> Tensor:
        """Return where to write, after the checks of every transport."""
        d = self._width("neighbor_average", x)
        if rounds < 1:
            raise ValueError(f"neighbor_average: rounds must be at least 1, got {rounds}")
        if out is None:
            return empty_rows(self.local, d, x.dtype, x.device)
        if axpy is not None and rounds > 1 and rows_overlap(axpy[1], out):
            raise ValueError(
                "neighbor_average: with several rounds out must not be axpy's y, which the last "
                "round adds and the first would overwrite"
            )
        if out.shape != x.shape or out.dtype != x.dtype:
            raise ValueError(
                f"neighbor_average: out is {tuple(out.shape)} {out.dtype}, "
                f"x {tuple(x.shape)} {x.dtype}"
            )
        return out

    def _background(self, name: str, operation: Callable[..., T], *arguments: Any) -> Work[T]:
        """Start an operation on the thread where they run one after another."""
        if self._line is None:
            self._line = Background(self.device)
        self._last = self._line.submit(operation, *arguments)
        return Work(self._last, self, name)

    def _settle(self) -> None:
        """Let an operation in flight finish first; its error is raised by its own ``wait``."""
        if self._last is not None:
            self._last.settle()
            self._last = None

    def _exchange(
        self,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Tensor]],
        operation: str,
    ) -> None:
        self._settle()
        super()._exchange(sends, receives, operation)

    def _place_in_schedule(self) -> int:
        return self.round % self._period if self._period else self.round

    def _plan_now(self) -> ExchangePlan:
        return self._plans(self._place_in_schedule())

    def _plan(self, t: int) -> ExchangePlan:
        self._agree_on_round(t)
        plan = plan_exchange(self.topology.round(t), self.placement, self.transport.process)
        return plan if self._machine is None else self._machine.plan(t, plan)

    def _compile(self, t: int) -> AveragePlan:
        assert self._shared is not None
        return self._shared.prepare(self._plans(t))

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

    def _average(
        self,
        t: int,
        x: Tensor,
        out: Tensor,
        axpy: tuple[float, Tensor] | None,
        rounds: int,
    ) -> Tensor:
        if self._shared is not None:
            begin = perf_counter()
            compiled = self._compiled(t)
            status = self._shared.average(compiled, x, out, axpy, rounds, self.timeout_s)
            self.traffic.spent("communicate", "neighbor_average", self.step, begin)
            if status != 0:
                self._shared.check(status, self._where("neighbor_average"), self.timeout_s)
            return out
        plan = self._plans(t)
        if isinstance(plan, ShardedPlan):
            plan.machine.step = self.step
            operation = f"neighbor_average (round {self.round})"
            return plan.machine.average(plan.between, x, out, axpy, rounds, operation)
        source = x
        for k in range(rounds):
            received = self._receive(plan, source, "neighbor_average")
            with self.traffic.span("communicate", "weighted sum", self.step):
                weighted_sum(
                    [source, received],
                    plan.terms,
                    out,
                    axpy=axpy if k == rounds - 1 else None,
                )
            source = out
        return out

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
