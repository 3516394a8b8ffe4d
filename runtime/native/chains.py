"""Metropolis-Hastings chains over the columns of a batch: the kernels behind argument checks.

On a CPU and a GPU by compiled kernels, with the same moves; on a GPU that the build has no kernels
for, on the CPU.
"""

# Shapes: b examples with two rows each, B with two columns each, C = 2B columns.

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from gossamer.runtime.native.compiled import _C, num_threads, stream_of

__all__ = ["Moves", "chain_moves"]

_CARRY = {None: 0, "stale": 1, "fresh": 2}


@dataclass(frozen=True)
class Moves:
    """What the chains did in each row, all on the device of the scores.

    Attributes:
        counts: int32 (2b, C), how often each column was recorded as the state. Rows of ``counts``
            and ``held`` add up to ``proposed`` less the burn-in.
        held: int32 (2b,), how often the state from an earlier visit was recorded.
        state: int64 (2b,), column of the state after the row; -1 where it still is the one from an
            earlier visit, or there is none.
        score: float32 (2b,), of that state; -inf where there is none.
        accepted: int32 (2b,), proposals that were taken.
        proposed: int32 (2b,), proposals in all.
    """

    counts: Tensor
    held: Tensor
    state: Tensor
    score: Tensor
    accepted: Tensor
    proposed: Tensor


def chain_moves(
    scores: Tensor,
    exponentials: Tensor,
    row_ids: Tensor,
    column_ids: Tensor,
    held_scores: Tensor,
    *,
    burn_in: Tensor,
    carry: Literal["stale", "fresh"] | None = None,
    columns: tuple[range, range] | None = None,
    raw: bool = False,
) -> Moves:
    """Run every example's chain through the columns of the batch (EMC^2, arXiv:2404.10575).

    Row r is view 0 of example r, row b + r its view 1; so are columns k and B + k. A row proposes,
    in order, the columns of other examples, and moves to column j where ``scores[r, j] +
    exponentials[r, j]`` exceeds the state's score: log U < new - old, as one rounded sum, so that
    the moves do not depend on the instruction set, the number of threads or the device. Ties are
    not taken, and NaN never is, nor left. A chain without a state takes the first proposal above
    -inf, and nothing is recorded before.

    After the t-th test of a row, t from 1, the state is recorded where t exceeds the row's burn-in:
    under its column, which may be one that the example's view-0 row reached, or as held.

    Args:
        scores: (2b, C) float32, rows contiguous: beta <z_r, z_k>.
        exponentials: (2b, C) float32, rows contiguous: -log U, U uniform in (0, 1).
        row_ids: int64 (b,), the examples of the rows.
        column_ids: int64 (B,), the examples of the columns; one may be there several times.
        held_scores: float32 (2b,), of the state from an earlier visit; -inf where there is none.
        burn_in: int32 (2b,), tests of each row after which nothing is recorded.
        carry: None: each row has a chain of its own. Else the chain of an example goes on from its
            view-0 row into its view-1 row, with its score as it is (``stale``) or evaluated there
            (``fresh``: ``scores[b + r, state]``, or ``held_scores[b + r]``).
        columns: what the rows of view 0 and of view 1 scan, steps of 1; all of them when None.
            Image-text pairs: ``(range(B, 2 * B), range(B))``.
        raw: ``burn_in`` is a column instead: states are recorded after those beyond it, as the
            released code does it.

    Raises:
        ValueError: shapes, dtypes, devices or memory layouts do not fit.
    """
    b, size = len(row_ids), len(column_ids)
    rows, width = 2 * b, 2 * size
    for name, tensor, shape, dtype in (
        ("scores", scores, (rows, width), torch.float32),
        ("exponentials", exponentials, (rows, width), torch.float32),
        ("row_ids", row_ids, (b,), torch.int64),
        ("column_ids", column_ids, (size,), torch.int64),
        ("held_scores", held_scores, (rows,), torch.float32),
        ("burn_in", burn_in, (rows,), torch.int32),
    ):
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != scores.device:
            raise ValueError(
                f"chain_moves: {name} must be {shape} {dtype} on {scores.device}, got "
                f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"chain_moves: rows of {name} must be contiguous, got strides {tensor.stride()}"
            )
    if carry not in _CARRY:
        raise ValueError(f"chain_moves: carry must be None, 'stale' or 'fresh', got {carry!r}")
    scanned = columns or (range(width), range(width))
    for part in scanned:
        if part.step != 1 or not 0 <= part.start <= part.stop <= width:
            raise ValueError(f"chain_moves: columns must be parts of range({width}), got {part}")
    if raw:
        burn_in = _proposals_up_to(burn_in, row_ids, column_ids, scanned)
    if scores.is_cuda and not _C.built_with_cuda():
        inputs = (scores, exponentials, row_ids, column_ids, held_scores)
        there = chain_moves(
            *(tensor.cpu() for tensor in inputs),
            burn_in=burn_in.cpu(),
            carry=carry,
            columns=scanned,
        )
        return Moves(*(getattr(there, f.name).to(scores.device) for f in fields(Moves)))

    moves = Moves(
        counts=scores.new_zeros(rows, width, dtype=torch.int32),
        held=torch.empty_like(burn_in),
        state=torch.empty_like(burn_in, dtype=torch.int64),
        score=torch.empty_like(held_scores),
        accepted=torch.empty_like(burn_in),
        proposed=torch.empty_like(burn_in),
    )
    job = (
        b,
        width,
        (scores.data_ptr(), scores.stride(0)),
        (exponentials.data_ptr(), exponentials.stride(0)),
        row_ids.data_ptr(),
        column_ids.data_ptr(),
        [(part.start, part.stop) for part in scanned],
        held_scores.data_ptr(),
        burn_in.data_ptr(),
        _CARRY[carry],
        [getattr(moves, f.name).data_ptr() for f in fields(Moves)],
    )
    if scores.is_cuda:
        with torch.cuda.device(scores.device):
            _C.chain_moves_cuda(job, stream_of(scores))
    elif scores.is_cpu:
        _C.chain_moves(job, num_threads())
    else:
        raise ValueError(f"chain_moves: scores are on {scores.device}; use the CPU or a GPU")
    return moves


def _proposals_up_to(
    last: Tensor, row_ids: Tensor, column_ids: Tensor, scanned: tuple[range, range]
) -> Tensor:
    """Return int32 (2b,), how many of the columns 0 .. last each row proposes."""
    b, place = len(row_ids), torch.arange(2 * len(column_ids), device=last.device)
    other = (row_ids[:, None] != column_ids).repeat(1, 2)
    proposals = [
        other & (place >= part.start) & (place < part.stop) & (place <= bound[:, None])
        for part, bound in zip(scanned, (last[:b], last[b:]), strict=True)
    ]
    return torch.cat(proposals).sum(dim=1, dtype=torch.int32)
