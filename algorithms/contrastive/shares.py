"""Work that ranks divide, and what each did brought together on all."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gossamer.runtime.collectives import RankGroup

__all__ = ["in_shares", "share_of"]


def share_of(count: int, n: int, rank: int) -> range:
    """Return the rank's part of 0..count-1; parts are consecutive and differ by one at most."""
    return range(rank * count // n, (rank + 1) * count // n)


def in_shares(comm: RankGroup, count: int, work: Callable[[range], Tensor]) -> Tensor:
    """Return the rows (count, m), float64, that ``work`` makes of all parts.

    Every process calls it; the bytes are not the algorithm's.

    Args:
        comm: each rank does its part.
        count: of rows, at least 1.
        work: the rows (len(part), m) of a part, which is not empty.
    """
    parts = [share_of(count, comm.n, rank) for rank in comm.ranks]
    done = [work(part) if part else None for part in parts]
    # A process whose parts are all empty learns the width from the others.
    widths = [[0 if rows is None else rows.shape[1]] for rows in done]
    width = int(comm.all_reduce(torch.tensor(widths, device=comm.device), "max", count=False))
    shape = (comm.local, -(-count // comm.n), width)
    padded = torch.zeros(shape, dtype=torch.float64, device=comm.device)
    for block, rows in zip(padded, done, strict=True):
        if rows is not None:
            block[: len(rows)] = rows
    gathered = comm.all_gather(padded.flatten(1), count=False).view(comm.n, *shape[1:])
    lengths = [len(share_of(count, comm.n, rank)) for rank in range(comm.n)]
    return torch.cat([rows[:k] for rows, k in zip(gathered, lengths, strict=True)])
