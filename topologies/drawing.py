"""Pictures of a topology: one panel per round, edges as wide as their weights.

Matplotlib is imported on use, and only its figures: no window, no global state.
"""

from __future__ import annotations

import io
import math
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx
import numpy as np

from gossamer.topologies.eigen import circulant_eigenvalues
from gossamer.topologies.errors import TopologyParameterError
from gossamer.topologies.hierarchical import HierarchicalTopology

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gossamer.topologies.round import Floats
    from gossamer.topologies.topology import Topology

MAX_RANKS = 1024  # beyond, a picture shows nothing
_MAX_PANELS = 8
_COLUMNS = 4
_LABELLED_EDGES = 24
_CROWDED_EDGES = 400  # beyond, plain lines: no arrowheads, no arcs
_LABELLED_RANKS = 128
_FORCE_LAYOUT_RANKS = 150  # Kamada-Kawai is cubic in the ranks

_EDGE, _NODE, _IDLE, _INK, _FAINT = "#3b6ea5", "#f4b860", "#e3e6ea", "#22303c", "#6b7883"


def draw(topology: Topology, path: str | Path, *, t: int | None = None) -> None:
    """Write a picture of a topology; the suffix says how (.png, .svg, .pdf).

    Args:
        topology: of at most 1024 ranks.
        path: file to write.
        t: the round to show; default all of a period, up to 8.

    Raises:
        TopologyParameterError: too many ranks, or a suffix that names no picture.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".png", ".svg", ".pdf"):
        raise TopologyParameterError(
            f"topology.plot: a picture is a .png, .svg or .pdf file, got {str(path)!r}"
        )
    figure(topology, t=t).savefig(path, dpi=150)


def svg(topology: Topology, *, t: int | None = None) -> str:
    """Return a picture of a topology as an <svg> element, to stand in a page."""
    buffer = io.StringIO()
    # No date and fixed ids: the same topology gives the same text.
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "gossamer"}):
        figure(topology, t=t).savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def figure(topology: Topology, *, t: int | None = None) -> Figure:
    """Return a picture of a topology as a matplotlib figure; arguments as for `draw`."""
    from matplotlib.figure import Figure

    if topology.n > MAX_RANKS:
        raise TopologyParameterError(
            f"topology.ranks: a picture shows at most {MAX_RANKS} ranks, got {topology.n}; draw "
            "the same topology with fewer"
        )
    shown = [t] if t is not None else list(range(min(topology.num_described, _MAX_PANELS)))
    columns = min(len(shown), _COLUMNS)
    rows = math.ceil(len(shown) / columns)
    side = 5.2 if len(shown) == 1 else 3.6
    positions = _positions(topology)
    wide, high = np.ptp(positions, axis=0)
    height = side * float(np.clip(high / wide if wide > 0 else 1, 0.2, 1.2)) + 0.4
    canvas = Figure(figsize=(side * columns, height * rows + 0.4), layout="constrained")
    canvas.suptitle(_title(topology), color=_INK, fontsize=12, fontweight="bold")
    panels = np.atleast_1d(canvas.subplots(rows, columns)).ravel()
    for axes, round_index in zip(panels, shown, strict=False):
        _panel(axes, topology, round_index, positions)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    return canvas


def _title(topology: Topology) -> str:
    if topology.period is None:
        repeats = "never repeats"
    else:
        repeats = "static" if topology.is_static else f"period {topology.period}"
    return f"{topology.name.replace('_', ' ')}, {topology.n} ranks, {topology.kind}, {repeats}"


def _panel(axes: Axes, topology: Topology, t: int, positions: Floats) -> None:
    round_ = topology.round(t)
    targets, sources, weights = round_.targets, round_.sources, round_.weights
    if topology.is_symmetric:
        once = sources < targets
        targets, sources, weights = targets[once], sources[once], weights[once]
    if len(weights) <= _CROWDED_EDGES:
        _arrows(axes, topology, positions, targets, sources, weights)
    else:
        _lines(axes, positions, targets, sources, weights)
    _nodes(axes, topology.n, positions, busy=np.union1d(round_.targets, round_.sources))
    caption = f"self {_range(round_.self_weight)}"
    if len(weights):
        caption = f"edges {_range(round_.weights)},  {caption}"
    if not topology.is_static:
        caption = f"round {t}\n{caption}"
    axes.set_title(caption, fontsize=9, color=_FAINT)
    axes.set_aspect("equal")
    axes.margins(0.12)
    axes.set_axis_off()


def _arrows(
    axes: Axes, topology: Topology, positions: Floats, targets: Any, sources: Any, weights: Floats
) -> None:
    from matplotlib.patches import FancyArrowPatch

    directed = not topology.is_symmetric
    radius = _radius(topology.n)
    labels = _label_shares(positions[sources], positions[targets])
    for source, target, weight, share in zip(sources, targets, weights, labels, strict=True):
        start, end = positions[source], positions[target]
        # Arcs keep the two directions apart, and edges that wrap around a grid off its nodes.
        bend = 0.14 if directed else 0.22 * _passes_over(positions, source, target)
        axes.add_patch(
            FancyArrowPatch(
                tuple(start),
                tuple(end),
                arrowstyle="-|>" if directed else "-",
                mutation_scale=9,
                connectionstyle=f"arc3,rad={bend}",
                shrinkA=radius,
                shrinkB=radius,
                linewidth=_width(weight),
                color=_EDGE,
                alpha=0.85,
                zorder=1,
            )
        )
        if len(weights) <= _LABELLED_EDGES:
            control = (start + end) / 2 + bend * np.array([end[1] - start[1], start[0] - end[0]])
            x, y = (
                (1 - share) ** 2 * start + 2 * share * (1 - share) * control + share**2 * end
            ).tolist()
            axes.text(
                x,
                y,
                _number(weight),
                fontsize=7,
                color=_INK,
                ha="center",
                va="center",
                zorder=2,
                bbox={"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none"},
            )


def _label_shares(starts: Floats, ends: Floats) -> Floats:
    """Return where along each edge its label stands: the middle, or before it where edges cross."""
    middles = (starts + ends) / 2
    apart = np.linalg.norm(middles[:, None] - middles[None], axis=2)
    crossed = np.sum(apart < 0.3, axis=1) > 1
    return np.where(crossed, 0.28, 0.5)


def _lines(axes: Axes, positions: Floats, targets: Any, sources: Any, weights: Floats) -> None:
    from matplotlib.collections import LineCollection

    segments = np.stack([positions[sources], positions[targets]], axis=1)
    alpha = max(0.15, min(0.6, 1200 / len(weights)))
    axes.add_collection(
        LineCollection(list(segments), linewidths=0.6, colors=_EDGE, alpha=alpha, zorder=1)
    )


def _nodes(axes: Axes, n: int, positions: Floats, busy: Any) -> None:
    colors = np.full(n, _IDLE, dtype=object)
    colors[busy] = _NODE
    axes.scatter(
        positions[:, 0],
        positions[:, 1],
        s=(2 * _radius(n)) ** 2,
        c=list(colors),
        edgecolors=_INK,
        linewidths=0.8 if n <= _LABELLED_RANKS else 0.3,
        zorder=3,
    )
    if n <= _LABELLED_RANKS:
        size = max(4.0, min(8.0, 1.1 * _radius(n)))
        for rank, (x, y) in enumerate(positions):
            axes.text(
                x, y, str(rank), fontsize=size, color=_INK, ha="center", va="center_baseline",
                zorder=4,
            )  # fmt: skip


def _positions(topology: Topology) -> Floats:
    """Return (n, 2) places of the ranks: a lattice, a circle, a tree, or what springs find."""
    places: Floats
    if isinstance(topology, HierarchicalTopology) and topology.local > 1:
        around = _circle(topology.local)[None] * min(0.42, 1.6 / topology.machines.n)
        places = (_positions(topology.machines)[:, None] + around).reshape(-1, 2)
        return places
    params, n = topology.params, topology.n
    if "rows" in params and "cols" in params:
        row, column = np.divmod(np.arange(n), params["cols"])
        places = np.stack([column, -row], axis=1) * (2.0 / max(params["rows"], params["cols"], 2))
        return places
    if "center" in params:
        leaves = np.delete(np.arange(n), params["center"])
        star = np.zeros((n, 2))
        star[leaves] = _circle(n - 1)
        return star
    if "branching" in params:
        return _tree(n, params["branching"])
    if topology.name == "path":
        return np.stack([np.linspace(0.0, 2.0, n), np.zeros(n)], axis=1)
    if not topology.is_static or n < 4 or circulant_eigenvalues(topology.round(0)) is not None:
        return _circle(n)
    graph = nx.Graph(topology.graph().to_undirected())
    graph.remove_edges_from(list(nx.selfloop_edges(graph)))
    if n <= _FORCE_LAYOUT_RANKS:
        layout = nx.kamada_kawai_layout(graph, weight=None)
    else:
        layout = nx.spring_layout(graph, seed=0, weight=None)
    return np.array([layout[rank] for rank in range(n)])


def _circle(n: int) -> Floats:
    if n == 1:
        return np.zeros((1, 2))
    angle = np.pi / 2 - 2 * np.pi * np.arange(n) / n  # rank 0 on top, then clockwise
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _tree(n: int, branching: int) -> Floats:
    places = np.zeros((n, 2))
    first, width, level = 0, 1, 0
    while first < n:
        ranks = np.arange(first, min(first + width, n))
        places[ranks, 0] = (ranks - first + 0.5) / width * 2.4
        places[ranks, 1] = -0.5 * level
        first, width, level = first + width, width * branching, level + 1
    return places


def _passes_over(positions: Floats, source: int, target: int) -> bool:
    """Say whether the straight line between two ranks runs through a third."""
    start, along = positions[source], positions[target] - positions[source]
    length = float(np.hypot(*along))
    offset = positions - start
    share = offset @ along / length**2
    distance = np.abs(offset[:, 0] * along[1] - offset[:, 1] * along[0]) / length
    return bool(np.any((share > 0.01) & (share < 0.99) & (distance < 0.01)))


def _radius(n: int) -> float:
    return float(np.clip(40 / math.sqrt(n), 1.5, 9.0))  # points


def _width(weight: float) -> float:
    return float(np.clip(3.2 * abs(weight), 0.5, 2.6))


def _range(weights: Floats) -> str:
    low, high = _number(weights.min()), _number(weights.max())
    return low if low == high else f"{low} .. {high}"


def _number(weight: float) -> str:
    fraction = Fraction(float(weight)).limit_denominator(60)
    return str(fraction) if abs(fraction - Fraction(float(weight))) < 1e-12 else f"{weight:.3g}"
