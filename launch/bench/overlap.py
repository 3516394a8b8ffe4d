"""``bench overlap``: an average that progresses while the caller computes.

A step computes and averages its row with a neighbour. Apart from each other, one after the other,
and with ``neighbor_average_async`` beside the computation: the time saved is a share of the
shorter of the two, which is all that can be hidden.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from gossamer.launch.bench.measure import DTYPES, Options, Row, spread
from gossamer.launch.bench.world import TIMEOUT_S, join_world, start_world
from gossamer.runtime import Communicator
from gossamer.runtime.transports.select import detect_launcher
from gossamer.topologies import build

__all__ = ["OverlapRequest", "overlap"]

_SIDE = 64
"""Rows and columns of the matrices that a computation multiplies, as often as it takes: one product
takes less than the shortest average, and stays in a core's cache."""


@dataclass(frozen=True)
class OverlapRequest:
    """What to measure.

    Attributes:
        transports: Gossamer's, one world each.
        ranks: numbers of processes to start.
        options: sizes and samples.
    """

    transports: Sequence[str]
    ranks: Sequence[int]
    options: Options

    def arguments(self, transport: str) -> list[str]:
        """Return the command line that asks for one transport in a launched world."""
        o = self.options
        flags = {"min-bytes": o.min_bytes, "max-bytes": o.max_bytes, "factor": o.factor}
        flags |= {"iters": o.iters, "warmup": o.warmup}
        words = [f"--{name}={value}" for name, value in flags.items()]
        return [*words, f"--dtype={o.dtype}", f"--transports={transport}"]


def overlap(request: OverlapRequest, progress: Callable[[str], object]) -> list[Row] | None:
    """Measure; a row of figures for every transport, n and size.

    Under torchrun or mpirun the launched processes are the ranks, and the first transport is used;
    None on all but process 0.

    Raises:
        ConfigError: the processes cannot be started, or failed.
    """
    if detect_launcher() != "none":
        return _in_world(request.transports[0], request.options)
    rows: list[Row] = []
    for transport in request.transports:
        for n in request.ranks:
            progress(f"{transport}, {n} ranks")
            document: dict[str, Any] = start_world(n, ["overlap", *request.arguments(transport)])
            rows += document["rows"]
    return rows


def _in_world(name: str, options: Options) -> list[Row] | None:
    transport = join_world(name).transport
    comm = Communicator(build("ring", transport.processes), transport, timeout_s=TIMEOUT_S)
    rows = [_measure(comm, count, options) for count in options.counts()]
    comm.close()
    dist.destroy_process_group()
    return rows if transport.process == 0 else None


def _measure(comm: Communicator, count: int, options: Options) -> Row:
    dtype = DTYPES[options.dtype]
    x, out = comm.alloc(count, dtype), comm.alloc(count, dtype)
    x.fill_(1.0)
    a, b = (torch.rand(_SIDE, _SIDE) for _ in range(2))
    product = torch.empty(_SIDE, _SIDE)
    repeats = 1

    def compute() -> None:
        for _ in range(repeats):
            torch.mm(a, b, out=product)

    def communicate() -> None:
        comm.neighbor_average(x, out=out)

    def in_turn() -> None:
        communicate()
        compute()

    def beside() -> None:
        work = comm.neighbor_average_async(x, out=out)
        compute()
        work.wait()

    def timed(case: Callable[[], None]) -> float:
        comm.barrier()
        begin = time.perf_counter()
        case()
        return time.perf_counter() - begin

    def slowest(mine: torch.Tensor) -> torch.Tensor:
        return comm.all_reduce(mine.reshape(1, -1), "max", count=False)

    # As much computation as communication: the median of a few decides, on all ranks alike. A
    # single product says little of many, so that the second guess starts from the first.
    for _ in range(2):
        first = torch.tensor([[timed(case) for case in (compute, communicate)] for _ in range(9)])
        computed, average = slowest(first).reshape(9, 2).median(dim=0).values.tolist()
        repeats = max(1, round(repeats * average / computed))

    cases = (compute, communicate, in_turn, beside)
    mine = torch.zeros(options.iters, len(cases), dtype=torch.float64)
    for k in range(-options.warmup, options.iters):
        for i in range(len(cases)):
            c = (i + k) % len(cases)  # in another order each time
            seconds = timed(cases[c])
            if k >= 0:
                mine[k, c] = seconds
    times = slowest(mine).reshape(options.iters, len(cases)).T.tolist()
    row: Row = {"transport": comm.transport.name, "ranks": comm.n, "dtype": options.dtype}
    row["bytes"] = count * dtype.itemsize
    for name, seconds in zip(("compute", "average", "in_turn", "overlap"), times, strict=True):
        found = spread(seconds)
        row |= {f"{name}_us": 1e6 * found.median}
        row |= {f"{name}_us_p10": 1e6 * found.p10, f"{name}_us_p90": 1e6 * found.p90}
    shorter = min(row["compute_us"], row["average_us"])
    return row | {"saved": (row["in_turn_us"] - row["overlap_us"]) / shorter}
