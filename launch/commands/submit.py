"""gossamer submit FILE: run it as a batch job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["submit"]


def submit(
    file: Annotated[Path, typer.Argument(help="YAML, as for 'run'.")],
    scheduler: Annotated[str, typer.Option(help="slurm, pbs or lsf.")],
    nodes: Annotated[int, typer.Option(help="Machines.")],
    ranks_per_node: Annotated[int, typer.Option(help="Processes on each machine.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("-s", "--set", metavar="KEY=VALUE", help="Override a field."),
    ] = None,
    time: Annotated[str | None, typer.Option(help="Limit, HH:MM:SS.")] = None,
    queue: Annotated[
        str | None, typer.Option("--queue", "--partition", help="Queue or partition.")
    ] = None,
    account: Annotated[str | None, typer.Option(help="Account or project to charge.")] = None,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs on each machine.")] = 0,
    name: Annotated[str | None, typer.Option(help="Of the job [the file's].")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write [runs/NAME-001].")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the script.")] = False,
) -> None:
    """Check a file, write a job script for it and hand that to SLURM, PBS or LSF."""
    from gossamer.launch.submit import Job
    from gossamer.launch.submit import submit as submit_job

    job = Job(
        file,
        scheduler,  # type: ignore[arg-type]  # checked there, with the nearest name
        nodes,
        ranks_per_node,
        time,
        queue,
        account,
        gpus_per_node,
        name,
        out,
        settings or [],
    )
    submit_job(job, dry_run=dry_run)
