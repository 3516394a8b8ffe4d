"""``gossamer algorithms``: what each keeps, sends and asks of W."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

__all__ = ["algorithms"]


def algorithms(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the algorithms: source, state, messages and elements per step, admitted W."""
    from gossamer.launch.algorithm_table import algorithm_table, markdown

    rows = algorithm_table()
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    else:
        typer.echo(markdown(rows))
