"""A claim: a sentence, a measured figure, the bound it must keep, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["Claim", "as_json", "at_least", "at_most", "between", "print_table", "shown", "skipped"]


@dataclass(frozen=True)
class Claim:
    """One line of a reproduction.

    Attributes:
        claim: what is claimed, one sentence.
        figure: what was measured; None where nothing was.
        threshold: the bound, as text; empty for a figure that is only shown.
        passed: the verdict; None where there is none (shown, or skipped).
        seeds: how many seeds stand behind the figure; 1 where nothing is random.
        note: what else was seen, or why it was skipped.
    """

    claim: str
    figure: float | None
    threshold: str
    passed: bool | None
    seeds: int
    note: str = ""

    @property
    def verdict(self) -> str:
        """Passed, FAILED, skipped or shown."""
        if self.passed is None:
            return "skipped" if self.figure is None else "shown"
        return "passed" if self.passed else "FAILED"


def at_least(claim: str, figure: float, bound: float, seeds: int, note: str = "") -> Claim:
    """Claim ``figure >= bound``; a NaN fails, here and below."""
    return Claim(claim, float(figure), f">= {bound:g}", bool(figure >= bound), seeds, note)


def at_most(claim: str, figure: float, bound: float, seeds: int, note: str = "") -> Claim:
    """Claim ``figure <= bound``."""
    return Claim(claim, float(figure), f"<= {bound:g}", bool(figure <= bound), seeds, note)


def between(
    claim: str, figure: float, low: float, high: float, seeds: int, note: str = ""
) -> Claim:
    """Claim ``low <= figure <= high``."""
    passed = bool(low <= figure <= high)
    return Claim(claim, float(figure), f"{low:g} .. {high:g}", passed, seeds, note)


def shown(claim: str, figure: float, seeds: int, note: str = "") -> Claim:
    """State a figure that nothing is claimed about."""
    return Claim(claim, float(figure), "", None, seeds, note)


def skipped(claim: str, threshold: str, why: str) -> Claim:
    """State a claim that was not tested."""
    return Claim(claim, None, threshold, None, 0, why)


def print_table(title: str, claims: Sequence[Claim], console: Console) -> None:
    """Print claim, figure, threshold and verdict."""
    table = Table(title=title, title_justify="left")
    table.add_column("claim", ratio=5)
    table.add_column("figure", justify="right", no_wrap=True)
    table.add_column("threshold", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("seeds", justify="right", no_wrap=True)
    styles = {"passed": "green", "FAILED": "bold red", "skipped": "yellow", "shown": "dim"}
    for c in claims:
        said = f"{c.claim}\n[dim]{c.note}[/dim]" if c.note else c.claim
        figure = "" if c.figure is None else f"{c.figure:.4g}"
        style = styles[c.verdict]
        verdict = f"[{style}]{c.verdict}[/{style}]"
        table.add_row(said, figure, c.threshold, verdict, str(c.seeds) if c.seeds else "")
    console.print(table)


def as_json(claim: Claim) -> dict[str, Any]:
    """Return the claim as JSON can hold it: no NaN, no infinity."""
    figure = claim.figure
    finite = figure is not None and math.isfinite(figure)
    return {**asdict(claim), "figure": figure if finite else None, "verdict": claim.verdict}
