"""gossamer report RUN...: a page with curves about runs that have ended, and their table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["report"]


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or comparisons.")],
    out: Annotated[Path | None, typer.Option(help="Page to write [RUN/report.html].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Write a self-contained page about one run or several and print their table."""
    from gossamer.launch.report import print_table, write_report
    from gossamer.launch.report_runs import read_runs, table_row
    from gossamer.runtime.errors import ConfigError

    if out is None and len(runs) > 1:
        raise ConfigError("--out: missing; say where a page about several folders goes")
    path = out or runs[0] / "report.html"
    write_report(runs, path)
    records = read_runs(runs)
    if as_json:
        rows = [{**table_row(run), "folder": str(run.folder)} for run in records]
        typer.echo(json.dumps(rows, indent=1))
    else:
        print_table(records)
        typer.echo(f"Report: {path}")
