"""``trace.json``: what every process did when, for chrome://tracing and Perfetto.

Three lanes per process. ``wait`` and ``communicate`` are as they were recorded; ``compute`` is what
remains of a step when its main thread was not held up by either. A transfer that runs on the
communicator's own thread holds nothing up until it is waited for: it stands in ``communicate``,
beside the computation that hides it.
"""

from __future__ import annotations

import json
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import torch

from gossamer.runtime.collectives import RankGroup
from gossamer.runtime.traffic import Event

__all__ = ["trace_events", "write_trace"]

_LANES = ("compute", "wait", "communicate")
_BARRIERS = 8


def write_trace(path: Path, comm: RankGroup) -> None:
    """Gather every process's events and write them on process 0; every process calls it."""
    me, ranks = comm.transport.process, comm.ranks
    # One row per process, and a traffic of its own: what follows is no part of the trace.
    group = RankGroup(comm.transport.processes, comm.transport, timeout_s=comm.timeout_s)
    instants = _common_instant(group, comm.traffic.origin)
    events = [astuple(e) for e in comm.traffic.events]
    parts = _collect(group, json.dumps([ranks.start, ranks.stop, events]).encode())
    if me != 0:
        return
    lines: list[dict[str, Any]] = []
    for process, part in enumerate(parts):
        first, last, recorded = json.loads(part)
        shift = instants[0] - instants[process]
        lines += _titles(process, range(first, last))
        found = [Event(*values) for values in recorded]
        moved = [replace(e, begin=e.begin + shift, end=e.end + shift) for e in found]
        lines += trace_events(process, moved)
    path.write_text(json.dumps({"traceEvents": lines, "displayTimeUnit": "ms"}))


def trace_events(process: int, events: Sequence[Event]) -> list[dict[str, Any]]:
    """Return the events of one process as Chrome's complete events, sorted by time."""
    steps = [e for e in events if e.lane == "compute"]
    held = [e for e in events if e.lane != "compute" and not e.background]
    shown = held + [replace(e, lane="communicate") for e in events if e.background]
    held.sort(key=lambda e: e.begin)
    begins = [e.begin for e in held]
    for step in steps:
        inside = held[bisect_left(begins, step.begin) : bisect_left(begins, step.end)]
        shown += _remainder(step, inside)
    shown.sort(key=lambda e: e.begin)
    return [
        {
            "ph": "X",
            "name": e.name,
            "pid": process,
            "tid": _LANES.index(e.lane),
            "ts": round(1e6 * e.begin, 3),
            "dur": round(1e6 * (e.end - e.begin), 3),
            "args": {"step": e.step},
        }
        for e in shown
    ]


def _remainder(step: Event, held: Sequence[Event]) -> Iterator[Event]:
    """Return what the spans ``held``, ascending and apart, leave of a step."""
    at = step.begin
    for event in held:
        if event.begin > at:
            yield Event("compute", "compute", at, event.begin, step.step)
        at = max(at, event.end)
    if at < step.end:
        yield Event("compute", "compute", at, step.end, step.step)


def _titles(process: int, ranks: range) -> list[dict[str, Any]]:
    hosted = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}..{ranks[-1]}"
    names = [("process_name", 0, f"process {process}: {hosted}")]
    names += [("thread_name", tid, lane) for tid, lane in enumerate(_LANES)]
    return [
        {"ph": "M", "name": kind, "pid": process, "tid": tid, "args": {"name": name}}
        for kind, tid, name in names
    ]


def _common_instant(group: RankGroup, origin: float) -> list[float]:
    """Return, per process, when one same instant was, in seconds since its origin.

    All processes leave a barrier within the time that it takes, so of several the fastest is the
    sharpest.
    """
    times = []
    for _ in range(_BARRIERS):
        group.barrier()
        times.append(time.perf_counter() - origin)
    row = torch.tensor([times], dtype=torch.float64, device=group.device)
    rows = group.all_gather(row, count=False).cpu()
    fastest = 1 + int(rows.diff(dim=1).amax(dim=0).argmin())
    instants: list[float] = rows[:, fastest].tolist()
    return instants


def _collect(group: RankGroup, data: bytes) -> list[bytes]:
    """Return every process's bytes, of any length, on process 0; nothing elsewhere."""
    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(group.device)
    size = torch.tensor([[len(data)]], dtype=torch.int64, device=group.device)
    sizes = group.all_gather(size, count=False)[:, 0].tolist()
    transport, where = group.transport, "gathering the trace"
    if transport.processes == 1:
        return [data]
    if transport.process != 0:
        transport.exchange([(0, mine)], [], where).wait(group.timeout_s)
        return []
    others = [torch.empty(n, dtype=torch.uint8, device=group.device) for n in sizes[1:]]
    receives = list(enumerate(others, start=1))
    transport.exchange([], receives, where).wait(group.timeout_s)
    return [data, *(bytes(part.cpu().numpy()) for part in others)]
