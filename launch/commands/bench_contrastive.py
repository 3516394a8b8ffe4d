"""gossamer bench contrastive: what a step of contrastive learning costs."""

from __future__ import annotations

from typing import Annotated

import typer

from gossamer.launch.commands.bench_options import Iters, Json, Warmup, integers

__all__ = ["contrastive"]


def contrastive(
    data: Annotated[str, typer.Option(help="digits, 8x8, or mnist, 28x28.")] = "digits",
    encoder: Annotated[str, typer.Option(help="mlp or resnet18.")] = "mlp",
    dims: Annotated[str, typer.Option(help="Of an embedding, by commas.")] = "32,128",
    batch: Annotated[int, typer.Option(min=2, help="Examples of a step.")] = 256,
    iters: Iters = 21,
    warmup: Warmup = 3,
    as_json: Json = False,
) -> int:
    """A step of EMC^2 beside SimCLR in plain torch, our other losses, a Python scan and LibAUC."""
    from rich.console import Console

    from gossamer.launch.bench.contrastive import ContrastiveRequest, aims, parse_models
    from gossamer.launch.bench.contrastive import contrastive as measure
    from gossamer.launch.bench.measure import print_rows, text, text_spread

    models = parse_models(data, encoder, integers("--dims", dims, 1), batch)
    with Console(stderr=True).status("") as status:
        rows = measure(ContrastiveRequest(models, iters, warmup), status.update)
    held = aims(rows)
    print_rows(
        rows,
        {
            "dim": text("dim"),
            "way": text("way"),
            "ms (p10-p90)": text_spread("ms", 2),
            "CPU ms": text("cpu_ms", "{:.2f}"),
            "/ plain SimCLR": text("simclr_ratio", "{:.2f}"),
            "less views": text("bare_ratio", "{:.2f}"),
            "of EMC^2's": text("emc2_share", "{:.0%}"),
            "GFLOP/s": text("gflops", "{:.1f}"),
        },
        title="contrastive",
        as_json=as_json,
        extra={"aims": [{**aim._asdict(), "met": aim.is_met} for aim in held]},
    )
    if not as_json:
        for row in rows:
            if row["absent"] is not None:
                typer.echo(f"absent: {row['way']}, dim {row['dim']}: {row['absent']}")
        for aim in held:
            verdict = "met" if aim.is_met else "MISSED"
            typer.echo(f"{verdict:>6}: {aim.name} {aim.figure:.3f}, aim {aim.bound:g}")
    return 0
