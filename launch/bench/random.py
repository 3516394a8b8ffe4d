"""``bench random``: x += a z with z made in cache, against torch's normals and an addition.

On one core. All ways run in turn in one run, and so does a copy of the row, which reads and writes
as many bytes as the fused update has to: the share is the copy's time over the update's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gossamer.launch.bench.measure import DTYPES, Options, Row, interleave
from gossamer.runtime import native
from gossamer.runtime.native import Direction, Piece

__all__ = ["random"]

_A = 0.125
_CHECKED = 4099  # an odd number: whole vectors and a rest


def random(options: Options) -> list[Row]:
    """Measure rows of every size; one row of figures each.

    Raises:
        AssertionError: the fused update differs from a fill and an addition.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    native.use_threads(1)
    try:
        return [_measure(count, options) for count in options.counts()]
    finally:
        native.use_threads(None)
        torch.set_num_threads(threads)


def _measure(count: int, options: Options) -> Row:
    dtype = DTYPES[options.dtype]
    x = torch.ones(count, dtype=dtype)  # touched: pages that are only promised take no memory
    z, out = torch.zeros_like(x), torch.ones_like(x)
    for distribution in ("normal", "rademacher"):
        _check(x[:_CHECKED].clone(), distribution)
    cases: dict[str, Callable[[], object]] = {
        "normal": lambda: _add(x, "normal"),
        "torch": lambda: x.add_(torch.randn(count, dtype=dtype), alpha=_A),
        "in_place": lambda: x.add_(z.normal_(), alpha=_A),
        "rademacher": lambda: _add(x, "rademacher"),
        "copy": lambda: out.copy_(x),
    }
    found = interleave(cases, options.iters, options.warmup)
    row: Row = {"dtype": options.dtype, "bytes": x.nbytes, "elements": count}
    for name, times in found.items():
        for key, value in (("", "median"), ("_p10", "p10"), ("_p90", "p90")):
            row[f"{name}_ns{key}"] = 1e9 * getattr(times, value) / count
    for ours in ("normal", "rademacher"):
        for way in ("torch", "in_place"):
            row[f"{ours}_{way}_ratio"] = found[way].median / found[ours].median
        row[f"{ours}_share"] = found["copy"].median / found[ours].median
    return row | {"copy_gbps": 2 * x.nbytes / found["copy"].median / 1e9}


def _direction(distribution: str) -> Direction:
    return Direction(distribution, key=1, counter=(0, 0))


def _add(x: Tensor, distribution: str) -> Tensor:
    return native.add_random(x, [Piece(0, len(x), 0, 0)], _direction(distribution), _A)


def _check(x: Tensor, distribution: str) -> None:
    pieces = [Piece(0, len(x), 0, 0)]
    z = native.fill_random(torch.empty(len(x)), pieces, _direction(distribution))
    wide = x.double() + _A * z.double()
    tolerance = 2 * torch.finfo(x.dtype).eps * float(wide.abs().max())
    right = torch.allclose(_add(x, distribution).double(), wide, rtol=0, atol=tolerance)
    assert right, "the fused update is not x + a z"
