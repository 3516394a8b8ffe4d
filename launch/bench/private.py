"""``bench private``: a private step after the clipping, in one pass and in several.

On one core. A sum of clipped gradients gets noise (four normals an element) and is divided by the
batch size, a moving average takes it in, and the parameters take a step along that. All ways run in
turn in one run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from gossamer.launch.bench.measure import DTYPES, Options, Row, interleave
from gossamer.runtime import combine, native
from gossamer.runtime.perturb import Probe, perturb_, release_, update_
from gossamer.runtime.rows import RowLayout

__all__ = ["private"]

_STD, _FACTOR, _BETA, _RATE = 0.5, 1 / 64, 0.9, 0.125
_NOISE = [(1, Probe(0, part, _STD / 2)) for part in range(4)]
_CHECKED = 4099  # an odd number: whole vectors and a rest
_ROWS_MOVED = 5  # sum, average and parameters are read, the last two written


def private(options: Options) -> list[Row]:
    """Measure rows of every size; one row of figures each.

    Raises:
        AssertionError: the ways disagree.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    native.use_threads(1)
    try:
        _check(DTYPES[options.dtype])
        return [_measure(count, options) for count in options.counts()]
    finally:
        native.use_threads(None)
        torch.set_num_threads(threads)


class _Step:
    """Rows of one size, and the ways to make the step on them."""

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        module = nn.Module()
        module.p = nn.Parameter(torch.zeros(count, dtype=dtype))
        self.layout = RowLayout(module)
        self.sum, self.average, self.x, self.z = (
            torch.ones(1, self.layout.d, dtype=dtype) for _ in range(4)
        )

    def fused(self) -> None:
        """All in one pass."""
        self._release(_NOISE)

    def rest(self) -> None:
        """The same pass without noise: what is not spent on normals."""
        self._release([])

    def _release(self, noise: list[tuple[int, Probe]]) -> None:
        average = self.average[0]
        release_(
            self.sum[0],
            self.layout,
            noise,
            _FACTOR,
            weight=1 - _BETA,
            kept=[(_BETA, average)],
            out=average,
            step=(-_RATE, self.x[0]),
        )

    def unfused(self) -> None:
        """The same kernels one after another: seven passes."""
        for seed, p in _NOISE:
            perturb_(self.sum[0], self.layout, seed, p.step, p.probe, p.coefficient)
        combine([(_FACTOR, self.sum)], out=self.sum)
        combine([(1 - _BETA, self.sum), (_BETA, self.average)], out=self.average)
        combine([(1.0, self.x), (-_RATE, self.average)], out=self.x)

    def normals(self) -> None:
        """Four normals for each element, added in one pass."""
        update_(self.x[0], self.layout, 1, [p for _, p in _NOISE])

    def torch(self, parts: int) -> None:
        """Plain torch, in place, with so many normals for each element."""
        for _ in range(parts):
            self.sum.add_(self.z.normal_(), alpha=_STD / parts**0.5)
        self.sum.mul_(_FACTOR)
        self.average.lerp_(self.sum, 1 - _BETA)
        self.x.add_(self.average, alpha=-_RATE)


def _measure(count: int, options: Options) -> Row:
    step = _Step(count, DTYPES[options.dtype])
    cases: dict[str, Callable[[], object]] = {
        "fused": step.fused,
        "unfused": step.unfused,
        "normals": step.normals,
        "rest": step.rest,
        "torch_one": partial(step.torch, 1),
        "torch_four": partial(step.torch, 4),
    }
    a, b, c = (torch.ones(-(-step.x.nbytes // 8), dtype=torch.float64) for _ in range(3))
    for stream in (False, True):
        cases[f"triad_{stream}"] = partial(native.triad, a, b, c, 3.0, stream=stream)
    found = interleave(cases, options.iters, options.warmup)
    triad = min((found.pop(f"triad_{stream}") for stream in (False, True)), key=lambda t: t.median)
    size_bytes = DTYPES[options.dtype].itemsize
    row: Row = {"dtype": options.dtype, "bytes": count * size_bytes, "elements": count}
    for name, times in found.items():
        for key, value in (("", "median"), ("_p10", "p10"), ("_p90", "p90")):
            row[f"{name}_ns{key}"] = 1e9 * getattr(times, value) / count
    for way in ("unfused", "torch_one", "torch_four"):
        row[f"{way}_ratio"] = found[way].median / found["fused"].median
    limit = triad.median * _ROWS_MOVED / 3
    row["limit_ns"] = 1e9 * limit / count
    for way in ("fused", "rest"):
        row[f"{way}_share"] = limit / found[way].median
    return row


def _check(dtype: torch.dtype) -> None:
    def after(way: Callable[[_Step], object]) -> tuple[Tensor, Tensor]:
        step = _Step(_CHECKED, dtype)
        way(step)
        return step.average[:, :_CHECKED], step.x[:, :_CHECKED]  # padding is not released

    found, expected = after(_Step.fused), after(_Step.unfused)
    tolerance = 0.0 if dtype.itemsize >= 4 else 2 * torch.finfo(dtype).eps
    right = all(
        torch.allclose(a, b, rtol=0, atol=tolerance) for a, b in zip(found, expected, strict=True)
    )
    assert right, "one pass and several do not come to the same"
