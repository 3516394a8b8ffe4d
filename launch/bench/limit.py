"""What memory allows: the bytes that an operation must move over the speed of a triad.

The triad a = b + s c runs in all processes at once. Its three arrays count, 24 bytes an element;
ordinary stores, which read the lines they write, move a fourth that does not count. Of both kinds
of stores the faster one is taken.
"""

from __future__ import annotations

import os
import time

import torch

from gossamer.runtime import Communicator
from gossamer.runtime.native import triad
from gossamer.topologies import Round

__all__ = ["FORMULAS", "MemorySpeed", "bytes_to_move", "memory_bytes"]

_ELEMENTS = 8 << 20  # 64 MiB an array: well beyond the caches
_ARRAYS = 3

FORMULAS = (
    "average: every rank reads its own row and its neighbours' and writes one: "
    "sum over ranks of (degree + 2) rows",
    "all_reduce: each row is read once and each result written once: 2 n rows",
    "broadcast: n - 1 rows are read and n - 1 written",
    "all_gather: every rank reads n rows and writes n: 2 n^2 rows",
    "a row that several ranks read at about the same time may come from a cache they share: 'once' "
    "is the share\n  where each row is read from memory once (2 n, 2 n, n, n + n^2 rows), "
    "which rows beyond the caches cannot beat",
)


def bytes_to_move(kind: str, n: int, round_: Round, row_bytes: int) -> tuple[int, int]:
    """Return the bytes that all ranks together read and write, and those of reading rows once."""
    rows = {
        "average": (len(round_.sources) + 2 * n, 2 * n),
        "all_reduce": (2 * n, 2 * n),
        "broadcast": (2 * (n - 1), n),
        "all_gather": (2 * n * n, n + n * n),
    }
    each, once = rows[kind]
    return each * row_bytes, once * row_bytes


def memory_bytes() -> int:
    """Return how much memory this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class MemorySpeed:
    """The triad in all processes at once, between barriers; sampled now and then during a run."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._arrays = [torch.ones(_ELEMENTS, dtype=torch.float64) for _ in range(_ARRAYS)]
        self._seconds: dict[bool, list[float]] = {True: [], False: []}
        self.sample(1)
        for seconds in self._seconds.values():
            seconds.clear()

    def sample(self, count: int) -> None:
        """Run it ``count`` times with either kind of stores; every process calls it."""
        a, b, c = self._arrays
        for _ in range(count):
            for stream, seconds in self._seconds.items():
                self._comm.barrier()
                begin = time.perf_counter()
                triad(a, b, c, 3.0, stream=stream)
                seconds.append(time.perf_counter() - begin)

    def bytes_per_s(self) -> float:
        """Return all processes' bytes over the slowest one's time, the median of the samples."""
        mine = torch.tensor([[*self._seconds[True], *self._seconds[False]]], dtype=torch.float64)
        slowest = self._comm.all_reduce(mine, "max", count=False).reshape(2, -1)
        moved = self._comm.n * _ARRAYS * 8 * _ELEMENTS
        return moved / float(slowest.median(dim=1).values.min())
