"""gossamer analyze improvement | audit: what a private step gains, what a private run leaks."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # torch is imported when a command runs
    from gossamer.algorithms.privacy.improvement import Advice, Budget, Terms
    from gossamer.launch.audit import Audit

__all__ = ["app"]

app = typer.Typer(
    help="Look into a run before it trains: what it gains, what it leaks.", no_args_is_help=True
)

_ROWS = 9


File = Annotated[Path, typer.Argument(help="YAML of a run; its oracle should hold dp.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("-s", "--set", metavar="KEY=VALUE", help="Override a field of the file."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def audit(
    file: File,
    settings: Overrides = None,
    canaries: Annotated[int, typer.Option(min=2, help="Examples to guess about.")] = 1000,
    guesses: Annotated[
        int | None, typer.Option(min=1, help="How many, the others are abstentions [half].")
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of the lower bound.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the canaries' places and coins.")] = 0,
    as_json: AsJson = False,
) -> int:
    """Train the run on canaries and prove an epsilon from below. Status 1 above the reported."""
    from gossamer.launch.audit import audit as run_audit

    found = run_audit(
        file,
        settings or [],
        canaries=canaries,
        guesses=guesses,
        confidence=confidence,
        seed=seed,
    )
    typer.echo(json.dumps(dataclasses.asdict(found)) if as_json else _told(found))
    return 1 if found.refuted else 0


def _told(found: Audit) -> str:
    verdict = "more than" if found.refuted else "which does not contradict"
    return (
        f"{found.right} of {found.guesses} guesses about {found.canaries} canaries were right.\n"
        f"With confidence {found.confidence:g}, epsilon is at least {found.lower_bound:.3g} at "
        f"delta {found.delta:.3g}, {verdict} the {found.reported:.3g} that the run reports.\n"
        "One run proves an epsilon from below: that it is small is no guarantee."
    )


@app.command()
def improvement(
    file: File,
    settings: Overrides = None,
    epsilon: Annotated[float | None, typer.Option(help="Privacy budget [dp's].")] = None,
    delta: Annotated[float | None, typer.Option(help="Of the budget [dp's, or N^-1.1].")] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the examples [steps B / N].")
    ] = None,
    at: Annotated[Path | None, typer.Option(help="Run or checkpoint to look at [x0].")] = None,
    probes: Annotated[int, typer.Option(min=2, help="Random vectors for each trace.")] = 32,
    examples: Annotated[int, typer.Option(min=2, help="Examples at most.")] = 2048,
    as_json: AsJson = False,
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
