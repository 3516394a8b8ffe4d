"""What every benchmark shares: sizes, spreads of samples, and how rows are shown."""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import gossamer
from gossamer.runtime.errors import ConfigError

__all__ = [
    "DTYPES",
    "Options",
    "Row",
    "Spread",
    "interleave",
    "parse_bytes",
    "print_rows",
    "spread",
    "text",
    "text_spread",
    "versions",
]

Row = dict[str, Any]

DTYPES = {"float32": torch.float32, "float64": torch.float64} | {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Options:
    """The flags that all benchmarks take.

    Attributes:
        min_bytes: smallest message (a row).
        max_bytes: largest.
        factor: from one size to the next.
        iters: samples per figure.
        warmup: samples thrown away before them.
        dtype: of the rows.
    """

    min_bytes: int
    max_bytes: int
    factor: float
    iters: int
    warmup: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype: unknown dtype '{self.dtype}'; use one of {list(DTYPES)}")
        if not 0 < self.min_bytes <= self.max_bytes:
            raise ConfigError(
                f"--max-bytes: {self.max_bytes} is below --min-bytes {self.min_bytes}; swap them"
            )
        if self.factor <= 1:
            raise ConfigError(f"--factor: must be above 1, got {self.factor:g}; 2 doubles the size")

    def counts(self) -> list[int]:
        """Return the sweep as numbers of elements, ascending, each once."""
        counts, size = [], float(self.min_bytes)
        while size <= self.max_bytes:
            counts.append(max(1, int(size) // DTYPES[self.dtype].itemsize))
            size *= self.factor
        return sorted(set(counts))


def parse_bytes(text: str) -> int:
    """Read 8, 64K, 256M or 1G (powers of 1024).

    Raises:
        ConfigError: it is none of these.
    """
    match = re.fullmatch(r"(\d+)([KMG]?)B?", text.upper())
    if match is None:
        raise ConfigError(f"bytes: '{text}' is not a size; write 8, 64K, 256M or 1G")
    return int(match[1]) * _UNITS[match[2]]


@dataclass(frozen=True)
class Spread:
    """Seconds: the median of the samples, and where a tenth of them lies below and above."""

    median: float
    p10: float
    p90: float


def spread(samples: Sequence[float] | np.ndarray) -> Spread:
    """Summarise samples in seconds."""
    p10, median, p90 = np.percentile(np.asarray(samples), [10, 50, 90])
    return Spread(float(median), float(p10), float(p90))


def interleave(
    cases: Mapping[str, Callable[[], object]], iters: int, warmup: int
) -> dict[str, Spread]:
    """Time the cases in turn, ``iters`` times each.

    In turn, so that what else the machine does falls on all of them alike.
    """
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for k in range(warmup + iters):
        for name, case in cases.items():
            begin = time.perf_counter()
            case()
            if k >= warmup:
                samples[name].append(time.perf_counter() - begin)
    return {name: spread(times) for name, times in samples.items()}


def versions() -> dict[str, str]:
    """Return what a committed result must name."""
    return {
        "gossamer": gossamer.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def print_rows(
    rows: Sequence[Row],
    columns: Mapping[str, Callable[[Row], str]],
    *,
    title: str,
    as_json: bool,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Print rows as a table, or as JSON.

    Args:
        rows: a dictionary per line.
        columns: heading -> what the table shows of a row; JSON has the whole row.
        title: above the table; the benchmark's name in JSON.
        as_json: which of the two.
        extra: more keys of the JSON document.
    """
    if as_json:
        document = {"benchmark": title, "versions": versions(), "rows": list(rows), **(extra or {})}
        print(json.dumps(document, indent=1))
        return
    table = Table(title=title)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(write(row) for write in columns.values()))
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


def text(key: str, pattern: str = "{}") -> Callable[[Row], str]:
    """Return what writes a row's ``key`` as the pattern says; '-' where there is no value."""
    return lambda row: "-" if row[key] is None else pattern.format(row[key])


def text_spread(key: str, digits: int) -> Callable[[Row], str]:
    """Return what writes a median with its p10 and p90: 1.52 (1.40-1.90)."""

    def write(row: Row) -> str:
        if row[key] is None:
            return "-"
        median, p10, p90 = (f"{row[key + end]:.{digits}f}" for end in ("", "_p10", "_p90"))
        return f"{median} ({p10}-{p90})"

    return write
