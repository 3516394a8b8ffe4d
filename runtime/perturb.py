"""Random directions in parameter space, made where they are needed and never stored or sent.

Element i of tensor k in the direction z(seed, step, probe) is a function of these five numbers
alone (Philox4x32-10, ``csrc/philox.h``: key = seed, counter = (i's block, k, step, probe)), so a
rank that holds any part of a row of parameters computes its part, and two integers name all of z.
What zeroth-order methods need: MeZO, arXiv:2305.17333, Algorithm 1, regenerates z from a seed too,
but element by element from a generator's state.

The streams of ``runtime.random`` are keyed otherwise: no draw of theirs is a part of a direction.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from gossamer.runtime import native
from gossamer.runtime.native import Direction, Piece
from gossamer.runtime.rows import RowLayout

__all__ = ["Distribution", "Mask", "Probe", "add_", "direction_", "perturb_", "release_", "update_"]

Distribution = Literal["normal", "rademacher", "uniform"]

_MASK_STREAM = 1 << 31  # set in the probe's counter word: no probe has it


@dataclass(frozen=True)
class Mask:
    """Entries of z that are 0, drawn anew every ``interval`` steps; all probes of a step share it.

    Attributes:
        sparsity: share of the entries that are dropped, 0 to 1.
        interval: steps that one mask serves.
    """

    sparsity: float
    interval: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"mask.sparsity: must be in 0..1, got {self.sparsity}")
        if self.interval < 1:
            raise ValueError(f"mask.interval: must be at least 1, got {self.interval}")


@dataclass(frozen=True)
class Probe:
    """A direction and its coefficient in an update.

    Attributes:
        step: 0-based.
        probe: number of the probe, or of the rank that made it, below 2**31.
        coefficient: what z is multiplied by before it is subtracted.
    """

    step: int
    probe: int
    coefficient: float


def direction_(
    row: Tensor,
    layout: RowLayout,
    seed: int,
    step: int,
    probe: int,
    distribution: Distribution = "normal",
    mask: Mask | None = None,
    begin: int = 0,
) -> Tensor:
    """Write z(seed, step, probe) into ``row``; padding becomes zero.

    Args:
        row: (m,) contiguous, float32, float64, bfloat16 or float16: elements begin..begin+m of a
            row of ``layout``.
        layout: of the whole row.
        seed: 64 bits.
        step: 0-based, 32 bits.
        probe: below 2**31.
        distribution: of every element of z.
        mask: which elements are 0; None for none.
        begin: where ``row`` starts in the whole row.

    Returns:
        ``row``.

    Raises:
        ValueError: the row does not lie in the layout or has another dtype or layout in memory, or
            a number is out of range.
        RuntimeError: the row is on a GPU, and this build has no CUDA kernels.
    """
    pieces = _pieces(row, layout, begin)
    z = _direction(seed, step, probe, distribution, mask)
    done = 0
    for piece in pieces:
        row[done : piece.at].zero_()
        done = piece.at + piece.length
    row[done:].zero_()
    return native.fill_random(row, pieces, z)


def perturb_(
    row: Tensor,
    layout: RowLayout,
    seed: int,
    step: int,
    probe: int,
    scale: float,
    distribution: Distribution = "normal",
    mask: Mask | None = None,
    begin: int = 0,
    tensors: Container[int] | None = None,
) -> Tensor:
    """Add ``scale * z(seed, step, probe)`` to the parameters in ``row``; padding stays as it is.

    One pass, no temporary: each element is ``fma(scale, z, x)`` in float32 (float64 for float64
    rows), rounded once, then to the row's dtype. The bits do not depend on how a row is cut into
    shards, nor on threads or the instruction set; on a GPU normals differ by up to 1e-6, so ranks
    that have to stay equal do not mix the two (signs are equal everywhere).

    Adding and subtracting the same z does not restore a row, by up to its dtype's rounding.

    Args:
        row: (m,) contiguous, float32, float64, bfloat16 or float16: elements begin..begin+m of a
            row of ``layout``.
        layout: of the whole row.
        seed: 64 bits.
        step: 0-based, 32 bits.
        probe: below 2**31.
        scale: of z, rounded to the arithmetic's dtype first.
        distribution: of every element of z.
        mask: which elements of z are 0; None for none.
        begin: where ``row`` starts in the whole row.
        tensors: the others stay as they are; None: all are moved.

    Returns:
        ``row``.

    Raises:
        ValueError: as ``direction_``.
        RuntimeError: as ``direction_``.

    Example:
        >>> import torch
        >>> layout = RowLayout(torch.nn.Linear(8, 4))
        >>> row = perturb_(torch.zeros(layout.d), layout, seed=0, step=0, probe=0, scale=1e-3)
        >>> part = perturb_(torch.zeros(10), layout, seed=0, step=0, probe=0, scale=1e-3, begin=7)
        >>> torch.equal(part, row[7:17])
        True
    """
    pieces = _pieces(row, layout, begin, tensors)
    return add_(row, pieces, seed, step, probe, scale, distribution, mask)


def add_(
    flat: Tensor,
    pieces: Iterable[Piece],
    seed: int,
    step: int,
    probe: int,
    scale: float,
    distribution: Distribution = "normal",
    mask: Mask | None = None,
    source: Tensor | None = None,
) -> Tensor:
    """``perturb_`` of any parts of a row's tensors, gathered in ``flat``.

    Args:
        flat: (m,) contiguous, float32, float64, bfloat16 or float16.
        pieces: which elements of which tensor lie where in it.
        seed: 64 bits.
        step: 0-based, 32 bits.
        probe: below 2**31.
        scale: of z.
        distribution: of every element of z.
        mask: which elements of z are 0; None for none.
        source: (k,), one whole tensor: what the pieces held is forgotten, and its elements are
            moved in their place, in the same pass. It does not overlap ``flat``.

    Returns:
        ``flat``.

    Raises:
        ValueError: as ``direction_``; a piece is not inside ``source``.
        RuntimeError: as ``direction_``.
    """
    z = _direction(seed, step, probe, distribution, mask)
    return native.add_random(flat, pieces, z, scale, source)


def update_(
    row: Tensor,
    layout: RowLayout,
    seed: int,
    probes: Iterable[Probe],
    decay: float = 0.0,
    distribution: Distribution = "normal",
    mask: Mask | None = None,
    begin: int = 0,
    tensors: Container[int] | None = None,
) -> Tensor:
    """Subtract ``sum of coefficient * z(seed, step, probe)`` over the probes; padding stays.

    ``x = (x - s) - (decay * x)``, each operation rounded, where s starts at 0 and takes each probe
    by one fma in the order given. Each element is read and written once, whatever the number of
    probes. Otherwise as ``perturb_``.

    Args:
        row: as in ``perturb_``.
        layout: of the whole row.
        seed: 64 bits.
        probes: directions of any steps; a mask is that of a probe's own step.
        decay: step size times weight decay.
        distribution: of every element of z.
        mask: which elements of z are 0; None for none.
        begin: where ``row`` starts in the whole row.
        tensors: the others stay as they are; None: all are moved.

    Returns:
        ``row``.

    Raises:
        ValueError: as ``direction_``.
        RuntimeError: as ``direction_``.
    """
    terms = [(_direction(seed, p.step, p.probe, distribution, mask), p.coefficient) for p in probes]
    pieces = _pieces(row, layout, begin, tensors)
    return native.subtract_random(row, pieces, terms, decay)


def release_(
    row: Tensor,
    layout: RowLayout,
    noise: Iterable[tuple[int, Probe]],
    factor: float,
    *,
    weight: float = 1.0,
    kept: Sequence[tuple[float, Tensor]] = (),
    out: Tensor | None = None,
    raw: Tensor | None = None,
    step: tuple[float, Tensor] | None = None,
) -> Tensor:
    """Turn the sum in ``row`` into ``out = weight * u + sum of c * r``, u = factor * (row + noise).

    One pass over the parameters, whatever the number of directions and kept rows (arXiv:1607.00133
    with a linear filter behind the noise and a step along it). The bits are those of ``perturb_``
    once for each direction and then ``combine``, in float32 and float64; 16-bit rows are rounded
    less often. Padding stays as it is, in every row.

    Args:
        row: (d,) contiguous, float32, float64, bfloat16 or float16.
        layout: of every row.
        noise: pairs (seed, probe): normal directions and their coefficients.
        factor: of the noisy sum.
        weight: of that in ``out``.
        kept: pairs (c, r), rows of the filter's past.
        out: where to write, may be ``row`` or a kept one; None: ``row``.
        raw: gets u, may be ``row`` or a kept one; None: u is not kept.
        step: (scale, x): adds ``scale * out`` to x in the same pass.

    Returns:
        ``out``.

    Raises:
        ValueError: as ``direction_``; rows are not alike, or overlap in part.
        RuntimeError: as ``direction_``.
    """
    terms = [
        (_direction(seed, p.step, p.probe, "normal", None), p.coefficient) for seed, p in noise
    ]
    return native.release_sum(
        row,
        _pieces(row, layout, 0),
        terms,
        factor,
        weight=weight,
        kept=kept,
        out=out,
        raw=raw,
        step=step,
    )


def _direction(seed: int, step: int, probe: int, distribution: str, mask: Mask | None) -> Direction:
    if not 0 <= probe < _MASK_STREAM:
        raise ValueError(f"probe: must be in 0..2**31 - 1, got {probe}")
    words = None
    if mask is not None:
        words = (step // mask.interval, _MASK_STREAM, math.floor(mask.sparsity * 2**32))
    return Direction(distribution, seed, (step, probe), words)


def _pieces(
    row: Tensor, layout: RowLayout, begin: int, tensors: Container[int] | None = None
) -> list[Piece]:
    """Return what of each tensor lies in ``row``."""
    end = begin + len(row)
    if begin < 0 or end > layout.d:
        raise ValueError(f"begin: elements {begin}..{end} are not in a row of {layout.d}")
    pieces = []
    for s in layout.slices:
        first, last = max(s.begin, begin), min(s.end, end)
        if first < last and (tensors is None or s.tensor in tensors):
            pieces.append(Piece(first - begin, last - first, first - s.begin, s.tensor))
    return pieces
