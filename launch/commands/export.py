"""gossamer export RUN OUT: a run's model for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["export"]


def export(
    run: Annotated[Path, typer.Argument(help="Run folder, or a checkpoint in it.")],
    out: Annotated[Path, typer.Argument(help="Folder to write, new or empty.")],
) -> None:
    """Write the mean of the ranks' models as a plain checkpoint, its weights dense."""
    from gossamer.launch.export import export_model

    typer.echo(f"{out}: {export_model(run, out)}")
