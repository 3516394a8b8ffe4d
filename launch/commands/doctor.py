"""gossamer doctor: what works on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

__all__ = ["doctor"]


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> int:
    """Say what this machine has, try every transport, and name a fix for what is missing."""
    from rich.console import Console
    from rich.table import Table

    from gossamer.launch.doctor import examine, is_usable

    with Console(stderr=True).status("looking; the transports take a while"):
        findings = list(examine())
    usable = is_usable(findings)
    if as_json:
        report = {"usable": usable, "findings": [asdict(finding) for finding in findings]}
        typer.echo(json.dumps(report, indent=1))
        return 0 if usable else 1
    table = Table("", "what")
    for column in ("found", "to fix it"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        mark = "[green]ok" if finding.ok else "[red]missing" if finding.required else "[yellow]-"
        table.add_row(mark, finding.name, finding.found, finding.fix)
    Console().print(table)
    return 0 if usable else 1
