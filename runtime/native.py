"""The compiled kernels behind argument checks. The only module that imports ``_C``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

try:
    from gossamer.runtime import _C
    from gossamer.runtime._C import AveragePlan, DeviceGroup, Exchange, Group
except ImportError as error:
    raise ImportError(
        "gossamer's compiled module is missing; build it with "
        "'pip install --no-build-isolation -e .' in the repository, or 'pip install .'"
    ) from error

__all__ = [
    "ALIGNMENT",
    "DTYPES",
    "AveragePlan",
    "DeviceGroup",
    "Direction",
    "Exchange",
    "Group",
    "Piece",
    "Terms",
    "add_random",
    "build_info",
    "combine",
    "fill",
    "fill_random",
    "fill_words",
    "normals_of_words",
    "num_threads",
    "row_dot",
    "subtract_random",
    "triad",
    "use_threads",
    "weighted_sum",
    "words_",
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
        "cuda_kernels": _C.built_with_cuda(),
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
            _stream(out),
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


@dataclass(frozen=True)
class Direction:
    """One stream of random numbers per tensor: z of a direction in parameter space.

    Attributes:
        distribution: ``uniform`` in (0, 1), ``normal`` or ``rademacher``.
        key: 64 bits.
        counter: (c2, c3), 32-bit words; c1 is the tensor's.
        mask: (c2, c3, limit): z is 0 at the elements whose word of this stream of the same key is
            below ``limit``, 0..2**32.
    """

    distribution: str
    key: int
    counter: tuple[int, int]
    mask: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.distribution not in _DISTRIBUTIONS:
            raise ValueError(
                f"distribution: '{self.distribution}' is not one of {list(_DISTRIBUTIONS)}"
            )
        _check_words("counter", *self.counter)
        if not 0 <= self.key < 2**64:
            raise ValueError(f"key: must be in 0..2**64 - 1, got {self.key}")
        if self.mask is not None:
            _check_words("mask", *self.mask[:2])
            if not 0 <= self.mask[2] <= 2**32:
                raise ValueError(f"mask: limit must be in 0..2**32, got {self.mask[2]}")

    def _code(self) -> tuple[int, tuple[int, int, int], tuple[int, int, int] | None]:
        return _DISTRIBUTIONS[self.distribution], (self.key, *self.counter), self.mask


class Piece(NamedTuple):
    """Elements of a row that are elements ``begin``.. of the streams of one tensor.

    Attributes:
        at: first element in the row.
        length: how many.
        begin: position in the stream of the first.
        tensor: counter word c1.
    """

    at: int
    length: int
    begin: int
    tensor: int


def _check_words(name: str, *words: int) -> None:
    for word in words:
        if not 0 <= word < 2**32:
            raise ValueError(f"{name}: must be in 0..2**32 - 1, got {word}")


_STREAM_LENGTH = 2**34


def _pieces(
    name: str, row: Tensor, pieces: Iterable[Piece]
) -> tuple[list[tuple[int, int, int, int]], int]:
    """Return the pieces with addresses, and the dtype's code, after the checks."""
    code = DTYPES.get(row.dtype)
    if code is None or row.dim() != 1 or not row.is_contiguous():
        raise ValueError(
            f"{name}: row must be (m,) contiguous, of one of {list(DTYPES)}, got "
            f"{tuple(row.shape)} {row.dtype} with strides {row.stride()}"
        )
    if not (row.is_cpu or row.is_cuda):
        raise ValueError(f"{name}: row is on {row.device}, must be on the CPU or a CUDA device")
    address, size, found = row.data_ptr(), row.itemsize, []
    for piece in pieces:
        at, length, begin, tensor = piece
        if at < 0 or length < 0 or at + length > len(row):
            raise ValueError(f"{name}: {piece} is not inside a row of {len(row)} elements")
        if begin < 0 or begin + length > _STREAM_LENGTH:
            raise ValueError(f"{name}: {piece} is not inside a stream of 2**34 elements")
        _check_words("tensor", tensor)
        found.append((address + at * size, length, begin, tensor))
    return found, code


def fill_random(row: Tensor, pieces: Iterable[Piece], direction: Direction) -> Tensor:
    """Write z into the pieces of ``row``: the float32 value, rounded to the row's dtype.

    On the CPU with up to ``num_threads`` threads, on which no bit depends; on a GPU queued on the
    current stream. Words, uniforms, signs and masks are equal on both, normals to 1e-6.

    Args:
        row: (m,) contiguous, float32, float64, bfloat16 or float16.
        pieces: what to write; they do not overlap.
        direction: which streams.

    Returns:
        ``row``.

    Raises:
        ValueError: the row is of another layout or dtype, or a piece is not inside it.
        RuntimeError: the row is on a GPU, and this build has no CUDA kernels.
    """
    found, code = _pieces("fill_random", row, pieces)
    if row.is_cuda:
        with torch.cuda.device(row.device):
            _C.fill_random_cuda(found, code, direction._code(), _stream(row))
    else:
        _C.fill_random(found, code, direction._code(), num_threads())
    return row


def add_random(row: Tensor, pieces: Iterable[Piece], direction: Direction, a: float) -> Tensor:
    """Add ``a * z`` to the pieces of ``row``: ``fma(a, z, x)``, rounded once, then to the dtype.

    In float32 (float64 for float64 rows), with ``a`` rounded to it first; each element is read and
    written once. Otherwise as ``fill_random``.

    Args:
        row: (m,) contiguous, float32, float64, bfloat16 or float16.
        pieces: what to change; they do not overlap.
        direction: which streams.
        a: scale of z.

    Returns:
        ``row``.

    Raises:
        ValueError: as ``fill_random``.
        RuntimeError: as ``fill_random``.
    """
    found, code = _pieces("add_random", row, pieces)
    if row.is_cuda:
        with torch.cuda.device(row.device):
            _C.add_random_cuda(found, code, direction._code(), a, _stream(row))
    else:
        _C.add_random(found, code, direction._code(), a, num_threads())
    return row


def subtract_random(
    row: Tensor,
    pieces: Iterable[Piece],
    terms: Iterable[tuple[Direction, float]],
    decay: float = 0.0,
) -> Tensor:
    """Subtract a sum of directions: ``x = (x - s) - (decay * x)`` with s = sum of coefficient * z.

    The sum starts at 0 and each term is one fma, in the order given; the last line rounds after
    each operation. Each element is read and written once, whatever the number of terms. Otherwise
    as ``add_random``.

    Args:
        row: (m,) contiguous, float32, float64, bfloat16 or float16.
        pieces: what to change; they do not overlap.
        terms: pairs (direction, coefficient).
        decay: step size times weight decay.

    Returns:
        ``row``.

    Raises:
        ValueError: as ``fill_random``.
        RuntimeError: as ``fill_random``.
    """
    found, code = _pieces("subtract_random", row, pieces)
    codes = [(direction._code(), coefficient) for direction, coefficient in terms]
    if row.is_cuda:
        with torch.cuda.device(row.device):
            _C.subtract_random_cuda(found, code, codes, decay, _stream(row))
    else:
        _C.subtract_random(found, code, codes, decay, num_threads())
    return row


def _stream(row: Tensor) -> int:
    return int(torch.cuda.current_stream(row.device).cuda_stream)


def normals_of_words(words: np.ndarray) -> np.ndarray:
    """Return the normals that a stream with these words has, as float32 (tests go through all).

    Args:
        words: (n,) uint32, contiguous, n a multiple of 4.

    Raises:
        ValueError: ``words`` is of another dtype or layout.
    """
    if words.dtype != np.uint32 or not words.flags.c_contiguous or words.size % 4:
        raise ValueError(f"normals_of_words: needs uint32 in fours, got {words.dtype}")
    out = np.empty(words.size, dtype=np.float32)
    _C.normals_of_words(words.ctypes.data, words.size, out.ctypes.data)
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
    c1, c2, c3 = counter
    direction = (_DISTRIBUTIONS[distribution], (key, c2, c3), None)
    pieces = [(out.data_ptr(), out.numel(), begin, c1)]
    _C.fill_random(pieces, DTYPES[out.dtype], direction, num_threads())
    return out


def fill_words(count: int, key: int, counter: tuple[int, int, int], begin: int = 0) -> np.ndarray:
    """Return ``count`` raw 32-bit words of the Philox stream (key; c1, c2, c3) as uint32."""
    words = np.empty(count, dtype=np.uint32)
    _C.fill_words(words.ctypes.data, count, begin, key, *counter)
    return words


def words_(out: Tensor, key: int, counter: tuple[int, int, int], begin: int = 0) -> Tensor:
    """Fill ``out`` with the bits of words begin.. of the Philox stream (key; c1, c2, c3).

    Args:
        out: (m,) int32, contiguous, on the CPU or a GPU (queued on its current stream).
        key: 64 bits.
        counter: three 32-bit words.
        begin: position in the stream of the first word.

    Returns:
        ``out``.

    Raises:
        ValueError: ``out`` is of another dtype or layout, or on another device.
        RuntimeError: ``out`` is on a GPU, and this build has no CUDA kernels.
    """
    if out.dtype != torch.int32 or not out.is_contiguous() or not (out.is_cpu or out.is_cuda):
        raise ValueError(f"words_: needs contiguous int32, got {out.dtype} on {out.device}")
    if out.is_cuda:
        with torch.cuda.device(out.device):
            _C.fill_words_cuda(out.data_ptr(), len(out), begin, key, *counter, _stream(out))
    else:
        _C.fill_words(out.data_ptr(), len(out), begin, key, *counter)
    return out
