"""Run folders, read back: configuration, metrics and summary of each run of a report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gossamer.runtime.errors import ConfigError

__all__ = [
    "COLUMNS",
    "RunRecord",
    "columns_of",
    "format_bytes",
    "format_value",
    "privacy_rows",
    "read_runs",
    "table_row",
]

Figure = float | int

COLUMNS = (
    "run",
    "algorithm",
    "topology",
    "ranks",
    "steps",
    "loss",
    "accuracy",
    "f1",
    "exact_match",
    "retrieval_accuracy",
    "knn1_accuracy",
    "probe_accuracy",
    "epsilon",
    "grad_norm",
    "consensus",
    "bytes_sent",
    "seconds",
    "parameters_sha256",
)
"""Of the table that compares runs; the README and --json use the same words."""


@dataclass(frozen=True)
class RunRecord:
    """One run folder.

    Attributes:
        name: the folder's, with its parent's where two would be the same.
        folder: where it lies.
        config: ``config.yaml``, every default filled in.
        records: the lines of ``metrics.jsonl``, ascending in step.
        summary: ``summary.json``.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    records: list[dict[str, Figure]]
    summary: dict[str, Any]

    def figures(self) -> set[str]:
        """Return the names of all figures that were logged."""
        return {name for record in self.records for name in record if name != "step"}

    @property
    def is_private(self) -> bool:
        """Whether it states its privacy."""
        return "privacy" in self.summary


def read_runs(folders: list[Path]) -> list[RunRecord]:
    """Read run folders; a comparison's folder counts as its runs.

    Raises:
        ConfigError: a folder is missing, holds no run, or its run has not ended.
    """
    runs = [run for folder in folders for run in _runs_below(folder)]
    paths = list(dict.fromkeys(run.resolve() for run in runs))
    names = [path.name for path in paths]
    records = []
    for path in paths:
        shared = names.count(path.name) > 1
        records.append(_read(path, f"{path.parent.name}/{path.name}" if shared else path.name))
    return records


def table_row(run: RunRecord) -> dict[str, Any]:
    """Return the values of ``COLUMNS`` for one run; None where it has none."""
    summary = run.summary
    sections = {kind: run.config.get(kind, {}) for kind in ("algorithm", "topology")}
    named = {kind: summary.get(kind, section.get("name")) for kind, section in sections.items()}
    if isinstance(named["topology"], dict):
        named["topology"] = named["topology"].get("name")
    row = {"run": run.name, "ranks": run.config.get("ranks"), **summary, **named}
    row["epsilon"] = summary.get("privacy", {}).get("epsilon")  # where it is a guarantee
    return {column: row.get(column) for column in COLUMNS}


def columns_of(rows: list[dict[str, Any]]) -> list[str]:
    """Return the columns to show: those that some row has a value for."""
    return [column for column in COLUMNS if any(row[column] is not None for row in rows)]


def privacy_rows(runs: list[RunRecord]) -> list[tuple[str, list[str]]]:
    """Return what private runs state, in words: a heading, and what each run says under it."""
    stated = [
        {**run.summary["privacy"], **{k: run.summary[k] for k in _BESIDE if k in run.summary}}
        for run in runs
    ]
    return [
        (key.replace("_", " "), [_spelled(said.get(key)) for said in stated])
        for key in dict.fromkeys(key for said in stated for key in said)
    ]


_BESIDE = ("filter", "public_data")
"""Of a summary, what belongs to the statement of privacy and other oracles say."""


def _spelled(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_spelled(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return "; ".join(map(_spelled, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return format_value("", value)


def format_value(column: str, value: Any) -> str:
    """Return a figure as people read it: 3 to 4 digits, bytes in their unit, a short hash."""
    if value is None:
        return "-"
    if column == "parameters_sha256":
        return str(value)[:12]
    if column.startswith("bytes"):
        return format_bytes(value)
    if column.startswith("seconds"):
        return f"{value:.1f}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def format_bytes(value: float) -> str:
    """Return a number of bytes in a decimal unit, to 3 digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def _runs_below(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigError(f"RUN: no folder {folder}; name one that 'gossamer run' wrote")
    if (folder / "config.yaml").is_file():
        return [folder]
    found = folder.glob("*/config.yaml")
    runs = [p.parent for p in sorted(found, key=lambda p: (p.stat().st_mtime_ns, p))]  # as they ran
    if not runs:
        raise ConfigError(
            f"RUN: {folder} has no config.yaml, nor has any folder in it; name a run's folder, "
            "or the folder of a comparison"
        )
    return runs


def _read(folder: Path, name: str) -> RunRecord:
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        summary = json.loads((folder / "summary.json").read_text())
    except FileNotFoundError as error:
        raise ConfigError(
            f"RUN: {folder} has no {Path(error.filename).name}, so its run has not ended; finish "
            f"it with 'gossamer run --resume {folder}'"
        ) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"RUN: {folder} is broken ({error}); run it again") from error
    return RunRecord(name, folder, config, _read_metrics(folder / "metrics.jsonl"), summary)


def _read_metrics(path: Path) -> list[dict[str, Figure]]:
    records = []
    try:
        for line in path.read_text().splitlines():
            values = json.loads(line)
            records.append({k: v for k, v in values.items() if isinstance(v, int | float)})
    except FileNotFoundError:
        raise ConfigError(
            f"RUN: {path.parent} has no metrics.jsonl; name a complete run folder"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"RUN: {path}, line {len(records) + 1}: {error}; continue that run with "
            f"'gossamer run --resume {path.parent}', or delete the line"
        ) from error
    return records
