"""gossamer analyze: what a private step gains and costs, and what it reveals at least."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # torch is imported when a command runs
    from gossamer.algorithms.privacy.improvement import Advice, Budget, Terms

__all__ = ["app"]

app = typer.Typer(
    help="Look into a run's problem before, or while, it trains.", no_args_is_help=True
)

_ROWS = 9


@app.command()
def improvement(
    file: Annotated[Path, typer.Argument(help="YAML of a run; its oracle should hold dp.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("-s", "--set", metavar="KEY=VALUE", help="Override a field of the file."),
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="Privacy budget [dp's].")] = None,
    delta: Annotated[float | None, typer.Option(help="Of the budget [dp's, or N^-1.1].")] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the examples [steps B / N].")
    ] = None,
    at: Annotated[Path | None, typer.Option(help="Run or checkpoint to look at [x0].")] = None,
    probes: Annotated[int, typer.Option(min=2, help="Random vectors for each trace.")] = 32,
    examples: Annotated[int, typer.Option(min=2, help="Examples at most.")] = 2048,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Estimate how much a step gains per example, and recommend batch size and switch."""
    from gossamer.launch.improvement import analyze

    found = analyze(
        file,
        settings or [],
        epsilon=epsilon,
        delta=delta,
        epochs=epochs,
        at=at,
        probes=probes,
        examples=examples,
    )
    if as_json:
        typer.echo(json.dumps(_as_json(found.terms, found.budget, found.advice, found.source)))
    else:
        _print(found.terms, found.budget, found.advice, found.source)


@app.command()
def audit(
    file: Annotated[Path, typer.Argument(help="YAML of a run whose oracle holds dp.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("-s", "--set", metavar="KEY=VALUE", help="Override a field of the file."),
    ] = None,
    canaries: Annotated[int, typer.Option(min=2, help="Half of them are examples.")] = 2000,
    guesses: Annotated[int, typer.Option(min=2, help="Canaries to guess about.")] = 500,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.9999)] = 0.95,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> int:
    """Bound epsilon from below by canaries in one run of the file's private oracle.

    The canaries stand in place of the task. Ends with status 1 where they refute the report.
    """
    from gossamer.launch.audit import audit as measure

    found = measure(file, settings or [], count=canaries, made=guesses, confidence=confidence)
    if as_json:
        reported = _number(found.reported)
        typer.echo(json.dumps({**dataclasses.asdict(found), "reported": reported}))
    else:
        verdict = "is too small" if found.is_refuted else "stands"
        typer.echo(
            f"{found.guesses.right} of {found.guesses.made} guesses right about "
            f"{found.guesses.canaries} canaries: epsilon is at least {found.found:.3f} at delta "
            f"{found.delta:.3g} ({confidence:.0%} confidence); the reported "
            f"{found.reported:.3f} {verdict}."
        )
    return 1 if found.is_refuted else 0


def _rows(terms: Terms, budget: Budget, advice: Advice) -> list[dict[str, float | int | None]]:
    """Return one row per batch size: powers of four, and the best one."""
    grid = {min(4**k, budget.examples) for k in range(_ROWS)} | {advice.batch}
    rows: list[dict[str, float | int | None]] = []
    for batch in sorted(grid):
        noise = budget.noise(batch)
        public, private = terms.per_example(batch), terms.per_example(batch, noise)
        cost = terms.cost(batch, noise)
        rows.append(
            {
                "batch_size": batch,
                "steps": budget.steps(batch),
                "noise_multiplier": noise,
                "public_per_example": _number(public),
                "private_per_example": _number(private),
                "decelerator_share": _number(terms.decelerator(batch, noise) / cost)
                if cost > 0
                else None,
            }
        )
    return rows


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # strict JSON has no infinity


def _as_json(terms: Terms, budget: Budget, advice: Advice, source: str) -> dict[str, object]:
    def numbers(record: dict[str, object]) -> dict[str, object]:
        return {k: _number(v) if isinstance(v, float) else v for k, v in record.items()}

    return {
        "terms": numbers(dataclasses.asdict(terms)),
        "budget": numbers(dataclasses.asdict(budget)),
        "batch_sizes": _rows(terms, budget, advice),
        "advice": numbers(dataclasses.asdict(advice)),
        "critical_batch": _number(terms.critical_batch),
        "source": source,
    }


def _print(terms: Terms, budget: Budget, advice: Advice, source: str) -> None:
    from rich.table import Table

    from gossamer.launch.commands.topology import console

    typer.echo(
        f"loss {terms.loss:.4g}, |G|^2 {terms.grad_square:.4g}, G'HG {terms.curvature:.4g}, "
        f"tr(H) {terms.trace:.4g} +- {terms.trace_error:.2g}, tr(H Sigma) "
        f"{terms.noise_curvature:.4g} +- {terms.noise_curvature_error:.2g}, "
        f"c {terms.clip_factor:.3g}"
    )
    table = Table(
        "", "batch", "steps", "sigma", "public gain/example", "private gain/example", "noise's part"
    )
    for row in _rows(terms, budget, advice):
        chosen = row["batch_size"] == advice.batch
        cells = ["-" if value is None else f"{value:.4g}" for value in row.values()]
        table.add_row("->" if chosen else "", *cells, style="bold" if chosen else None)
    console().print(table)
    for line in (*advice.text, source):
        typer.echo(f"{line}.")
