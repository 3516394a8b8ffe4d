"""The report's page: one self-contained HTML file, from a template and figures drawn as SVG."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import yaml

from gossamer.launch.report_charts import ABSCISSAS, charts_of, draw_chart, run_colors
from gossamer.launch.report_graph import Graph, graphs_of
from gossamer.launch.report_runs import (
    RunRecord,
    columns_of,
    format_value,
    privacy_rows,
    table_row,
)

__all__ = ["render_page"]

_TEMPLATE = Path(__file__).parent / "templates" / "report.html"
_TEXT = ("run", "algorithm", "topology")
_HIGH = ("accuracy", "f1", "exact_match", "retrieval_accuracy", "knn1_accuracy", "probe_accuracy")
_BEST = {"loss": min, **dict.fromkeys(_HIGH, max)}
_SWITCHES = {"step": "step", "bytes_sent": "bytes", "seconds": "seconds"}


def render_page(runs: Sequence[RunRecord], title: str) -> str:
    """Return the page about ``runs``: complete in itself, nothing is fetched when it is read."""
    colors = run_colors(len(runs))
    return Template(_TEMPLATE.read_text()).substitute(
        title=escape(title),
        subtitle=escape(_subtitle(runs)),
        facts=_facts(runs),
        table=_table(runs, colors),
        privacy=_privacy(runs, colors),
        switches=_switch_rules(),
        curves=_curves(runs, colors),
        graphs="".join(_graph(graph) for graph in graphs_of(runs, colors[0])),
        time=_time(runs, colors),
        configuration=_configuration(runs, colors),
        footer="Written by <code>gossamer report</code>; the figures are those of each run's "
        "<code>metrics.jsonl</code> and <code>summary.json</code>.",
    )


# --- what ran ---------------------------------------------------------------------------------


def _subtitle(runs: Sequence[RunRecord]) -> str:
    names = _distinct(run.summary.get("algorithm") for run in runs)
    return f"{len(runs)} runs: {names}" if len(runs) > 1 else f"One run of {names}"


def _facts(runs: Sequence[RunRecord]) -> str:
    def each(*path: str, of: str = "config") -> str:
        return _distinct(_at(getattr(run, of), path) for run in runs)

    versions = [f"{k} {each('versions', k, of='summary')}" for k in ("gossamer", "python", "torch")]
    tasks = _distinct(
        ", ".join(_in_words(v) for k in _TASK if (v := _at(r.config, ("task", k)))) for r in runs
    )
    processes = each("processes", of="summary")
    facts = {
        "Task": tasks,
        "Parameters": each("parameters", of="summary"),
        "Topology": each("topology", "name"),
        "Ranks": each("ranks"),
        "Steps": each("steps"),
        "Seed": each("seed"),
        "Transport": f"{each('transport', of='summary')}, processes: {processes}",
        "Kernels": each("versions", "instruction_set", of="summary"),
        "Versions": ", ".join(versions),
        "Commit": each("versions", "commit", of="summary"),
    }
    return "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>"
        for label, value in facts.items()
    )


_TASK = ("name", "data", "model", "scheme", "encoder", "heterogeneity")


def _in_words(value: Any) -> str:
    """Return a field as text, a section by its name or as its fields."""
    if not isinstance(value, Mapping):
        return str(value)
    return str(value.get("name") or ", ".join(f"{k} {v}" for k, v in value.items()))


def _at(values: Any, path: Iterable[str]) -> Any:
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _distinct(values: Iterable[Any]) -> str:
    shown = list(dict.fromkeys("none" if value is None else str(value) for value in values))
    return ", ".join(shown) if len(shown) <= 4 else f"{len(shown)} different"


# --- the table --------------------------------------------------------------------------------


def _table(runs: Sequence[RunRecord], colors: Sequence[str]) -> str:
    rows = [table_row(run) for run in runs]
    columns = columns_of(rows)
    best = {
        column: pick(values)
        for column, pick in _BEST.items()
        if len(values := [row[column] for row in rows if row[column] is not None]) > 1
    }
    head = "".join(
        f"<th{_kind(c)}>{'sha256' if c == 'parameters_sha256' else c}</th>" for c in columns
    )
    body = ""
    for row, color in zip(rows, colors, strict=True):
        cells = ""
        for column in columns:
            text = escape(format_value(column, row[column]))
            if column == "run":
                text = _dot(color) + text
            elif column == "parameters_sha256":
                text = f'<code title="{escape(str(row[column]))}">{text}</code>'
            is_best = column in best and row[column] == best[column]
            cells += f"<td{_kind(column, is_best)}>{text}</td>"
        body += f"<tr>{cells}</tr>\n"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _kind(column: str, best: bool = False) -> str:
    return ' class="text"' if column in _TEXT else ' class="best"' if best else ""


def _dot(color: str) -> str:
    return f'<span class="dot" style="background:{color}"></span>'


def _legend(runs: Sequence[RunRecord], colors: Sequence[str]) -> str:
    entries = (
        f"<span>{_dot(color)}{escape(run.name)}</span>"
        for run, color in zip(runs, colors, strict=True)
    )
    return f'<div class="legend">{"".join(entries)}</div>'


def _privacy(runs: Sequence[RunRecord], colors: Sequence[str]) -> str:
    """Return what the private runs state, a column each; nothing where none is private."""
    private = [(run, color) for run, color in zip(runs, colors, strict=True) if run.is_private]
    if not private:
        return ""
    head = "".join(f"<th>{_dot(color)}{escape(run.name)}</th>" for run, color in private)
    body = ""
    for heading, values in privacy_rows([run for run, _ in private]):
        cells = "".join(f"<td class='text'>{escape(value)}</td>" for value in values)
        if len(values) > 1 and len(set(values)) == 1:
            cells = f"<td class='text' colspan='{len(values)}'>{escape(values[0])}</td>"
        body += f"<tr><td class='text'>{escape(heading)}</td>{cells}</tr>"
    return (
        "<h2>Privacy</h2><div class='card scroll stated'><table><thead><tr><th></th>"
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


# --- curves -----------------------------------------------------------------------------------


def _switch_rules() -> str:
    """Return the rules that show the charts of the chosen abscissa: no script needed."""
    return "\n".join(
        f"#by-{name}:checked ~ .charts .{name} {{ display: block; }}\n"
        f"#by-{name}:checked ~ .controls label[for=by-{name}] "
        f"{{ color: var(--paper); background: var(--accent); }}\n"
        f"#by-{name}:focus-visible ~ .controls label[for=by-{name}] "
        f"{{ outline: 2px solid var(--ink); outline-offset: -2px; }}"
        for name in ABSCISSAS
    )


def _curves(runs: Sequence[RunRecord], colors: Sequence[str]) -> str:
    inputs = "".join(
        f'<input class="axes" type="radio" name="axis" id="by-{name}"'
        f"{' checked' if name == 'step' else ''}>"
        for name in ABSCISSAS
    )
    labels = "".join(f'<label for="by-{name}">{label}</label>' for name, label in _SWITCHES.items())
    figures = []
    for chart in charts_of(runs):
        drawn = {name: draw_chart(chart, runs, colors, name) for name in ABSCISSAS}
        svgs = "".join(f'<div class="along {k}">{svg}</div>' for k, svg in drawn.items() if svg)
        caption = f"<figcaption>{escape(chart.caption)}</figcaption>" if chart.caption else ""
        figures.append(
            f'<figure class="card"><h3>{escape(chart.title)}</h3>{svgs}{caption}</figure>'
        )
    return (
        f'<div>{inputs}<div class="controls"><div class="switch">{labels}</div>'
        f'{_legend(runs, colors)}</div><div class="charts">{"".join(figures)}</div></div>'
    )


# --- graph, time, configuration ---------------------------------------------------------------


def _graph(graph: Graph) -> str:
    if graph.problem:
        return (
            f'<div class="card"><h3>{escape(graph.title)}</h3><p>{escape(graph.problem)}</p></div>'
        )
    figures = "".join(
        f"<tr><td class='text'>{escape(label)}</td><td>{escape(value)}</td></tr>"
        for label, value in graph.figures
    )
    parts = [f'<div class="card"><h3>{escape(graph.title)}</h3><table>{figures}</table></div>']
    if graph.drawing:
        parts.insert(0, f'<figure class="card drawing">{graph.drawing}</figure>')
    if graph.eigenvalues:
        parts.append(
            f'<figure class="card"><h3>Eigenvalues of {graph.matrix}</h3>'
            f'<div class="narrow">{graph.eigenvalues}</div></figure>'
        )
    kind = "graph schedule" if graph.is_schedule else "graph"
    return f'<div class="{kind}">{"".join(parts)}</div>'


def _time(runs: Sequence[RunRecord], colors: Sequence[str]) -> str:
    longest = max([run.summary.get("seconds", 0.0) for run in runs] + [1e-9])
    rows = ""
    for run, color in zip(runs, colors, strict=True):
        parts = [run.summary.get(f"seconds_{kind}", 0.0) for kind in ("compute", "communicate")]
        compute, communicate = (f"{100 * part / longest:.2f}%" for part in parts)
        rows += (
            f"<div>{_dot(color)}{escape(run.name)}</div>"
            f'<div class="bar"><span style="width:{compute};background:{color}"></span>'
            f'<span class="talk" style="width:{communicate};background:{color}"></span></div>'
            f"<div>{parts[0]:.1f} s + {parts[1]:.1f} s</div>"
        )
    return (
        f'<div class="card"><div class="bars">{rows}</div><p class="quiet">Full color: compute; '
        "pale: communicate and wait. Of process 0, evaluation and checkpoints left out.</p></div>"
    )


def _configuration(runs: Sequence[RunRecord], colors: Sequence[str]) -> str:
    rows = ""
    for section in dict.fromkeys(key for run in runs for key in run.config):
        flat = [_flatten(run.config.get(section), "") for run in runs]
        keys = list(dict.fromkeys(key for values in flat for key in values))
        differ = [key for key in keys if any(v.get(key) != flat[0].get(key) for v in flat)]
        if differ:
            cells = (
                "<br>".join(_pair(key, values[key]) for key in differ if key in values)
                for values in flat
            )
            rows += f"<tr><td>{escape(section)}</td><td>{'</td><td>'.join(cells)}</td></tr>"
    html = ""
    if rows:
        names = zip(colors, runs, strict=True)
        head = "".join(f"<th>{_dot(color)}{escape(run.name)}</th>" for color, run in names)
        html = (
            '<div class="card scroll differs"><table><thead><tr><th>what differs</th>'
            f"{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        )
    for run in runs:
        text = escape(yaml.safe_dump(run.config, sort_keys=False))
        html += (
            f"<details><summary>{escape(run.name)}: config.yaml</summary>"
            f"<pre>{text}</pre></details>"
        )
    return html


def _pair(key: str, value: Any) -> str:
    shown = escape(str(value))
    return f'<span class="quiet">{escape(key)}</span> {shown}' if key else shown


def _flatten(value: Any, path: str) -> dict[str, Any]:
    """Return path -> leaf; a value that is no section has the path ''."""
    if not isinstance(value, Mapping):
        return {} if value is None else {path: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flatten(inner, f"{path}.{key}" if path else str(key))
    return flat
