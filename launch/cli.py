"""The command line: one function per verb, each a thin door to a module that does the work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gossamer import __version__
from gossamer.launch.commands import analyze, bench, topology, zo
from gossamer.launch.commands.algorithms import algorithms
from gossamer.launch.commands.doctor import doctor
from gossamer.launch.commands.export import export
from gossamer.launch.commands.plan import plan
from gossamer.launch.commands.report import report
from gossamer.launch.commands.reproduce import reproduce
from gossamer.launch.commands.submit import submit
from gossamer.launch.status import exit_status

__all__ = ["app", "main"]

app = typer.Typer(
    help="Decentralized and data-parallel training on any graph, from a laptop to a cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gossamer {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print it and exit."),
    ] = False,
) -> None:
    """Options of all commands."""


Overrides = Annotated[
    list[str] | None,
    typer.Option("-s", "--set", metavar="KEY=VALUE", help="Override a field: -s algorithm.c=2."),
]


@app.command()
def run(
    file: Annotated[Path | None, typer.Argument(help="YAML; not needed with --resume.")] = None,
    settings: Overrides = None,
    ranks: Annotated[int | None, typer.Option(help="Nodes of the graph.")] = None,
    transport: Annotated[
        str | None, typer.Option(help="auto, stacked, native, mpi, gloo, nccl or hybrid.")
    ] = None,
    processes: Annotated[int | None, typer.Option(help="Local processes to start.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write [runs/NAME-001].")] = None,
    resume: Annotated[Path | None, typer.Option(help="Run or checkpoint to continue.")] = None,
) -> int:
    """Train: one run, or the several of a file's 'compare'."""
    from gossamer.launch.start import start_run

    options = {"ranks": ranks, "transport": transport, "processes": processes}
    return start_run(file, settings or [], options, out, resume)


@app.command()
def schema() -> None:
    """Print the JSON schema of the YAML file, for editors to complete."""
    from gossamer.launch.schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=1))


app.command()(report)
app.command()(export)
app.command()(algorithms)
app.command()(plan)
app.add_typer(topology.app, name="topology")
app.add_typer(bench.app, name="bench")
app.add_typer(analyze.app, name="analyze")
app.add_typer(zo.app, name="zo")
app.command()(submit)
app.command()(doctor)
app.command()(reproduce)


def main() -> None:
    """Run the command line and exit with its status."""
    sys.exit(exit_status(_invoke))


# typer carries its own copy of click; this is the base of its usage errors in either.
_UsageError: Any = typer.BadParameter.__mro__[1]


def _invoke() -> int:
    try:
        result = app(standalone_mode=False)
    except _UsageError as error:
        error.show()
        return 2
    return result if isinstance(result, int) else 0
