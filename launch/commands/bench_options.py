"""Options that the benchmarks share."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["Dtype", "Factor", "Iters", "Json", "MaxBytes", "MinBytes", "Warmup", "integers"]

MinBytes = Annotated[str, typer.Option(help="Smallest message: 8, 64K, 256M.")]
MaxBytes = Annotated[str, typer.Option(help="Largest message.")]
Factor = Annotated[float, typer.Option(help="From one size to the next.")]
Iters = Annotated[int, typer.Option(min=1, help="Samples per figure.")]
Warmup = Annotated[int, typer.Option(min=0, help="Samples thrown away first.")]
Dtype = Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def integers(flag: str, text: str, least: int) -> list[int]:
    """Return the numbers in ``text``, by commas, each at least ``least``."""
    from gossamer.runtime.errors import ConfigError

    words = text.split(",")
    if not all(word.strip().isdigit() and int(word) >= least for word in words):
        raise ConfigError(f"{flag}: '{text}' must be numbers of at least {least}: 2,4,8")
    return [int(word) for word in words]
