"""gossamer bench private | release: what privacy costs a step, and its passes over the row."""

from __future__ import annotations

from typing import Annotated

import typer

from gossamer.launch.commands.bench_options import (
    Factor,
    Iters,
    Json,
    MaxBytes,
    MinBytes,
    Warmup,
    integers,
)

__all__ = ["private", "release"]


def private(
    ranks: Annotated[str, typer.Option(help="Numbers of processes, by commas.")] = "1,4",
    models: Annotated[str, typer.Option(help="transformer, cnn, by commas.")] = "transformer,cnn",
    batch: Annotated[int, typer.Option(min=2, help="Examples per rank and step.")] = 32,
    width: Annotated[int, typer.Option(min=8, help="Of the transformer; a multiple of 4.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="Of the transformer.")] = 2,
    context: Annotated[int, typer.Option(min=2, help="Its tokens.")] = 64,
    iters: Iters = 11,
    warmup: Warmup = 2,
    as_json: Json = False,
) -> int:
    """A private step beside Opacus' (materialised, ghost) and a plain one: time and memory.

    Same model, batch, clipping norm and sigma. Needs the extra 'privacy'.
    """
    from rich.console import Console

    from gossamer.launch.bench.measure import print_rows, text, text_spread
    from gossamer.launch.bench.private import PrivateRequest, aims, parse_models
    from gossamer.launch.bench.private import private as measure

    chosen = parse_models(models, batch, width, layers, context)
    request = PrivateRequest(integers("--ranks", ranks, 1), chosen, iters, warmup)
    with Console(stderr=True).status("") as status:
        rows = measure(request, status.update)
    held = aims(rows)
    print_rows(
        rows,
        {
            "model": text("model"),
            "n": text("ranks"),
            "parameters": text("parameters", "{:,}"),
            "way": text("way"),
            "step ms (p10-p90)": text_spread("step_ms", 1),
            "/ plain": text("plain_ratio", "{:.2f}"),
            "/ dp": text("dp_ratio", "{:.2f}"),
            "CPU ms": text("cpu_ms", "{:.1f}"),
            "memory MiB": text("memory_mib", "{:.0f}"),
        },
        title="private",
        as_json=as_json,
        extra={"aims": [{**aim._asdict(), "met": aim.is_met} for aim in held]},
    )
    if not as_json:
        for aim in held:
            verdict = "met" if aim.is_met else "MISSED"
            typer.echo(f"{verdict:>6}: {aim.name} {aim.figure:.2f}, aim {aim.bound:g}")
    return 0


def release(
    min_bytes: MinBytes = "64K",
    max_bytes: MaxBytes = "64M",
    factor: Factor = 32,
    iters: Iters = 15,
    warmup: Warmup = 2,
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    as_json: Json = False,
) -> int:
    """Norms, sums, noise, filter and update of a private step on one core, against plain torch."""
    from rich.console import Console

    from gossamer.launch.bench.measure import Options, parse_bytes, print_rows, text, text_spread
    from gossamer.launch.bench.release import LEGEND, examples
    from gossamer.launch.bench.release import release as measure

    options = Options(parse_bytes(min_bytes), parse_bytes(max_bytes), factor, iters, warmup, dtype)
    with Console(stderr=True).status("drawing"):
        rows, summed = measure(options), examples(options)
    print_rows(
        rows,
        {
            "bytes": text("bytes"),
            "fused (p10-p90)": text_spread("fused_ns", 1),
            "unfused (p10-p90)": text_spread("unfused_ns", 1),
            "/ fused": text("unfused_ratio", "{:.2f}"),
            "torch, 4 (p10-p90)": text_spread("torch_four_ns", 1),
            "/ fused ": text("torch_four_ratio", "{:.2f}"),
            "torch, 1": text("torch_one_ns", "{:.1f}"),
            "/ fused  ": text("torch_one_ratio", "{:.2f}"),
            "normals": text("normals_ns", "{:.1f}"),
            "rest": text("rest_ns", "{:.2f}"),
            "limit": text("limit_ns", "{:.2f}"),
            "its share": text("rest_share", "{:.0%}"),
        },
        title="release",
        as_json=as_json,
        extra={"examples": summed},
    )
    if not as_json:
        print_rows(
            summed,
            {
                "bytes": text("bytes"),
                "norms (p10-p90)": text_spread("norms_ns", 2),
                "torch (p10-p90)": text_spread("torch_norms_ns", 2),
                "/ norms": text("norms_ratio", "{:.1f}"),
                "sum (p10-p90)": text_spread("sum_ns", 2),
                "torch  (p10-p90)": text_spread("torch_sum_ns", 2),
                "/ sum": text("torch_sum_ratio", "{:.1f}"),
                "gemv": text("blas_sum_ns", "{:.2f}"),
                "/ sum ": text("blas_sum_ratio", "{:.2f}"),
            },
            title="64 examples",
            as_json=False,
        )
        typer.echo(LEGEND)
    return 0
