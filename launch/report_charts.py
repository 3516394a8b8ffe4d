"""The curves of a report: every figure that was logged, drawn as SVG that takes the page's colors.

Each chart is drawn once per abscissa (step, bytes, seconds); the page shows one of them.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from gossamer.launch.report_runs import RunRecord, format_bytes

__all__ = [
    "ABSCISSAS",
    "Chart",
    "chart_style",
    "charts_of",
    "draw_chart",
    "new_figure",
    "run_colors",
    "to_svg",
]

ABSCISSAS = {"step": "step", "bytes_sent": "bytes sent, all ranks", "seconds": "seconds"}
"""Figure on the horizontal axis -> its label."""

_PALETTE = (
    "#4269d0",
    "#ff725c",
    "#3ca951",
    "#efb118",
    "#a463f2",
    "#6cc5b0",
    "#ff8ab7",
    "#9c6b4e",
    "#97bbf5",
    "#9498a0",
)
"""Told apart on white and on black."""
_INK = "#010203"
"""Stands for the page's text color, which depends on the reader's theme."""
_MOST_POINTS = 400
_STEPS = [1, 2, 2.5, 5, 10]
"""Ticks stand at round numbers."""
_LOG_RATIO = 10.0
"""A figure that spans a decade or more is drawn on a logarithmic scale."""


@dataclass(frozen=True)
class Line:
    """One curve per run of a chart.

    Attributes:
        figure: its name in the metrics.
        style: as matplotlib writes it.
    """

    figure: str
    style: str = "-"


@dataclass(frozen=True)
class Chart:
    """Curves of figures that belong on one axis."""

    title: str
    lines: tuple[Line, ...]
    caption: str = ""


_KNOWN = (
    Chart(
        "Training loss",
        (Line("loss"), Line("batch_loss", ":")),
        "solid: f at the mean of the ranks; dotted: on the batches, mean over ranks",
    ),
    Chart(
        "Test loss",
        (Line("test_loss"), Line("worst_rank_loss", "--")),
        "solid: mean of the ranks; dashed: the worst rank's own parameters",
    ),
    Chart("Gradient norm", (Line("grad_norm"),), "|grad f| at the mean of the ranks"),
    Chart("Consensus distance", (Line("consensus"),), "sqrt(sum |x_i - mean|^2 / n)"),
)
_COUNTERS = re.compile(
    r"bytes_sent|messages_sent|seconds.*|rank_.*|\w*(examples|tokens)(_per_second)?"
)


def charts_of(runs: Sequence[RunRecord]) -> list[Chart]:
    """Return the charts for all figures that the runs logged, the well-known ones first."""
    logged = set().union(*(run.figures() for run in runs))
    scores = sorted(
        name for name in logged if f"worst_rank_{name}" in logged and name not in ("loss", "step")
    )
    charts = [chart for chart in _KNOWN if chart.lines[0].figure in logged]
    charts[1:1] = [
        Chart(
            name.replace("_", " ").capitalize(),
            (Line(name), Line(f"worst_rank_{name}", "--")),
            "solid: mean of the ranks; dashed: the worst rank's own parameters",
        )
        for name in scores
    ]
    covered = {line.figure for chart in charts for line in chart.lines}
    further = sorted(n for n in logged - covered if not _COUNTERS.fullmatch(n))
    return charts + [Chart(name.replace("_", " "), (Line(name),)) for name in further]


def run_colors(count: int) -> list[str]:
    """Return a color per run, the same one in every chart."""
    if count <= len(_PALETTE):
        return list(_PALETTE[:count])
    colors = mpl.colormaps["turbo"]
    return [mpl.colors.to_hex(colors((k + 0.5) / count)) for k in range(count)]


def draw_chart(
    chart: Chart, runs: Sequence[RunRecord], colors: Sequence[str], against: str
) -> str | None:
    """Return the chart as SVG; None if no run has a point of it."""
    curves = [
        (*_thin(*_points(run, line, against)), color, line.style)
        for run, color in zip(runs, colors, strict=True)
        for line in chart.lines
    ]
    values = [y for _, ys, _, _ in curves for y in ys]
    if not values:
        return None
    with chart_style():
        figure, axes = new_figure(4.4, 2.7)
        for xs, ys, color, style in curves:
            marker = "o" if len(xs) == 1 else None
            axes.plot(xs, ys, style, color=color, marker=marker, markersize=3)
        _scale(axes, min(values), max(values))
        if against == "bytes_sent":
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        axes.set_xlim(left=0)
        axes.set_xlabel(ABSCISSAS[against])
        return to_svg(figure, f"{chart.title}, against {against}")


def chart_style() -> AbstractContextManager[None]:
    """Return the context in which a report's figures are made."""
    return mpl.rc_context(
        {
            "font.size": 10,
            "text.color": _INK,
            "axes.edgecolor": _INK,
            "axes.labelcolor": _INK,
            "axes.linewidth": 0.6,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "xtick.color": _INK,
            "ytick.color": _INK,
            "grid.color": _INK,
            "grid.alpha": 0.12,
            "lines.linewidth": 1.6,
        }
    )


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Return an empty figure of that many inches with one axes and a faint grid."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0.14, 0.17, 0.83, 0.79))
    axes.grid(True)
    return figure, axes


def to_svg(figure: Figure, label: str) -> str:
    """Return the figure as an SVG element to stand inside a page, with ``label`` for readers."""
    # Identifiers follow from the label, so that figures of one page don't share them and the page
    # of one run is the same text every time. Text stays text: it takes the page's font and color.
    with mpl.rc_context({"svg.hashsalt": label, "svg.fonttype": "none"}):
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None, "matplotlib writes one"
    head = f'<svg {box[0]} class="chart" role="img" aria-label="{escape(label)}">'
    svg = head + svg[svg.index(">") + 1 :]
    return re.sub(r"\n\s*", "\n", svg).replace(_INK, "currentColor")


def _points(run: RunRecord, line: Line, against: str) -> tuple[list[float], list[float]]:
    xs, ys = [], []
    for record in run.records:
        if line.figure not in record or (against not in record and record["step"] > 0):
            continue
        if line.figure == "consensus" and record["step"] == 0:
            continue  # all ranks are equal there: rounding, which would stretch a log scale
        y = record[line.figure]
        if math.isfinite(y):
            xs.append(float(record.get(against, 0)))  # nothing was sent or timed at step 0
            ys.append(float(y))
    return xs, ys


def _thin(xs: list[float], ys: list[float]) -> tuple[list[float], list[float]]:
    """Keep at most 400 points, evenly spaced, the last one among them."""
    if len(xs) <= _MOST_POINTS:
        return xs, ys
    places = [round(k * (len(xs) - 1) / (_MOST_POINTS - 1)) for k in range(_MOST_POINTS)]
    return [xs[p] for p in places], [ys[p] for p in places]


def _scale(axes: Axes, low: float, high: float) -> None:
    if low > 0 and high / low >= _LOG_RATIO:
        axes.set_yscale("log")
        few = math.log10(high / low) < 2  # label 2 and 5 too where decades are few
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=8))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
