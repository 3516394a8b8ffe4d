"""Counted random numbers, written into rows or added to them: the kernels behind checks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gossamer.runtime.native.compiled import _C, DTYPES, num_threads, stream_of

__all__ = [
    "Direction",
    "Piece",
    "add_random",
    "fill",
    "fill_random",
    "fill_rows",
    "fill_word_rows",
    "fill_words",
    "normals_of_words",
    "release_sum",
    "subtract_random",
    "words_",
]

_DISTRIBUTIONS = {"uniform": 0, "normal": 1, "rademacher": 2}


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
            _C.fill_random_cuda(found, code, direction._code(), stream_of(row))
    else:
        _C.fill_random(found, code, direction._code(), num_threads())
    return row


def add_random(
    row: Tensor,
    pieces: Iterable[Piece],
    direction: Direction,
    a: float,
    source: Tensor | None = None,
) -> Tensor:
    """Add ``a * z`` to the pieces of ``row``: ``fma(a, z, x)``, rounded once, then to the dtype.

    In float32 (float64 for float64 rows), with ``a`` rounded to it first; each element is read and
    written once. Otherwise as ``fill_random``.

    Args:
        row: (m,) contiguous, float32, float64, bfloat16 or float16.
        pieces: what to change; they do not overlap.
        direction: which streams.
        a: scale of z.
        source: (k,) contiguous, of the row's dtype: the whole tensor, from whose elements
            ``begin``.. x is read instead; it does not overlap ``row``.

    Returns:
        ``row``.

    Raises:
        ValueError: as ``fill_random``; a piece is not inside ``source``.
        RuntimeError: as ``fill_random``.
    """
    found, code = _pieces("add_random", row, pieces)
    start = 0 if source is None else _source("add_random", row, found, source)
    if row.is_cuda:
        with torch.cuda.device(row.device):
            _C.add_random_cuda(found, code, direction._code(), a, start, stream_of(row))
    else:
        _C.add_random(found, code, direction._code(), a, start, num_threads())
    return row


def _source(name: str, row: Tensor, pieces: list[tuple[int, int, int, int]], source: Tensor) -> int:
    """Return the address of a tensor that stands for the row, after the checks."""
    alike = source.dtype == row.dtype and source.device == row.device
    if not alike or source.dim() != 1 or not source.is_contiguous():
        raise ValueError(
            f"{name}: source must be (k,) contiguous {row.dtype} on {row.device}, got "
            f"{tuple(source.shape)} {source.dtype} on {source.device}"
        )
    if any(begin + length > len(source) for _, length, begin, _ in pieces):
        raise ValueError(f"{name}: a piece is not inside a source of {len(source)} elements")
    address = source.data_ptr()
    if address < row.data_ptr() + row.nbytes and row.data_ptr() < address + source.nbytes:
        raise ValueError(f"{name}: row and source overlap")
    return address


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
            _C.subtract_random_cuda(found, code, codes, decay, stream_of(row))
    else:
        _C.subtract_random(found, code, codes, decay, num_threads())
    return row


def release_sum(
    row: Tensor,
    pieces: Iterable[Piece],
    noise: Iterable[tuple[Direction, float]],
    factor: float,
    *,
    weight: float = 1.0,
    kept: Sequence[tuple[float, Tensor]] = (),
    out: Tensor | None = None,
    raw: Tensor | None = None,
    step: tuple[float, Tensor] | None = None,
) -> Tensor:
    """Add noise to a sum, scale, filter and step, reading and writing each row once.

    ``s = fma(coefficient, z, s)`` from the row's elements, for each direction in order; ``u =
    factor * s``; ``y = weight * u``, plus ``c * r`` for each kept row r in order; then u goes to
    ``raw``, y to ``out``, and ``x + scale * y`` to x. Each operation is rounded, so in float32 and
    float64 the bits are those of ``add_random`` and ``combine`` one after another; 16-bit rows are
    rounded from float32 when they are stored, and only then. Otherwise as ``add_random``.

    Args:
        row: (m,) contiguous, float32, float64, bfloat16 or float16; kept unless it is written too.
        pieces: what to read and write, of every row; they do not overlap.
        noise: pairs (direction, coefficient).
        factor: of the noisy sum.
        weight: of that in ``out``.
        kept: pairs (c, r) with r like ``row``.
        out: like ``row``, may be any row that is read; None: ``row``.
        raw: likewise; None: u is not kept.
        step: (scale, x) with x like ``row``.

    Returns:
        ``out``.

    Raises:
        ValueError: as ``fill_random``; rows are not alike; what is written overlaps in part what is
            read, or at all what else is written.
        RuntimeError: as ``fill_random``.
    """
    found, code = _pieces("release_sum", row, pieces)
    terms = [(direction._code(), coefficient) for direction, coefficient in noise]
    out = row if out is None else out
    scale, x = step if step is not None else (0.0, None)
    written = [t for t in (out, raw, x) if t is not None]
    _check_rows("release_sum", row, written, [r for _, r in kept])
    past = [(r.data_ptr(), c) for c, r in kept]
    at = (out.data_ptr(), 0 if raw is None else raw.data_ptr(), 0 if x is None else x.data_ptr())
    job = (found, code, row.data_ptr(), terms, factor, weight, past, *at, scale)
    if row.is_cuda:
        with torch.cuda.device(row.device):
            _C.release_sum_cuda(*job, stream_of(row))
    else:
        _C.release_sum(*job, num_threads())
    return out


def _check_rows(name: str, row: Tensor, written: list[Tensor], read: list[Tensor]) -> None:
    """Refuse rows unlike ``row``, and overlaps that no order of reading and writing allows."""
    for r in (*written, *read):
        if r.shape != row.shape or r.dtype != row.dtype or r.device != row.device:
            raise ValueError(
                f"{name}: rows must be {tuple(row.shape)} {row.dtype} on {row.device}, got "
                f"{tuple(r.shape)} {r.dtype} on {r.device}"
            )
        if not r.is_contiguous():
            raise ValueError(f"{name}: rows must be contiguous, got strides {r.stride()}")
    places = [r.data_ptr() for r in written]
    for k, place in enumerate(places):
        for other in (row.data_ptr(), *places, *(r.data_ptr() for r in read)):
            if place != other and abs(place - other) < row.nbytes:
                raise ValueError(f"{name}: a row that is written overlaps another in part")
        if place in places[:k]:
            raise ValueError(f"{name}: two results would be written to one row")


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
    c1, c2, c3 = counter
    fill_rows(distribution, out[None], key, (c1,), (c2, c3), begin)
    return out


def fill_rows(
    distribution: str,
    out: Tensor,
    key: int,
    ids: Sequence[int],
    counter: tuple[int, int],
    begin: int = 0,
) -> Tensor:
    """Fill each ``out[k]`` with elements begin.. of the Philox stream (key; ids[k], c2, c3).

    Args:
        distribution: ``uniform`` in (0, 1), ``normal`` or ``rademacher``.
        out: (ids, ...) float32 or float64, each ``out[k]`` contiguous, on the CPU.
        key: 64 bits.
        ids: 32-bit words.
        counter: two 32-bit words.
        begin: position in the streams of the first element.

    Returns:
        ``out``.
    """
    if not len(out):
        return out
    if out.dtype not in (torch.float32, torch.float64) or not out[0].is_contiguous() or out.is_cuda:
        raise ValueError(
            f"{distribution}_: out must be contiguous float32 or float64 on the CPU, got "
            f"{out.dtype} with strides {out.stride()} on {out.device}"
        )
    c2, c3 = counter
    direction = (_DISTRIBUTIONS[distribution], (key, c2, c3), None)
    first, step, length = out.data_ptr(), out.stride(0) * out.itemsize, out[0].numel()
    pieces = [(first + k * step, length, begin, c1) for k, c1 in enumerate(ids)]
    _C.fill_random(pieces, DTYPES[out.dtype], direction, num_threads())
    return out


def fill_words(count: int, key: int, counter: tuple[int, int, int], begin: int = 0) -> np.ndarray:
    """Return ``count`` raw 32-bit words of the Philox stream (key; c1, c2, c3) as uint32."""
    words = np.empty(count, dtype=np.uint32)
    _C.fill_words(words.ctypes.data, count, begin, key, *counter)
    return words


def fill_word_rows(
    count: int, key: int, ids: Sequence[int], counter: tuple[int, int]
) -> np.ndarray:
    """Return the first ``count`` words of the streams (key; id, c2, c3), uint32 (ids, count)."""
    words = np.empty((len(ids), count), dtype=np.uint32)
    _C.fill_word_rows(words.ctypes.data, count, key, ids, *counter)
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
            _C.fill_words_cuda(out.data_ptr(), len(out), begin, key, *counter, stream_of(out))
    else:
        _C.fill_words(out.data_ptr(), len(out), begin, key, *counter)
    return out
