"""gossamer reproduce PAPER: run what a paper claims again, and judge it."""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from typing import Annotated

import typer

__all__ = ["reproduce"]

_SEEDS = 3
_QUICK_SEEDS = 1
_MOST_JOBS = 8


def reproduce(
    paper: Annotated[
        str,
        typer.Argument(help="dnasa, doppler, disk, dp-pretraining, emc2, sltrain or zo-bench."),
    ],
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of every random experiment [3, or what a group of claims names]."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One seed: a look, not evidence. Overrides --seeds.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(metavar="GROUP", help="This group of claims alone.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time [one per core, 8 at most].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> int:
    """Run a paper's claims again: claim, figure, threshold, verdict. Status 1 if one fails."""
    from rich.console import Console

    from gossamer.launch.commands.topology import console
    from gossamer.launch.reproduce.claims import as_json as as_dictionary
    from gossamer.launch.reproduce.claims import print_table
    from gossamer.launch.reproduce.paper import find_paper
    from gossamer.launch.reproduce.simulation import Laboratory
    from gossamer.runtime.errors import ConfigError, nearest

    found = find_paper(paper)
    for name in only or []:
        if name not in found.groups:
            raise ConfigError(f"--only: unknown group '{name}'{nearest(name, found.groups)}")
    chosen = {name: group for name, group in found.groups.items() if name in (only or found.groups)}
    jobs = jobs or min(_MOST_JOBS, os.cpu_count() or 1)
    for package in ("HF_HUB", "HF_DATASETS"):  # a bar for every one of many runs
        os.environ.setdefault(f"{package}_DISABLE_PROGRESS_BARS", "1")
    begin, claims = time.perf_counter(), []
    with Console(stderr=True).status("") as status, Laboratory(jobs=jobs) as lab:

        def show(group: str, ended: int, total: int) -> None:
            status.update(f"{group}: {ended} of {total} runs")

        for name, group in chosen.items():
            lab.progress = partial(show, name)
            lab.seeds = _QUICK_SEEDS if quick else seeds or found.seeds.get(name, _SEEDS)
            claims += list(group(lab))
    seconds = time.perf_counter() - begin
    failed = sum(claim.passed is False for claim in claims)
    if as_json:
        report = {
            "paper": paper,
            "claims": [as_dictionary(claim) for claim in claims],
            "limits": found.limits,
            "quick": quick,
            "seconds": seconds,
        }
        typer.echo(json.dumps(report, indent=1))
    else:
        print_table(found.title, claims, console())
        if found.limits:
            typer.echo("What it does not do:")
        for limit in found.limits:
            typer.echo(f"- {limit}")
        if quick:
            typer.echo("Quick: one seed. A look, not evidence; leave --quick out for the verdict.")
        tested = sum(claim.passed is not None for claim in claims)
        typer.echo(f"{tested - failed} of {tested} claims passed in {seconds:.0f} s")
    sys.stdout.flush()
    return 1 if failed else 0
