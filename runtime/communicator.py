"""The communicator: the only way for ranks to talk.

Every process calls every method in the same order with the same shapes. Operations run one at a
time, in the order they were called; ``*_async`` ones on a thread of their own while the caller
computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor

from gossamer.runtime import native
from gossamer.runtime.exchange import ExchangePlan
from gossamer.runtime.hierarchical import ShardedPlan, machine_of
from gossamer.runtime.messages import Messages
from gossamer.runtime.native import AveragePlan, weighted_sum
from gossamer.runtime.neighbors import NeighborGroup
from gossamer.runtime.random import Random, Stream
from gossamer.runtime.rows import empty_rows, rows_overlap
from gossamer.runtime.transports.base import Transport
from gossamer.runtime.transports.hybrid import HybridTransport
from gossamer.runtime.work import Background, Work
from gossamer.topologies import Topology

__all__ = ["Communicator", "Work"]

T = TypeVar("T")


class Communicator(NeighborGroup):
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
        super().__init__(topology, transport, timeout_s=timeout_s, check_rounds=check_rounds)
        self.steps = steps
        self.seed = Random(seed)
        inside = transport.inside if isinstance(transport, HybridTransport) else transport
        self._memory = inside.shared
        self._machine = machine_of(topology, transport, self.placement, self.traffic, timeout_s)
        self._compiled = lru_cache(maxsize=max(64, topology.period or 0))(self._compile)
        self._line: Background | None = None

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

    def neighbor_gather_async(self, x: Tensor) -> Work[Messages]:
        """Start ``neighbor_gather`` and return at once; ``x`` belongs to it until ``wait``."""
        width = self._width("neighbor_gather", x)
        plan = self._plan_now()
        self.traffic.count(plan.degree, 1, width * x.itemsize)
        return self._background("neighbor_gather", self._gather, plan, x)

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

    def _plan(self, t: int) -> ExchangePlan:
        plan = super()._plan(t)
        return plan if self._machine is None else self._machine.plan(t, plan)

    def _compile(self, t: int) -> AveragePlan:
        assert self._shared is not None
        return self._shared.prepare(self._plans(t))

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
