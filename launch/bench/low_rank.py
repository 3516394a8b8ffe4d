"""``bench low-rank``: forward and backward of one SLTrain layer, ours beside the official way.

The official way (arXiv:2406.02214) builds W = s B A, adds S with int64 places, and multiplies; the
backward pass builds W again, and the whole gradient of W. Same parameters and inputs for all, one
thread; the ways run in turn in one process, each time in another order, and ratios are of the time
on the CPU. Memory is measured with one way alone in a fresh process: the most that is resident in a
pass, beyond parameters, input, output, and the gradients of all three.
"""

# Shapes: N tokens, d outputs and inputs, r rank.

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.algorithms.low_rank.layer import SparseLowRankLinear
from gossamer.algorithms.low_rank.support import draw_support
from gossamer.launch.bench.children import held_by, started
from gossamer.launch.bench.measure import DTYPES, Row, spread
from gossamer.launch.bench.private import Aim
from gossamer.runtime import ConfigError, native

__all__ = ["LowRankRequest", "OfficialLinear", "aims", "low_rank"]

WAYS = ("dense", "official", "ours")
"""A plain linear layer; SLTrain as released; SLTrain here."""
_TIGHT = {"float32": 1e-4, "float64": 1e-10, "bfloat16": 0.1, "float16": 0.02}
"""How far, relatively, the ways' gradients may be apart, by dtype."""


@dataclass(frozen=True)
class LowRankRequest:
    """What to measure.

    Attributes:
        widths: d, of square layers.
        tokens: N.
        rank: r; 0: a quarter of d.
        density: of S.
        dtype: of everything.
        iters: samples per figure.
        warmup: samples thrown away before them.
    """

    widths: Sequence[int]
    tokens: int
    rank: int
    density: float
    dtype: str
    iters: int
    warmup: int

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ConfigError(f"--density: must be above 0 and at most 1, got {self.density:g}")

    def of(self, width: int) -> LowRankRequest:
        """Return the request for one width, its rank known."""
        return replace(self, widths=[width], rank=self.rank or max(1, width // 4))


class OfficialLinear(nn.Module):
    """SLTrain's layer by the released code's operations, with int64 places."""

    def __init__(self, like: SparseLowRankLinear) -> None:
        """Take copies of a layer's parameters."""
        super().__init__()
        assert like.A is not None
        assert like.B is not None
        assert like.v is not None
        self.A, self.B, self.v = (
            nn.Parameter(p.detach().clone()) for p in (like.A, like.B, like.v)
        )
        self.places, self.scale = like.support.indices.long(), like.scale

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., d) of x (..., p)."""
        rows = x.flatten(0, -2)
        y: Tensor = _official(rows, self.B, self.scale * self.A, self.v, self.places)
        return y.view(*x.shape[:-1], -1)


class _Official(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, b: Tensor, a: Tensor, v: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(x, b, a, v, places)
        return F.linear(x, _Official.weight(b, a, v, places))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, b, a, v, places = ctx.saved_tensors
        dx = g @ _Official.weight(b, a, v, places)
        dw = g.t() @ x
        return dx, dw @ a.t(), b.t() @ dw, dw.view(-1).gather(0, places), None

    @staticmethod
    def weight(b: Tensor, a: Tensor, v: Tensor, places: Tensor) -> Tensor:
        weight = b @ a
        weight.view(-1).scatter_add_(0, places, v)
        return weight


_official: Any = _Official.apply  # without types


def low_rank(request: LowRankRequest, progress: Callable[[str], object]) -> list[Row]:
    """Measure; a row of figures for every width and way.

    Raises:
        ConfigError: the processes failed, or the ways' gradients are not the same.
    """
    rows: list[Row] = []
    for width in request.widths:
        one = request.of(width)
        progress(f"width {width}: times")
        samples = started("low-rank", 1, _time_child, one)
        for way in WAYS:
            progress(f"width {width}: memory of {way}")
            held = started("low-rank", 1, _memory_child, one, way)
            rows.append(_row(one, way, samples, held))
    return rows


def _row(request: LowRankRequest, way: str, samples: dict[str, Any], held: float) -> Row:
    (width,), tokens, rank = request.widths, request.tokens, request.rank
    row: Row = {"width": width, "tokens": tokens, "rank": rank, "way": way}
    found = spread(samples["seconds"][way])
    row |= {"ms": 1e3 * found.median, "ms_p10": 1e3 * found.p10, "ms_p90": 1e3 * found.p90}
    cpu = {name: spread(times).median for name, times in samples["cpu_seconds"].items()}
    row["cpu_ms"] = 1e3 * cpu[way]
    row["official_ratio"], row["dense_ratio"] = (cpu[name] / cpu[way] for name in WAYS[1::-1])
    nnz = int(request.density * (width * width))
    # 2 thin products forward and 4 backward; of S one forward, two backward.
    fewest = 3 * width * width if way == "dense" else 6 * rank * width + 3 * nnz
    row["gflops"] = 2e-9 * tokens * fewest / cpu[way]
    parameters = width * width if way == "dense" else 2 * rank * width + nnz
    needed = DTYPES[request.dtype].itemsize * (2 * parameters + 4 * tokens * width)
    row["extra_mib"] = (held - needed) / 2**20
    return row | {"settings": asdict(request)}


def aims(rows: Sequence[Row]) -> list[Aim]:
    """Return what the rows are held to."""
    held = []
    for width in dict.fromkeys(row["width"] for row in rows):
        ours, theirs = (
            next(r for r in rows if r["width"] == width and r["way"] == way)
            for way in ("ours", "official")
        )
        if width >= 1024:
            ratio = ours["cpu_ms"] / theirs["cpu_ms"]
            held.append(Aim(f"width {width}: time over the official way's", ratio, 1 / 1.5))
        memory = ours["extra_mib"] / theirs["extra_mib"]
        held.append(Aim(f"width {width}: extra memory over the official way's", memory, 0.5))
    return held


# --- in the processes -----------------------------------------------------------------------


def _layer(request: LowRankRequest, way: str) -> nn.Module:
    torch.manual_seed(0)
    (width,), like = request.widths, torch.empty(0, dtype=DTYPES[request.dtype])
    if way == "dense":
        return nn.Linear(width, width, bias=False, dtype=like.dtype)
    support = draw_support((width, width), request.density, seed=0, layer=0)
    made = SparseLowRankLinear(support, rank=request.rank, scale=1.0, bias=False, like=like)
    made.reset_(seed=0, layer=0)
    assert made.B is not None
    nn.init.normal_(made.B, std=width**-0.5)
    return made if way == "ours" else OfficialLinear(made)


def _pass(request: LowRankRequest, layer: nn.Module) -> Callable[[], Tensor]:
    (width,), dtype = request.widths, DTYPES[request.dtype]
    x = torch.randn(request.tokens, width, dtype=dtype, requires_grad=True)
    g = torch.randn(request.tokens, width, dtype=dtype)

    def run() -> Tensor:
        x.grad = None
        for parameter in layer.parameters():
            parameter.grad = None
        layer(x).backward(g)
        assert x.grad is not None
        return x.grad

    return run


def _alone() -> None:
    torch.set_num_threads(1)
    native.use_threads(1)


def _time_child(request: LowRankRequest, result: str) -> int:
    _alone()
    layers = {way: _layer(request, way) for way in WAYS}
    _check(request, layers)
    cases = {way: _pass(request, layer) for way, layer in layers.items()}
    samples: dict[str, dict[str, list[float]]] = {
        kind: {way: [] for way in WAYS} for kind in ("seconds", "cpu_seconds")
    }
    for k in range(-request.warmup, request.iters):
        for c in range(len(WAYS)):
            way = WAYS[(c + k) % len(WAYS)]
            begin, busy = time.perf_counter(), time.process_time()
            cases[way]()
            if k >= 0:
                samples["seconds"][way].append(time.perf_counter() - begin)
                samples["cpu_seconds"][way].append(time.process_time() - busy)
    Path(result).write_text(json.dumps(samples))
    return 0


def _check(request: LowRankRequest, layers: dict[str, nn.Module]) -> None:
    """Compare the gradients of the two SLTrain layers.

    Raises:
        ConfigError: they differ by more than rounding.
    """
    found = []
    for way in ("official", "ours"):
        torch.manual_seed(1)
        dx = _pass(request, layers[way])()
        grads = {name: p.grad for name, p in layers[way].named_parameters()}
        found.append([dx, *(grads[name] for name in ("A", "B", "v"))])
    for ours, theirs in zip(*found, strict=True):
        away = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
        if not away < _TIGHT[request.dtype]:
            raise ConfigError(
                f"bench low-rank: the gradients of the two layers are {away:.1e} apart; the times "
                "would be of different things"
            )


def _memory_child(request: LowRankRequest, way: str, result: str) -> int:
    _alone()
    tiny = replace(request, widths=[64], tokens=8, rank=4)
    _pass(tiny, _layer(tiny, way))()  # what is loaded once is no memory of a pass
    held = held_by(lambda: _pass(request, _layer(request, way)))
    Path(result).write_text(json.dumps(held))
    return 0
