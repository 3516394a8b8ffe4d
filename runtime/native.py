"""The compiled kernels behind argument checks. The only module that imports ``_C``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

try:
    from gossamer.runtime import _C
    from gossamer.runtime._C import AveragePlan, Exchange, Group
except ImportError as error:
    raise ImportError(
        "gossamer's compiled module is missing; build it with "
        "'pip install --no-build-isolation -e .' in the repository, or 'pip install .'"
    ) from error

__all__ = [
    "ALIGNMENT",
    "DTYPES",
    "AveragePlan",
    "Exchange",
    "Group",
    "Terms",
    "build_info",
    "combine",
    "fill",
    "fill_words",
    "num_threads",
    "row_dot",
    "triad",
    "use_threads",
    "weighted_sum",
]

ALIGNMENT = 64
"""Rows and parameters start at multiples of this many bytes: a cache line, a vector register."""

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_DISTRIBUTIONS = {"uniform": 0, "normal": 1, "rademacher": 2}


def build_info() -> dict[str, str | bool]:
    """Say what this installation can do; a run writes it into its summary."""
    return {
        "instruction_set": _C.instruction_set(),
        "torch": torch.__version__,
        "cuda": torch.cuda.is_available(),
    }


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


_num_threads: int | None = None


def use_threads(count: int | None) -> None:
    """Let the kernels use up to ``count`` threads; None, as at first: as many as torch does.

    Bits do not depend on it. Small calls stay on the calling thread.
    """
    global _num_threads
    _num_threads = count


def num_threads() -> int:
    """Return how many threads the kernels may use."""
    return _num_threads or torch.get_num_threads()


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
        return _weighted_sum_torch(blocks, terms, out, a, y)
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
        return _weighted_sum_torch(blocks, terms, out, 0.0, None)
    _C.combine(table, weights, target, out.shape[1], DTYPES[out.dtype], num_threads())
    return out


@torch.no_grad()
def _weighted_sum_torch(
    blocks: Sequence[Tensor], terms: Terms, out: Tensor, a: float, y: Tensor | None
) -> Tensor:
    """The same sums on a device that the C++ kernel cannot reach: equal to rounding."""
    table = [row for block in blocks for row in block]
    accumulator = torch.float64 if out.dtype == torch.float64 else torch.float32
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
    if not x.is_cpu:
        with torch.no_grad():
            return (x.double() * y.double()).sum(dim=1, keepdim=True)
    out = torch.empty(x.shape[0], 1, dtype=torch.float64)
    _C.row_dot(a, b, x.shape[1], DTYPES[x.dtype], out.data_ptr(), num_threads())
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


def fill(
    distribution: str, out: Tensor, key: int, counter: tuple[int, int, int], begin: int = 0
) -> Tensor:
    """Fill ``out`` with elements begin.. of the Philox stream (key; c1, c2, c3).

    Args:
        distribution: ``uniform`` in (0, 1), ``normal`` or ``rademacher``.
        out: float32 or float64, contiguous, on the CPU.
        key: 64 bits.
        counter: three 32-bit words.
        begin: position in the stream of the first element.

    Returns:
        ``out``.
    """
    if out.dtype not in (torch.float32, torch.float64) or not out.is_contiguous() or out.is_cuda:
        raise ValueError(
            f"{distribution}_: out must be contiguous float32 or float64 on the CPU, got "
            f"{out.dtype} with strides {out.stride()} on {out.device}"
        )
    _C.fill(
        _DISTRIBUTIONS[distribution],
        out.data_ptr(),
        out.numel(),
        begin,
        out.dtype == torch.float64,
        key,
        *counter,
    )
    return out


def fill_words(count: int, key: int, counter: tuple[int, int, int], begin: int = 0) -> np.ndarray:
    """Return ``count`` raw 32-bit words of the Philox stream (key; c1, c2, c3) as uint32."""
    words = np.empty(count, dtype=np.uint32)
    _C.fill_words(words.ctypes.data, count, begin, key, *counter)
    return words
