"""Weighted sums of rows, inner products and the triad: the kernels behind argument checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gossamer.runtime.native.compiled import _C, DTYPES, num_threads, stream_of

__all__ = ["Terms", "add_rows", "combine", "row_dot", "triad", "weighted_sum"]


@dataclass(frozen=True)
class Terms:
    """The terms of several weighted sums in compressed rows, in the order they are added.

    Attributes:
        indptr: int64 (outputs + 1,); the terms of output r are ``indptr[r]:indptr[r + 1]``.
        columns: int64, per term its row in the table of rows.
        weights: float64, per term; rounded once to the accumulator's type.
    """

    indptr: np.ndarray
    columns: np.ndarray
    weights: np.ndarray

    def __post_init__(self) -> None:
        for name, dtype in (("indptr", np.int64), ("columns", np.int64), ("weights", np.float64)):
            array = getattr(self, name)
            if array.dtype != dtype or not array.flags.c_contiguous:
                raise ValueError(f"Terms.{name}: must be contiguous {dtype}, got {array.dtype}")


_Rows = tuple[int, int, int]


def _rows(name: str, rows: Tensor, like: Tensor) -> _Rows:
    """Return (address, count, bytes between rows) for the kernels, after the checks."""
    shape = rows.shape
    if len(shape) != 2 or shape[1] != like.shape[1] or rows.dtype != like.dtype:
        raise ValueError(
            f"{name}: must be (rows, {like.shape[-1]}) {like.dtype}, "
            f"got {tuple(shape)} {rows.dtype}"
        )
    if rows.device != like.device:
        raise ValueError(f"{name}: is on {rows.device}, the output on {like.device}")
    stride, step = rows.stride()
    if step != 1 and shape[1] > 1:
        raise ValueError(f"{name}: rows must be contiguous, got strides {rows.stride()}")
    return rows.data_ptr(), shape[0], stride * rows.itemsize


def weighted_sum(
    blocks: Sequence[Tensor],
    terms: Terms,
    out: Tensor,
    *,
    axpy: tuple[float, Tensor] | None = None,
    wide: bool = False,
) -> Tensor:
    """Write ``out[r] = sum_t weights[t] * table[columns[t]] + a * y[r]`` for every row r.

    Terms are added in order, the axpy last; products and sums round separately, in float32 (in
    float64 for float64 rows, or with ``wide``), so the bits depend on nothing else.

    Args:
        blocks: tensors (rows_k, d) whose rows, one after another, form the table.
        terms: what to add to what.
        out: (outputs, d), float32, float64, bfloat16 or float16; its rows may be rows of the table
            (each is stored when the last sum that reads it is done).
        axpy: ``(a, y)`` with y shaped like ``out``.
        wide: accumulate in float64 whatever the dtype.

    Returns:
        ``out``.

    Raises:
        ValueError: shapes, dtypes, devices or memory layouts do not fit, a term names no row of the
            table, or a row of ``out`` overlaps a source in part.
    """
    code = DTYPES.get(out.dtype)
    if code is None:
        raise ValueError(f"weighted_sum: dtype {out.dtype} is not one of {list(DTYPES)}")
    target = _rows("weighted_sum: out", out, out)
    table = [_rows("weighted_sum: block", block, out) for block in blocks]
    if len(terms.indptr) != target[1] + 1:
        raise ValueError(f"weighted_sum: {len(terms.indptr) - 1} sums for {target[1]} rows")
    a, y = axpy if axpy is not None else (0.0, None)
    addend = None
    if y is not None:
        addend = _rows("weighted_sum: axpy", y, out)
        if addend[1] != target[1]:
            raise ValueError(f"weighted_sum: axpy is {tuple(y.shape)}, out {tuple(out.shape)}")
    if not out.is_cpu:
        return _weighted_sum_elsewhere(blocks, terms, out, a, y, wide)
    _C.weighted_sum(
        table,
        terms.indptr,
        terms.columns,
        terms.weights,
        target,
        addend,
        a,
        out.shape[1],
        code,
        wide,
        num_threads(),
    )
    return out


def combine(blocks: Sequence[Tensor], weights: np.ndarray, out: Tensor) -> Tensor:
    """Write ``out[r] = sum_k weights[r, k] * blocks[k][r]``: ``weighted_sum`` row by row.

    Args:
        blocks: tensors like ``out``; ``out`` may be one of them.
        weights: float64 (blocks,), or (rows * blocks,) with the blocks of a row side by side.
        out: (rows, d).

    Returns:
        ``out``.

    Raises:
        ValueError: as ``weighted_sum`` does.
    """
    target = _rows("combine: out", out, out)
    table = [_rows("combine: term", block, out) for block in blocks]
    count, rows = len(table), target[1]
    if any(block[1] != rows for block in table) or len(weights) not in (count, rows * count):
        raise ValueError(
            f"combine: {len(weights)} weights and blocks of {[block[1] for block in table]} rows "
            f"for {rows} rows"
        )
    if not out.is_cpu:
        terms = Terms(
            indptr=np.arange(rows + 1, dtype=np.int64) * count,
            columns=np.arange(count * rows, dtype=np.int64).reshape(count, rows).T.reshape(-1),
            weights=np.broadcast_to(weights.reshape(-1, count), (rows, count)).reshape(-1),
        )
        return _weighted_sum_elsewhere(blocks, terms, out, 0.0, None, False)
    _C.combine(table, weights, target, out.shape[1], DTYPES[out.dtype], num_threads())
    return out


@torch.no_grad()
def _weighted_sum_elsewhere(
    blocks: Sequence[Tensor], terms: Terms, out: Tensor, a: float, y: Tensor | None, wide: bool
) -> Tensor:
    """The same sums on another device than the CPU: the same bits where there is a kernel."""
    if wide or not out.is_cuda or not _C.built_with_cuda():
        return _weighted_sum_torch(blocks, terms, out, a, y, wide)
    sources = [_rows("block", rows, out) for rows in (*blocks, *([] if y is None else [y]))]
    result = out
    if any(_meet(rows, _rows("out", out, out), out) for rows in sources):
        result = torch.empty_like(out, memory_format=torch.contiguous_format)
    with torch.cuda.device(out.device):
        _C.weighted_sum_cuda(
            sources[: len(blocks)],
            terms.indptr,
            terms.columns,
            terms.weights,
            _rows("out", result, out),
            None if y is None else sources[-1],
            a,
            out.shape[1],
            DTYPES[out.dtype],
            stream_of(out),
        )
    return out if result is out else out.copy_(result)


def _meet(a: _Rows, b: _Rows, like: Tensor) -> bool:
    """Say whether the ranges from the first row to the end of the last overlap."""
    (a_at, a_count, a_stride), (b_at, b_count, b_stride) = a, b
    row_bytes = like.shape[1] * like.itemsize
    if a_count == 0 or b_count == 0:
        return False
    return (
        a_at < b_at + (b_count - 1) * b_stride + row_bytes
        and b_at < a_at + (a_count - 1) * a_stride + row_bytes
    )


@torch.no_grad()
def _weighted_sum_torch(
    blocks: Sequence[Tensor], terms: Terms, out: Tensor, a: float, y: Tensor | None, wide: bool
) -> Tensor:
    """The same sums where there is no kernel: equal to rounding."""
    table = [row for block in blocks for row in block]
    accumulator = torch.float64 if wide or out.dtype == torch.float64 else torch.float32
    sums = []
    for r in range(out.shape[0]):
        total = torch.zeros(out.shape[1], dtype=accumulator, device=out.device)
        for t in range(terms.indptr[r], terms.indptr[r + 1]):
            total.add_(table[terms.columns[t]], alpha=float(terms.weights[t]))
        if y is not None:
            total.add_(y[r], alpha=a)
        sums.append(total.to(out.dtype))
    return out.copy_(torch.stack(sums)) if sums else out


def row_dot(x: Tensor, y: Tensor) -> Tensor:
    """Return the inner product of each row of ``x`` with the same row of ``y``, in float64.

    The bits of a row's result depend on that row alone (torch's reductions depend on how many rows
    stand together).

    Args:
        x: (rows, d), rows contiguous, any floating dtype.
        y: like ``x``; may be ``x``.

    Returns:
        (rows, 1) float64 on the device of ``x``.

    Raises:
        ValueError: shapes, dtypes, devices or memory layouts do not fit.
    """
    a = _rows("row_dot: x", x, x)
    b = _rows("row_dot: y", y, x)
    if x.dtype not in DTYPES or x.shape != y.shape:
        raise ValueError(f"row_dot: {tuple(x.shape)} {x.dtype} with {tuple(y.shape)}")
    out = torch.empty(x.shape[0], 1, dtype=torch.float64, device=x.device)
    if x.is_cuda and _C.built_with_cuda():
        with torch.cuda.device(x.device):
            _C.row_dot_cuda(a, b, x.shape[1], DTYPES[x.dtype], out.data_ptr(), stream_of(x))
        return out
    if not x.is_cpu:
        with torch.no_grad():
            return (x.double() * y.double()).sum(dim=1, keepdim=True)
    _C.row_dot(a, b, x.shape[1], DTYPES[x.dtype], out.data_ptr(), num_threads())
    return out


def add_rows(out: Tensor, g: Tensor, factors: Tensor) -> Tensor:
    """Add ``sum_r factors[r] * g[r]`` to ``out``, reading each row once; nothing is allocated.

    Rows are added in order, products and sums rounded separately, in float32 or float64, so the
    bits are the same on every machine and on a GPU. Rows whose factor is 0 are left out, whatever
    they hold: infinities do not become NaN.

    Args:
        out: (d,) contiguous, float32 or float64; overlaps no row of ``g``.
        g: (m, d), rows contiguous, dtype and device as ``out``.
        factors: (m,), on the same device.

    Returns:
        ``out``.

    Raises:
        ValueError: shapes, dtypes, devices or memory layouts do not fit.
    """
    if out.dtype not in (torch.float32, torch.float64) or out.dim() != 1 or not out.is_contiguous():
        raise ValueError(
            "add_rows: out must be (d,) contiguous float32 or float64, got "
            f"{tuple(out.shape)} {out.dtype} with strides {out.stride()}"
        )
    like = out[None]
    rows, code, place = _rows("add_rows: g", g, like), DTYPES[out.dtype], out.data_ptr()
    if factors.shape != g.shape[:1] or factors.device != g.device:
        raise ValueError(
            f"add_rows: factors are {tuple(factors.shape)} on {factors.device}, must be "
            f"({len(g)},) on {g.device}"
        )
    if _meet(rows, (place, 1, 0), like):
        raise ValueError("add_rows: out must be no row of g")
    wide = factors.to(torch.float64).contiguous()
    if out.is_cpu:
        _C.add_rows(rows, wide.data_ptr(), place, len(out), code, num_threads())
    elif out.is_cuda and _C.built_with_cuda():
        with torch.cuda.device(out.device):
            _C.add_rows_cuda(rows, wide.data_ptr(), place, len(out), code, stream_of(out))
    else:
        used = wide != 0
        out.addmv_(g[used].mT, wide[used].to(out.dtype))
    return out


def triad(a: Tensor, b: Tensor, c: Tensor, factor: float, *, stream: bool) -> None:
    """Write ``a = b + factor * c`` on this thread: what the speed of memory is measured with.

    Args:
        a: (m,) float64, contiguous, on the CPU; overlaps neither ``b`` nor ``c``.
        b: like ``a``.
        c: like ``a``.
        factor: of ``c``.
        stream: write past the caches.

    Raises:
        ValueError: shapes, dtypes, devices or memory layouts do not fit.
    """
    for array in (a, b, c):
        if array.dtype != torch.float64 or not array.is_cpu or not array.is_contiguous():
            raise ValueError(f"triad: needs contiguous float64 on the CPU, got {array.dtype}")
        if array.shape != a.shape or array.dim() != 1:
            raise ValueError(f"triad: shapes {tuple(a.shape)} and {tuple(array.shape)}")
    _C.triad(a.data_ptr(), b.data_ptr(), c.data_ptr(), factor, len(a), stream)
