"""gossamer topology list | show | check | draw: look at graphs before training on them."""

from __future__ import annotations

import inspect
import json
import sys
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from gossamer.topologies import (
    Round,
    Topology,
    TopologyParameterError,
    build,
    factories,
    spectrum,
)
from gossamer.topologies.custom import num_nodes
from gossamer.topologies.drawing import draw as draw_picture

__all__ = ["app", "console"]

app = typer.Typer(
    help="List, describe, check and draw the graphs to train on.", no_args_is_help=True
)

_EDGE_TABLE_RANKS = 16  # beyond, a table of all weights is no help
_EDGE_TABLE_ROUNDS = 8

Ranks = Annotated[int, typer.Option(help="Nodes of the graph.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "-s", "--set", metavar="KEY=VALUE", help="A parameter of it: -s k=2 -s lazy=true."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command("list")
def list_topologies(as_json: AsJson = False) -> None:
    """List the topologies and their parameters."""
    listed = {name: (_defaults(factory), _summary(factory)) for name, factory in factories.items()}
    if as_json:
        rows = [
            {"name": name, "parameters": parameters, "description": summary}
            for name, (parameters, summary) in listed.items()
        ]
        typer.echo(json.dumps(rows))
        return
    table = Table("name", "parameters", "what it is")
    for name, (parameters, summary) in listed.items():
        spelled = [f"{key}={'..' if value is None else value}" for key, value in parameters.items()]
        table.add_row(name, ", ".join(spelled), summary)
    console().print(table)
    typer.echo("All take weights, lazy, hierarchical, check; see 'gossamer topology show NAME'.")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A name of 'gossamer topology list'.")],
    ranks: Ranks = 8,
    settings: Settings = None,
    params: Annotated[
        float | None, typer.Option(help="Parameters of the model, for bytes per step.")
    ] = None,
    dtype_bytes: Annotated[float, typer.Option(help="Bytes per parameter on the wire.")] = 4,
    plot: Annotated[Path | None, typer.Option(help="Draw it too: .png, .svg or .pdf.")] = None,
    as_json: AsJson = False,
) -> None:
    """Describe a topology: class, degree, rate of agreement, edges and weights."""
    topology = build(name, ranks, **_parsed(settings or []))
    if plot is not None:
        draw_picture(topology, plot)
    _describe(topology, as_json, None if params is None else params * dtype_bytes)


@app.command()
def check(
    file: Annotated[
        str,
        typer.Argument(
            help="A .npy, .gml, .graphml, .edgelist or .adjlist file, module:function, or an "
            "experiment's YAML."
        ),
    ],
    ranks: Annotated[int | None, typer.Option(help="Ranks of the run [as the file says].")] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Check a graph of your own, and describe it; a fault ends with status 2."""
    options = _parsed(settings or [])
    if Path(file).suffix in (".yaml", ".yml"):
        name, given, n = _section(Path(file), ranks)
        topology = build(name, n, **{**given, **options})
    else:
        n = ranks if ranks is not None else num_nodes(file, options.get("directed"))
        topology = build("custom", n, edges=file, **options)
    _describe(topology, as_json, None)


@app.command()
def draw(
    name: Annotated[str, typer.Argument(help="A name of 'gossamer topology list'.")],
    ranks: Ranks = 8,
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write: .png, .svg or .pdf [NAME-RANKS.png].")
    ] = None,
    round_index: Annotated[
        int | None, typer.Option("--round", help="One round only [all of a period, up to 8].")
    ] = None,
) -> None:
    """Draw a topology, a panel for each round."""
    topology = build(name, ranks, **_parsed(settings or []))
    out = out or Path(f"{topology.name}-{ranks}.png")
    draw_picture(topology, out, t=round_index)
    typer.echo(f"wrote {out}")


def console() -> Console:
    """Return where tables go: as wide as the terminal, 120 columns where there is none."""
    return Console(width=None if sys.stdout.isatty() else 120)


def _describe(topology: Topology, as_json: bool, message_bytes: float | None) -> None:
    found = spectrum(topology)
    rounds = [topology.round(t) for t in range(topology.num_described)]
    copies = sum(round_.max_degree for round_ in rounds) / len(rounds)
    facts: dict[str, Any] = {
        "name": topology.name,
        "n": topology.n,
        "kind": topology.kind,
        "period": topology.period,
        "params": topology.params,
        "degree": topology.degree,
        "copies_per_step": copies,
        "bytes_per_step": None if message_bytes is None else copies * message_bytes,
        "rho": found.rho,
        "rho_period": found.rho_period,
        "rho_ms": found.rho_ms,
        "rate": found.rate,
        "gap": found.gap,
        "lambda_min": found.lambda_min,
        "exact_after": found.exact_after,
        "rounds_to_1e-6": found.rounds_to(1e-6),
    }
    if as_json:
        facts["rounds"] = [
            {
                "t": t,
                "edges": list(
                    zip(
                        round_.sources.tolist(),
                        round_.targets.tolist(),
                        round_.weights.tolist(),
                        strict=True,
                    )
                ),
                "self_weights": round_.self_weight.tolist(),
            }
            for t, round_ in enumerate(rounds)
        ]
        typer.echo(json.dumps(facts, default=str))
        return
    if facts["rounds_to_1e-6"] is None and topology.is_doubly_stochastic:
        facts["rounds_to_1e-6"] = f"about {found.estimated_rounds(1e-6):.3g}"
    table = Table("field", "value", show_header=False)
    for field, value in facts.items():
        if value is not None and value != {}:
            table.add_row(field, f"{value:.9g}" if isinstance(value, float) else str(value))
    console().print(table)
    if topology.n <= _EDGE_TABLE_RANKS:
        console().print(_edge_table(rounds, is_static=topology.is_static))


def _edge_table(rounds: list[Round], *, is_static: bool) -> Table:
    shown = rounds[:_EDGE_TABLE_ROUNDS]
    heads = (
        ["own and received, with weights"]
        if is_static
        else [f"round {t}" for t in range(len(shown))]
    )
    table = Table("rank", *heads)
    for rank in range(rounds[0].n):
        cells = []
        for round_ in shown:
            sources, weights = round_.recv(rank)
            received = zip(
                [rank, *sources.tolist()], [round_.self_weight[rank], *weights], strict=True
            )
            cells.append("  ".join(f"{source}: {_number(weight)}" for source, weight in received))
        table.add_row(str(rank), *cells)
    return table


def _number(weight: float) -> str:
    fraction = Fraction(float(weight)).limit_denominator(100)
    return str(fraction) if abs(fraction - Fraction(float(weight))) < 1e-12 else f"{weight:.4g}"


def _summary(factory: Any) -> str:
    return (inspect.getdoc(factory) or "").partition("\n\n")[0].replace("\n", " ")


def _defaults(factory: Any) -> dict[str, Any]:
    parameters = inspect.signature(factory).parameters
    return {
        key: None if parameter.default is parameter.empty else parameter.default
        for key, parameter in parameters.items()
        if key not in ("n", "weights", "allow_biased")
    }


def _parsed(settings: list[str]) -> dict[str, Any]:
    """Turn KEY=VALUE and KEY.INNER=VALUE, values in YAML, into a dictionary."""
    parsed: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise TopologyParameterError(f"-s: expected KEY=VALUE, got {setting!r}; as in -s k=2")
        *outer, last = key.split(".")
        inner = parsed
        for part in outer:
            inner = inner.setdefault(part, {})
        try:
            inner[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise TopologyParameterError(f"-s {key}: {value!r} is not YAML") from error
    return parsed


def _section(path: Path, ranks: int | None) -> tuple[str, dict[str, Any], int]:
    """Return name, parameters and ranks of the topology section of an experiment's YAML."""
    try:
        document = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TopologyParameterError(f"{path}: cannot be read as YAML: {error}") from error
    section = document.get("topology") if isinstance(document, dict) else None
    section = {"name": section} if isinstance(section, str) else section
    if not isinstance(section, dict) or "name" not in section:
        raise TopologyParameterError(f"{path}: has no 'topology: {{name: ..}}' section to check")
    n = ranks if ranks is not None else document.get("ranks")
    if n is None:
        raise TopologyParameterError(f"{path}: has no 'ranks:'; give --ranks")
    given = {key: value for key, value in section.items() if key != "name"}
    return str(section["name"]), given, n
