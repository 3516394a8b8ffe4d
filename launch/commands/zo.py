"""gossamer zo export | verify | replay: a run as the numbers it exchanged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # torch is imported when a command runs
    from gossamer.launch.replay import Exported

__all__ = ["app"]

app = typer.Typer(
    help="Zeroth-order runs as files of a few MB: the numbers that all ranks applied.",
    no_args_is_help=True,
)

File = Annotated[Path, typer.Argument(help="Of 'gossamer zo export'.")]


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run folder with records.zo, ended.")],
    out: Annotated[Path, typer.Argument(help="File to write.")],
) -> None:
    """Write what a run is replayed from into one file."""
    from gossamer.launch.replay import export as write

    typer.echo(f"{out}: {_told(write(run, out))}")


@app.command()
def verify(file: File) -> None:
    """Check a file: hash, header, order and completeness of its records, finite numbers."""
    from gossamer.launch.replay import read_exported

    typer.echo(f"{file}: {_told(read_exported(file))}")


@app.command()
def replay(
    file: File,
    out: Annotated[Path | None, typer.Option(help="Folder for the model, safetensors.")] = None,
) -> int:
    """Make the run's parameters again. Status 1 if they are not the run's to the bit."""
    from gossamer.launch.replay import read_exported
    from gossamer.launch.replay import replay as make

    exported = read_exported(file)
    found = make(exported, out)
    typer.echo(f"parameters_sha256 {found}")
    same = found == exported.parameters_sha256
    told = "the run's, to the bit" if same else f"not the run's, {exported.parameters_sha256}"
    typer.echo(told)
    return 0 if same else 1


def _told(exported: Exported) -> str:
    header, applied = exported.header, sum(1 for _ in exported.sets())
    return (
        f"{len(exported.records)} records of {applied} steps ({exported.steps} run, on "
        f"{header['ranks']} ranks), {exported.records.nbytes} bytes; base_sha256 "
        f"{header['base_sha256'][:12]}.., parameters_sha256 {exported.parameters_sha256[:12]}.."
    )
