"""What a run shows at its end: a table on the screen and a page with curves."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gossamer.launch.report_page import render_page
from gossamer.launch.report_runs import (
    RunRecord,
    columns_of,
    format_value,
    privacy_rows,
    read_runs,
    table_row,
)

__all__ = ["finish", "print_table", "write_report"]

_PLAIN_WIDTH = 180
"""Columns of the table where the output is no terminal: a file wraps nothing."""


def write_report(folders: list[Path], path: Path) -> None:
    """Write one self-contained HTML page about one run or several.

    Args:
        folders: run folders; a comparison's folder counts as its runs.
        path: the page; its folder is made.

    Raises:
        ConfigError: a folder is missing or incomplete; nothing is written.
    """
    page = render_page(read_runs(folders), title=path.parent.resolve().name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)


def finish(root: Path, folders: list[Path]) -> None:
    """Write ``root/report.html`` about the runs in ``folders`` and print their summaries.

    Process 0 calls it at the end of a run or comparison.
    """
    path = root / "report.html"
    write_report(folders, path)
    print_table(read_runs(folders))
    print(f"Report: {path}")


def print_table(runs: list[RunRecord]) -> None:
    """Print the summaries of ``runs`` as one table, and what private ones state as another."""
    rows = [table_row(run) for run in runs]
    shown = columns_of(rows)
    table = Table()
    for column in shown:
        text = column in ("run", "algorithm", "topology")
        label = "sha256" if column == "parameters_sha256" else column
        table.add_column(label, justify="left" if text else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(format_value(column, row[column]) for column in shown))
    console = Console()
    console = Console(width=console.width if console.is_terminal else _PLAIN_WIDTH)
    console.print(table)
    private = [run for run in runs if run.is_private]
    if private:
        stated = Table("privacy", *(escape(run.name) for run in private))
        for heading, values in privacy_rows(private):
            stated.add_row(heading, *map(escape, values))
        console.print(stated)
