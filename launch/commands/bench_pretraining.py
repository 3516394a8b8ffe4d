"""gossamer bench low-rank, memory, pretraining: what a layer costs, what a training takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from gossamer.launch.commands.bench_options import Dtype, Iters, Json, Warmup, integers

if TYPE_CHECKING:  # torch is imported when a command runs
    from gossamer.launch.bench.private import Aim

__all__ = ["low_rank", "memory", "pretraining"]


def low_rank(
    widths: Annotated[str, typer.Option(help="Of square layers, by commas.")] = "512,1024,2048",
    tokens: Annotated[int, typer.Option(min=1, help="Of a pass.")] = 1024,
    rank: Annotated[int, typer.Option(min=0, help="Of B A; 0: a quarter of the width.")] = 0,
    density: Annotated[float, typer.Option(min=0, max=1, help="Of S.")] = 0.03,
    iters: Iters = 15,
    warmup: Warmup = 2,
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> int:
    """Forward and backward of a layer W = s B A + S, beside the official way and a dense layer."""
    from rich.console import Console

    from gossamer.launch.bench.low_rank import LowRankRequest, aims
    from gossamer.launch.bench.low_rank import low_rank as measure
    from gossamer.launch.bench.measure import DTYPES, print_rows, text, text_spread
    from gossamer.runtime.errors import ConfigError

    if dtype not in DTYPES:
        raise ConfigError(f"--dtype: unknown dtype '{dtype}'; use one of {list(DTYPES)}")
    sizes = integers("--widths", widths, 1)
    request = LowRankRequest(sizes, tokens, rank, density, dtype, iters, warmup)
    with Console(stderr=True).status("") as status:
        rows = measure(request, status.update)
    held = aims(rows)
    print_rows(
        rows,
        {
            "width": text("width"),
            "tokens": text("tokens"),
            "rank": text("rank"),
            "way": text("way"),
            "ms (p10-p90)": text_spread("ms", 1),
            "CPU ms": text("cpu_ms", "{:.1f}"),
            "official / it": text("official_ratio", "{:.2f}"),
            "dense / it": text("dense_ratio", "{:.2f}"),
            "useful GFLOP/s": text("gflops", "{:.1f}"),
            "extra MiB": text("extra_mib", "{:.1f}"),
        },
        title="low-rank",
        as_json=as_json,
        extra={"aims": [{**aim._asdict(), "met": aim.is_met} for aim in held]},
    )
    if not as_json:
        _say(held)
    return 0


def memory(
    model: Annotated[
        str, typer.Option(help="llama-60m, -130m, -350m, -1b, -7b, by commas.")
    ] = "llama-60m,llama-130m,llama-350m,llama-1b,llama-7b",
    method: Annotated[
        str, typer.Option(help="full, low-rank, sltrain, relora, galore, by commas.")
    ] = "full,low-rank,sltrain,relora,galore",
    optimizer: Annotated[str, typer.Option(help="Of all methods but galore.")] = "adam",
    per_layer: Annotated[
        bool, typer.Option(help="Update each layer in the backward pass.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a pass.")] = 1,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 256,
    vocabulary: Annotated[int, typer.Option(min=2, help="Tokens there are.")] = 32000,
    rank: Annotated[int, typer.Option(min=0, help="Of B A; 0: the paper's.")] = 0,
    density: Annotated[float | None, typer.Option(help="Of S [the paper's].")] = None,
    dtype: Dtype = "bfloat16",
    device: Annotated[str, typer.Option(help="Whose way to multiply: cpu or cuda.")] = "cuda",
    measure: Annotated[bool, typer.Option(help="Make the steps, on the CPU, and compare.")] = False,
    as_json: Json = False,
) -> int:
    """What training takes, part by part, counted without allocating it."""
    from rich.console import Console

    from gossamer.launch.bench.llama_steps import LlamaRequest
    from gossamer.launch.bench.measure import Row, print_rows, text
    from gossamer.launch.bench.memory import memory as count
    from gossamer.runtime.errors import ConfigError

    request = LlamaRequest(
        models=model.split(","),
        methods=method.split(","),
        optimizer=optimizer,
        per_layer=per_layer,
        batch=batch,
        context=context,
        vocabulary=vocabulary,
        rank=rank,
        density=density,
        dtype=dtype,
        device=device,
    )
    if measure and device != "cpu":
        raise ConfigError("--measure: makes steps on the CPU; add --device cpu")
    with Console(stderr=True).status("") as status:
        rows = count(request, measure, status.update)

    def megabytes(key: str) -> Callable[[Row], str]:
        return lambda row: "-" if row[key] is None else f"{row[key] / 1e6:,.1f}"

    parts = ("weights", "frozen", "places", "gradients", "optimizer", "activations", "update")
    measured = ["measured"] if measure else []
    print_rows(
        rows,
        {
            "model": text("model"),
            "method": text("method"),
            "parameters": text("parameters", "{:,}"),
            **{part: megabytes(part) for part in (*parts, "total", *measured)},
            **({"total / it": text("ratio", "{:.2f}")} if measure else {}),
        },
        title="memory, MB",
        as_json=as_json,
    )
    return 0


def pretraining(
    model: Annotated[str, typer.Option(help="llama-60m, -130m, ..., by commas.")] = "llama-60m",
    method: Annotated[
        str,
        typer.Option(help="full, low-rank, sltrain, official, relora, galore, by commas."),
    ] = "full,low-rank,sltrain,official",
    optimizer: Annotated[str, typer.Option(help="Of all methods but galore.")] = "adam",
    per_layer: Annotated[bool, typer.Option(help="Update while backward runs.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 4,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 256,
    vocabulary: Annotated[int, typer.Option(min=2, help="Tokens there are.")] = 32000,
    rank: Annotated[int, typer.Option(min=0, help="Of B A; 0: the paper's.")] = 0,
    density: Annotated[float | None, typer.Option(help="Of S [the paper's].")] = None,
    dtype: Dtype = "float32",
    iters: Iters = 5,
    warmup: Warmup = 1,
    as_json: Json = False,
) -> int:
    """Tokens per second of training steps of a LLaMA, methods beside full rank."""
    from rich.console import Console

    from gossamer.launch.bench.llama_steps import LlamaRequest
    from gossamer.launch.bench.measure import print_rows, text, text_spread
    from gossamer.launch.bench.pretraining import aims
    from gossamer.launch.bench.pretraining import pretraining as measure

    request = LlamaRequest(
        models=model.split(","),
        methods=method.split(","),
        optimizer=optimizer,
        per_layer=per_layer,
        batch=batch,
        context=context,
        vocabulary=vocabulary,
        rank=rank,
        density=density,
        dtype=dtype,
        device="cpu",
    )
    with Console(stderr=True).status("") as status:
        rows = measure(request, iters, warmup, status.update)
    held = aims(rows)
    print_rows(
        rows,
        {
            "model": text("model"),
            "method": text("method"),
            "tokens": text("tokens"),
            "ms (p10-p90)": text_spread("ms", 0),
            "CPU ms": text("cpu_ms", "{:.0f}"),
            "tokens/CPU s": text("tokens_per_s", "{:.0f}"),
            "full / it": text("full_ratio", "{:.2f}"),
        },
        title="pretraining",
        as_json=as_json,
        extra={"aims": [{**aim._asdict(), "met": aim.is_met} for aim in held]},
    )
    if not as_json:
        _say(held)
    return 0


def _say(held: list[Aim]) -> None:
    for aim in held:
        verdict = "met" if aim.is_met else "MISSED"
        typer.echo(f"{verdict:>6}: {aim.name} {aim.figure:.3f}, aim {aim.bound:g}")
