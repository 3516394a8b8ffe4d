"""gossamer bench zo: what a zeroth-order step costs, and what it sends."""

from __future__ import annotations

from typing import Annotated

import typer

from gossamer.launch.commands.bench_options import Iters, Json, Warmup, integers

__all__ = ["zo"]


def zo(
    parameters: Annotated[str, typer.Option(help="Of the transformer, by commas.")] = "10M,100M",
    batch: Annotated[int, typer.Option(min=1, help="Examples per rank and step.")] = 4,
    context: Annotated[int, typer.Option(min=2, help="Tokens per example.")] = 64,
    vocabulary: Annotated[int, typer.Option(min=2, help="Tokens there are.")] = 8192,
    ranks: Annotated[
        str, typer.Option(help="Numbers of processes, by commas: what they exchange, and how fast.")
    ] = "",
    iters: Iters = 9,
    warmup: Warmup = 1,
    as_json: Json = False,
) -> int:
    """A zeroth-order step beside MeZO's in plain torch, two forward passes, and Adam's.

    With --ranks, or in processes of torchrun or mpirun: steps that exchange a number per direction
    beside steps that exchange gradients, of the first of the models.
    """
    from rich.console import Console

    from gossamer.launch.bench.measure import print_rows, text, text_spread
    from gossamer.launch.bench.zo import ZoRequest, aims, parse_models
    from gossamer.launch.bench.zo import zo as measure
    from gossamer.runtime.transports.select import detect_launcher

    models = parse_models(parameters, vocabulary, context, batch)
    if ranks or detect_launcher() != "none":
        from gossamer.launch.bench.zo_exchange import ExchangeRequest, exchange

        numbers = integers("--ranks", ranks or "1", 1)
        asked = ExchangeRequest(numbers, models[0], iters, warmup)
        with Console(stderr=True).status("") as status:
            found = exchange(asked, status.update)
        if found is None:
            return 0
        print_rows(
            found,
            {
                "n": text("ranks"),
                "parameters": text("parameters", "{:,}"),
                "transport": text("transport"),
                "exchanged": text("exchanged"),
                "step ms (p10-p90)": text_spread("step_ms", 1),
                "probes/s": text("probes_per_s", "{:.2f}"),
                "bytes per step and rank": text("bytes_per_step", "{:,}"),
            },
            title="zo exchange",
            as_json=as_json,
        )
        return 0
    with Console(stderr=True).status("") as status:
        rows = measure(ZoRequest(models, iters, warmup), status.update)
    held = aims(rows)
    print_rows(
        rows,
        {
            "parameters": text("parameters", "{:,}"),
            "way": text("way"),
            "step ms (p10-p90)": text_spread("step_ms", 0),
            "CPU ms": text("cpu_ms", "{:.1f}"),
            "/ mezo": text("mezo_ratio", "{:.2f}"),
            "/ forwards": text("forwards_ratio", "{:.2f}"),
            "less forwards": text("beyond_ms", "{:.1f}"),
            "moves ms": text("moves_ms", "{:.1f}"),
            "limit ms": text("limit_ms", "{:.1f}"),
            "memory MiB": text("memory_mib", "{:+.1f}"),
            "of the model": text("memory_share", "{:+.1%}"),
        },
        title="zo",
        as_json=as_json,
        extra={"aims": [{**aim._asdict(), "met": aim.is_met} for aim in held]},
    )
    if not as_json:
        for aim in held:
            verdict = "met" if aim.is_met else "MISSED"
            typer.echo(f"{verdict:>6}: {aim.name} {aim.figure:.3f}, aim {aim.bound:g}")
    return 0
