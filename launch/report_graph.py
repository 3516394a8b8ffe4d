"""The graph section of a report: the drawn rounds, the eigenvalues, and how fast ranks agree."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gossamer.launch.config import Experiment, resolve
from gossamer.launch.report_charts import chart_style, new_figure, to_svg
from gossamer.launch.report_runs import RunRecord
from gossamer.runtime.errors import ConfigError
from gossamer.topologies import Spectrum, Topology, TopologyError, spectrum
from gossamer.topologies.drawing import figure as draw

__all__ = ["Graph", "graphs_of"]

_MOST_RANKS = 512
"""Above it neither the eigenvalues nor the drawing of a graph can be read."""


@dataclass(frozen=True)
class Graph:
    """What is shown of one topology.

    Attributes:
        title: the topology and who ran on it.
        is_schedule: whether rounds differ, so that the drawing has several panels.
        drawing: SVG of its rounds, '' where it is too large.
        eigenvalues: SVG, '' where it is too large or random.
        matrix: what they belong to.
        figures: label -> value.
        problem: why it could not be built again, '' where it could.
    """

    title: str
    is_schedule: bool = False
    drawing: str = ""
    eigenvalues: str = ""
    matrix: str = "W"
    figures: tuple[tuple[str, str], ...] = ()
    problem: str = ""


def graphs_of(runs: Sequence[RunRecord], color: str) -> list[Graph]:
    """Return the distinct topologies of the runs, in the order of their first use."""
    built: dict[str, tuple[Topology | str, list[str]]] = {}
    for run in runs:
        key, topology = _rebuild(run)
        built.setdefault(key, (topology, []))[1].append(run.name)
    several = len(built) > 1
    graphs = []
    for topology, names in built.values():
        users = f": {', '.join(names)}" if several else ""
        if isinstance(topology, str):
            graphs.append(Graph(title="Topology" + users, problem=topology))
        else:
            graphs.append(_show(topology, _title(topology) + users, color))
    return graphs


def _rebuild(run: RunRecord) -> tuple[str, Topology | str]:
    """Return a run's topology, or why it cannot be built, and a key that equal ones share."""
    try:
        topology = Experiment(resolve(run.config), run.config["ranks"]).topology
    except (ConfigError, TopologyError) as error:  # a user's file or module is not here
        problem = f"{json.dumps(run.config.get('topology'))}: {error}"
        return problem, problem
    return f"{topology!r} {topology.digest()}", topology


def _title(topology: Topology) -> str:
    params = ", ".join(f"{key} {value}" for key, value in topology.params.items())
    return f"{topology.name}, {topology.n} ranks" + (f" ({params})" if params else "")


def _show(topology: Topology, title: str, color: str) -> Graph:
    small = 1 < topology.n <= _MOST_RANKS
    return Graph(
        title,
        is_schedule=not topology.is_static,
        drawing=to_svg(draw(topology), title) if small else "",
        eigenvalues=_draw_eigenvalues(topology, color) if small and topology.period else "",
        matrix="W" if topology.is_static else "a period's product",
        figures=tuple(_figures(topology, spectrum(topology)).items()),
    )


def _figures(topology: Topology, found: Spectrum) -> dict[str, str]:
    messages = sum(topology.round(t).num_messages for t in range(topology.num_described))
    figures = {
        "W": {
            "SDS": "symmetric, doubly stochastic",
            "DS": "doubly stochastic",
            "CS": "column-stochastic",
            "RS": "row-stochastic",
        }[topology.kind],
        "period": "random" if topology.period is None else f"{topology.period}",
        "degree": f"{topology.degree}",
        "messages per round": f"{messages / topology.num_described:g}",
        "rho": f"{found.rho:.4g}",
        "gap 1 - rho": f"{found.gap:.4g}",
    }
    if found.lambda_min is not None:
        figures["lambda_min"] = f"{found.lambda_min:.4g}"
    if found.exact_after is not None:
        figures["exact average after"] = f"{found.exact_after} rounds"
    else:
        rounds = found.estimated_rounds(1e-6)
        figures["rounds to 1e-6"] = f"{rounds:,.0f}" if np.isfinite(rounds) else "never"
    return figures


def _draw_eigenvalues(topology: Topology, color: str) -> str:
    """Draw the eigenvalues of W, or of the product over a period, in the unit circle."""
    product = np.eye(topology.n)
    for t in range(topology.period or 0):
        product = topology.round(t).apply(product)
    values = np.linalg.eigvals(product)
    with chart_style():
        figure, axes = new_figure(3.2, 3.2)
        angles = np.linspace(0, 2 * np.pi, 200)
        axes.plot(np.cos(angles), np.sin(angles), color="#9498a0", linewidth=0.8)
        axes.plot(values.real, values.imag, "o", color=color, markersize=5, alpha=0.6)
        axes.set_aspect("equal")
        axes.set_xticks([-1, 0, 1])
        axes.set_yticks([-1, 0, 1])
        axes.set_xlabel("real part")
        return to_svg(figure, f"eigenvalues of {topology.name}")
