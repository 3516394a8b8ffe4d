"""gossamer plan: which topology suits a network, and the table behind the advice."""

from __future__ import annotations

import json
import math
from typing import Annotated, Literal

import typer
import yaml
from rich.table import Table

from gossamer.launch.commands.topology import console
from gossamer.topologies import Method, Plan
from gossamer.topologies import plan as make_plan

__all__ = ["plan"]


def plan(
    ranks: Annotated[int, typer.Option(help="Nodes of the graph.")],
    params: Annotated[float, typer.Option(help="Parameters of the model: 100e6.")],
    latency: Annotated[float, typer.Option(help="Seconds per message: 50e-6.")],
    bandwidth: Annotated[float, typer.Option(help="Bytes per second of a rank's link: 3.125e9.")],
    goal: Annotated[
        Literal["per_step", "average"],
        typer.Option(help="Training steps, or one average to within epsilon."),
    ] = "per_step",
    epsilon: Annotated[float, typer.Option(help="Disagreement that counts as none.")] = 1e-3,
    dtype_bytes: Annotated[float, typer.Option(help="Bytes per parameter on the wire.")] = 4,
    ranks_per_node: Annotated[int, typer.Option(help="Ranks on each machine.")] = 1,
    heterogeneous: Annotated[
        bool, typer.Option("--heterogeneous", help="The ranks' data differ in distribution.")
    ] = False,
    compute_time: Annotated[
        float | None, typer.Option(help="Seconds a rank computes per step.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare the topologies on a network, and recommend one."""
    made = make_plan(
        ranks,
        params,
        latency,
        bandwidth,
        goal=goal,
        epsilon=epsilon,
        dtype_bytes=dtype_bytes,
        ranks_per_node=ranks_per_node,
        heterogeneous=heterogeneous,
        compute_time_s=compute_time,
    )
    if as_json:
        typer.echo(json.dumps(_as_json(made)))
    else:
        _print(made, epsilon)


def _as_json(made: Plan) -> dict[str, object]:
    return {
        "choice": made.choice.label,
        "topology": made.config(),
        "reasons": list(made.reasons),
        "parties": made.parties,
        "ranks_per_node": made.ranks_per_node,
        "methods": [
            {
                "method": method.label,
                "topology": method.topology,
                "copies_per_round": method.copies,
                "round_s": method.round_s,
                "rate": method.rate,
                "rounds": method.rounds if math.isfinite(method.rounds) else None,
                "total_s": method.total_s if math.isfinite(method.total_s) else None,
                "nats_per_copy": method.nats_per_copy,
                "exact": method.exact,
            }
            for method in made.methods
        ],
    }


def _print(made: Plan, epsilon: float) -> None:
    table = Table(
        "",
        "method",
        "copies/round",
        "s/round",
        "rate",
        f"rounds to {epsilon:g}",
        "s in all",
        "nats/copy",
    )
    for method in made.methods:
        chosen = method is made.choice
        table.add_row(*_cells(method, chosen), style="bold" if chosen else None)
    console().print(table)
    for reason in made.reasons:
        typer.echo(reason)
    config = made.config()
    advice = "topology: " + yaml.safe_dump(config, default_flow_style=True, sort_keys=False).strip()
    typer.echo(advice if config else f"Use {made.choice.label}.")


def _cells(method: Method, chosen: bool) -> list[str]:
    agreement = "exact" if method.exact else f"{method.rate:.4f}"
    bought = method.nats_per_copy
    return [
        "->" if chosen else "",
        method.label,
        f"{method.copies:.3g}",
        f"{method.round_s:.4g}",
        agreement,
        f"{method.rounds:g}",
        f"{method.total_s:.4g}",
        "" if bought is None else f"{bought:.3f}",
    ]
