"""What a process sent and where its time went: byte counters and trace events."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

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


@dataclass
class Traffic:
    """Counters of one process.

    Bytes are those of the algorithm: a message over an edge of the graph counts once for its
    sender, whether or not the two ranks share a process, so that the figure is the same for every
    transport and split of ranks.

    Attributes:
        bytes_sent: (local,) int64, per hosted rank.
        messages_sent: (local,) int64, per hosted rank.
        seconds: time per lane so far on the caller's thread; what runs in the background costs
            the caller only what it waits for.
        events: spans, kept when ``tracing``.
    """

    bytes_sent: np.ndarray
    messages_sent: np.ndarray
    seconds: dict[str, float] = field(
        default_factory=lambda: {"compute": 0.0, "communicate": 0.0, "wait": 0.0}
    )
    events: list[Event] = field(default_factory=list)
    tracing: bool = False
    origin: float = field(default_factory=time.perf_counter)
    thread: int = field(default_factory=threading.get_ident)

    @contextmanager
    def span(self, lane: Lane, name: str, step: int) -> Iterator[None]:
        """Time the block as part of ``lane``."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            background = threading.get_ident() != self.thread
            if not background:
                self.seconds[lane] += end - begin
            if self.tracing:
                span = (begin - self.origin, end - self.origin)
                self.events.append(Event(lane, name, *span, step, background))
