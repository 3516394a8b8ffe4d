"""``bench release``: what a private step makes of gradients, in one pass and in several.

On one core. Gradients of single examples are measured and their bounded sum is formed; a sum gets
noise (four normals an element) and is divided by the batch size, a moving average takes it in, and
the parameters take a step along that. All ways run in turn in one run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from gossamer.launch.bench.measure import DTYPES, Options, Row, Spread, interleave
from gossamer.runtime import combine, native
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.native import add_rows, row_dot
from gossamer.runtime.perturb import Probe, perturb_, release_, update_
from gossamer.runtime.rows import RowLayout

__all__ = ["LEGEND", "examples", "release"]

LEGEND = """\
ns per element, on one core, in turn. A sum gets noise and is scaled, an average takes it in, x
takes a step.
fused: one pass; unfused: the same bits in seven; torch: plain torch with 4 normals an element, or 1
normals: 4 an element, added in one pass; rest: the fused pass without them; limit: five rows at a
triad's speed, and its share of the rest
norms: squared, in float64; sum: of the rows times factors; torch: with temporaries; gemv: addmv_"""

_STD, _FACTOR, _BETA, _RATE = 0.5, 1 / 64, 0.9, 0.125
_NOISE = [(1, Probe(0, part, _STD / 2)) for part in range(4)]
_CHECKED = 4099  # an odd number: whole vectors and a rest
_ROWS_MOVED = 5  # sum, average and parameters are read, the last two written
_EXAMPLES = 64


def release(options: Options) -> list[Row]:
    """Measure noise, filter and step on rows of every size; one row of figures each.

    Raises:
        ConfigError: ``dtype`` is none that is summed privately.
        AssertionError: the ways disagree.
    """
    if options.dtype not in ("float32", "float64"):
        raise ConfigError(f"--dtype: '{options.dtype}' has no private sums; use float32 or float64")
    with _one_thread():
        _check(DTYPES[options.dtype])
        return [_measure(count, options) for count in options.counts()]


def examples(options: Options) -> list[Row]:
    """Measure norms and bounded sums of 64 gradients of every size together; figures as above.

    Raises:
        AssertionError: the ways disagree.
    """
    with _one_thread():
        return [
            _measure_examples(max(1, count // _EXAMPLES), options) for count in options.counts()
        ]


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    native.use_threads(1)
    try:
        yield
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
    row = _figures(count, options.dtype, found)
    for way in ("unfused", "torch_one", "torch_four"):
        row[f"{way}_ratio"] = found[way].median / found["fused"].median
    limit = triad.median * _ROWS_MOVED / 3
    row["limit_ns"] = 1e9 * limit / count
    for way in ("fused", "rest"):
        row[f"{way}_share"] = limit / found[way].median
    return row


def _measure_examples(size: int, options: Options) -> Row:
    dtype, count = DTYPES[options.dtype], _EXAMPLES * size
    g, out = torch.randn(_EXAMPLES, size).to(dtype), torch.zeros(size, dtype=dtype)
    factors = torch.rand(_EXAMPLES)

    def plain_norms() -> Tensor:
        return g.double().square().sum(1)

    def plain_sum() -> Tensor:
        return out.add_((g * factors[:, None].to(dtype)).sum(0))

    norms = row_dot(g, g)[:, 0]
    assert torch.allclose(norms, plain_norms(), rtol=1e-12), "the norms disagree"
    summed, plain = add_rows(torch.zeros_like(out), g, factors), plain_sum().clone()
    tolerance = _EXAMPLES * torch.finfo(dtype).eps * float(g.abs().sum(0).max())
    assert torch.allclose(summed, plain, rtol=0, atol=tolerance), "the sums disagree"
    cases: dict[str, Callable[[], object]] = {
        "norms": lambda: row_dot(g, g),
        "torch_norms": plain_norms,
        "sum": lambda: add_rows(out, g, factors),
        "torch_sum": plain_sum,
        "blas_sum": lambda: out.addmv_(g.mT, factors.to(dtype)),
    }
    found = interleave(cases, options.iters, options.warmup)
    row = _figures(count, options.dtype, found)
    row |= {"examples": _EXAMPLES, "norms_ratio": row["torch_norms_ns"] / row["norms_ns"]}
    for way in ("torch", "blas"):
        row[f"{way}_sum_ratio"] = row[f"{way}_sum_ns"] / row["sum_ns"]
    return row


def _figures(count: int, dtype: str, found: dict[str, Spread]) -> Row:
    row: Row = {"dtype": dtype, "bytes": count * DTYPES[dtype].itemsize, "elements": count}
    for name, times in found.items():
        for key, value in (("", times.median), ("_p10", times.p10), ("_p90", times.p90)):
            row[f"{name}_ns{key}"] = 1e9 * value / count
    return row


def _check(dtype: torch.dtype) -> None:
    def after(way: Callable[[_Step], object]) -> tuple[Tensor, Tensor]:
        step = _Step(_CHECKED, dtype)
        way(step)
        return step.average[:, :_CHECKED], step.x[:, :_CHECKED]  # padding is not released

    found, expected = after(_Step.fused), after(_Step.unfused)
    right = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert right, "one pass and several do not come to the same bits"
