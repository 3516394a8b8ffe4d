"""What a process sent and where its time went: byte counters and trace events."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

__all__ = ["Event", "Traffic"]

Lane = Literal["compute", "communicate", "wait"]


@dataclass(frozen=True)
class Event:
    """One span of the trace, in seconds since the traffic began.

    Attributes:
        background: whether it ran on the communicator's own thread, beside the computation.
    """

    lane: Lane
    name: str
    begin: float
    end: float
    step: int
    background: bool = False


class Traffic:
    """Counters of one process.

    Bytes are those of the algorithm: a message over an edge of the graph counts once for its
    sender, whether or not the two ranks share a process, so that the figure is the same for every
    transport and split of ranks.

    Attributes:
        take: asks compiled calls for the seconds, and the bytes and messages per hosted rank, that
            they counted since they were last asked.
        events: spans, kept when ``tracing``.
    """

    def __init__(self, local: int) -> None:
        """Start at nothing, for ``local`` hosted ranks."""
        self._bytes, self._messages = np.zeros(local, np.int64), np.zeros(local, np.int64)
        # Counts that wait to be added: an operation of a few bytes takes less than an addition.
        self._waiting: dict[int, list[Any]] = {}
        self._seconds: dict[Lane, float] = {"compute": 0.0, "communicate": 0.0, "wait": 0.0}
        self.take: Callable[[], tuple[float, list[int], list[int]]] | None = None
        self.events: list[Event] = []
        self.tracing = False
        self.origin = time.perf_counter()
        self.thread = threading.get_ident()

    def count(self, per_rank: np.ndarray, messages: int, bytes_sent: int) -> None:
        """Count ``per_rank * messages`` messages and ``per_rank * bytes_sent`` bytes.

        Args:
            per_rank: (local,) int64, not changed later.
            messages: for each unit of ``per_rank``.
            bytes_sent: likewise.
        """
        waiting = self._waiting.get(id(per_rank))
        if waiting is None:
            self._waiting[id(per_rank)] = [per_rank, messages, bytes_sent]
        else:
            waiting[1] += messages
            waiting[2] += bytes_sent

    def _settle(self) -> None:
        for per_rank, messages, bytes_sent in self._waiting.values():
            self._bytes += per_rank * bytes_sent
            self._messages += per_rank * messages
        self._waiting.clear()
        if self.take is not None:
            seconds, sent, messages = self.take()
            self._seconds["communicate"] += seconds
            self._bytes += sent
            self._messages += messages

    @property
    def seconds(self) -> dict[Lane, float]:
        """Time per lane so far on the caller's thread, in seconds.

        What runs in the background costs the caller only what it waits for.
        """
        self._settle()
        return self._seconds

    @property
    def bytes_sent(self) -> np.ndarray:
        """(local,) int64, per hosted rank; may be written to."""
        self._settle()
        return self._bytes

    @property
    def messages_sent(self) -> np.ndarray:
        """(local,) int64, per hosted rank; may be written to."""
        self._settle()
        return self._messages

    def span(self, lane: Lane, name: str, step: int) -> _Span:
        """Return a context that times its block as part of ``lane``."""
        return _Span(self, lane, name, step)

    def spent(self, lane: Lane, name: str, step: int, begin: float) -> None:
        """Count the time since ``begin`` (of ``time.perf_counter``) as part of ``lane``."""
        end = time.perf_counter()
        background = threading.get_ident() != self.thread
        if not background:
            self._seconds[lane] += end - begin
        if self.tracing:
            times = (begin - self.origin, end - self.origin)
            self.events.append(Event(lane, name, *times, step, background))


class _Span:
    # Not a generator: an operation of a few bytes takes about as long as entering one.
    __slots__ = ("_begin", "_lane", "_name", "_step", "_traffic")

    def __init__(self, traffic: Traffic, lane: Lane, name: str, step: int) -> None:
        self._traffic, self._lane, self._name, self._step = traffic, lane, name, step

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._traffic.spent(self._lane, self._name, self._step, self._begin)
