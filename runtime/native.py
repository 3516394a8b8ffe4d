"""The compiled kernels behind argument checks. The only module that imports ``_C``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

try:
    from gossamer.runtime import _C
except ImportError as error:
    raise ImportError(
        "gossamer's compiled module is missing; build it with "
        "'pip install --no-build-isolation -e .' in the repository, or 'pip install .'"
    ) from error

__all__ = ["ALIGNMENT", "Terms", "build_info", "fill", "fill_words", "row_dot", "weighted_sum"]

ALIGNMENT = 64
"""Rows and parameters start at multiples of this many bytes: a cache line, a vector register."""

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
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


def _addresses(rows: Tensor) -> np.ndarray:
    """Return the address of each row of a (rows, d) tensor as uint64."""
    count, stride = rows.shape[0], rows.stride(0) * rows.element_size()
    return np.uint64(rows.data_ptr()) + np.arange(count, dtype=np.uint64) * np.uint64(stride)


def _check_rows(name: str, rows: Tensor, like: Tensor) -> None:
    if rows.dim() != 2 or rows.shape[1] != like.shape[1] or rows.dtype != like.dtype:
        raise ValueError(
            f"{name}: must be (rows, {like.shape[1]}) {like.dtype}, "
            f"got {tuple(rows.shape)} {rows.dtype}"
        )
    if rows.device != like.device:
        raise ValueError(f"{name}: is on {rows.device}, the output on {like.device}")
    if rows.shape[1] > 1 and rows.stride(1) != 1:
        raise ValueError(f"{name}: rows must be contiguous, got strides {rows.stride()}")


@torch.no_grad()
def weighted_sum(
    blocks: Sequence[Tensor],
    terms: Terms,
    out: Tensor,
    *,
    axpy: tuple[float, Tensor] | None = None,
    wide: bool = False,
    staged: bool = False,
) -> Tensor:
    """Write ``out[r] = sum_t weights[t] * table[columns[t]] + a * y[r]`` for every row r.

    Terms are added in order, the axpy last; products and sums round separately, in float32 (in
    float64 for float64 rows, or with ``wide``), so the bits depend on nothing else.

    Args:
        blocks: tensors (rows_k, d) whose rows, one after another, form the table.
        terms: what to add to what.
        out: (outputs, d), float32, float64, bfloat16 or float16; may be one of the blocks.
        axpy: ``(a, y)`` with y shaped like ``out``.
        wide: accumulate in float64 whatever the dtype.
        staged: needed where a row of ``out`` is a source of another row of ``out``.

    Returns:
        ``out``.

    Raises:
        ValueError: shapes, dtypes, devices or memory layouts do not fit.
    """
    if out.dtype not in _DTYPES:
        raise ValueError(f"weighted_sum: dtype {out.dtype} is not one of {list(_DTYPES)}")
    _check_rows("weighted_sum: out", out, out)
    for block in blocks:
        _check_rows("weighted_sum: block", block, out)
    if len(terms.indptr) != out.shape[0] + 1:
        raise ValueError(f"weighted_sum: {len(terms.indptr) - 1} sums for {out.shape[0]} rows")
    num_rows = sum(block.shape[0] for block in blocks)
    if len(terms.columns) and not 0 <= terms.columns.min() <= terms.columns.max() < num_rows:
        raise ValueError(f"weighted_sum: a term names a row outside the table of {num_rows}")
    a, y = axpy if axpy is not None else (0.0, None)
    if y is not None:
        _check_rows("weighted_sum: axpy", y, out)
        if y.shape != out.shape:
            raise ValueError(f"weighted_sum: axpy is {tuple(y.shape)}, out {tuple(out.shape)}")
    if not out.is_cpu:
        return _weighted_sum_torch(blocks, terms, out, a, y)
    if out.numel() == 0:
        return out
    table = np.concatenate([_addresses(block) for block in blocks])
    targets = _addresses(out)
    addends = _addresses(y) if y is not None else None
    _C.weighted_sum(
        table.ctypes.data,
        num_rows,
        terms.indptr.ctypes.data,
        terms.columns.ctypes.data,
        terms.weights.ctypes.data,
        targets.ctypes.data,
        out.shape[0],
        addends.ctypes.data if addends is not None else 0,
        a,
        out.shape[1],
        _DTYPES[out.dtype],
        wide,
        staged,
    )
    return out


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


@torch.no_grad()
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
    _check_rows("row_dot: y", y, x)
    _check_rows("row_dot: x", x, x)
    if x.dtype not in _DTYPES or x.shape != y.shape:
        raise ValueError(f"row_dot: {tuple(x.shape)} {x.dtype} with {tuple(y.shape)}")
    if not x.is_cpu:
        return (x.double() * y.double()).sum(dim=1, keepdim=True)
    out = torch.zeros(x.shape[0], 1, dtype=torch.float64)
    if x.numel():
        a, b = _addresses(x), _addresses(y)
        _C.row_dot(
            a.ctypes.data, b.ctypes.data, len(a), x.shape[1], _DTYPES[x.dtype], out.data_ptr()
        )
    return out


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
