"""gossamer bench: what mixing and messages cost here, beside the plain way to do the same."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(help="Measure what mixing and messages cost here.", no_args_is_help=True)

MinBytes = Annotated[str, typer.Option(help="Smallest message: 8, 64K, 256M.")]
MaxBytes = Annotated[str, typer.Option(help="Largest message.")]
Factor = Annotated[float, typer.Option(help="From one size to the next.")]
Iters = Annotated[int, typer.Option(min=1, help="Samples per figure.")]
Warmup = Annotated[int, typer.Option(min=0, help="Samples thrown away first.")]
Dtype = Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def gossip(
    ranks: Annotated[str, typer.Option(help="Numbers of processes, by commas.")] = "2,4,8",
    transports: Annotated[str, typer.Option(help="gloo, mpi or both, by commas.")] = "gloo,mpi",
    operations: Annotated[
        str, typer.Option(help="Topologies by name, or all_reduce, by commas.")
    ] = "ring,exponential,all_reduce",
    min_bytes: MinBytes = "8",
    max_bytes: MaxBytes = "8M",
    factor: Factor = 32,
    iters: Iters = 20,
    warmup: Warmup = 3,
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> int:
    """Averages over graphs and all-reduce, against plain torch.distributed and mpi4py.

    Starts its own processes; under torchrun, mpirun or srun it uses those. A full sweep:
    --max-bytes 256M --factor 2.
    """
    from rich.console import Console

    from gossamer.launch.bench.gossip import GossipRequest
    from gossamer.launch.bench.gossip import gossip as measure
    from gossamer.launch.bench.measure import Options, parse_bytes, print_rows, text, text_spread

    options = Options(parse_bytes(min_bytes), parse_bytes(max_bytes), factor, iters, warmup, dtype)
    request = GossipRequest(
        transports.split(","), _integers("--ranks", ranks, 2), operations.split(","), options
    )
    with Console(stderr=True).status("") as status:
        rows = measure(request, status.update)
    if rows is None:
        return 0
    print_rows(
        rows,
        {
            "transport": text("transport"),
            "operation": text("operation"),
            "ranks": text("ranks"),
            "bytes": text("bytes"),
            "us (p10-p90)": text_spread("us", 0),
            "algbw GB/s": text("algbw_gbps", "{:.3f}"),
            "busbw GB/s": text("busbw_gbps", "{:.3f}"),
            "baseline": text("baseline"),
            "its us (p10-p90)": text_spread("baseline_us", 0),
            "its us / ours": text("ratio", "{:.2f}"),
        },
        title="gossip",
        as_json=as_json,
    )
    return 0


@app.command()
def simulate(
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, by commas.")] = "64,512,4096",
    graphs: Annotated[
        str, typer.Option(help="Topologies by name, by commas.")
    ] = "ring,torus,random_regular,exponential",
    min_bytes: MinBytes = "40000",
    max_bytes: MaxBytes = "40000",
    factor: Factor = 2,
    iters: Iters = 15,
    warmup: Warmup = 2,
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> int:
    """Mixing rounds of many ranks in one process, against a plain copy of their rows.

    Sizes are of one rank's row: 40,000 bytes are d = 10,000 in float32.
    """
    from rich.console import Console

    from gossamer.launch.bench.measure import Options, parse_bytes, print_rows, text, text_spread
    from gossamer.launch.bench.simulate import fit
    from gossamer.launch.bench.simulate import simulate as measure

    options = Options(parse_bytes(min_bytes), parse_bytes(max_bytes), factor, iters, warmup, dtype)
    with Console(stderr=True).status("mixing"):
        rows = measure(graphs.split(","), _integers("--ranks", ranks, 2), options)
    fitted = fit(rows)
    print_rows(
        rows,
        {
            "graph": text("graph"),
            "ranks": text("ranks"),
            "d": text("d"),
            "edges": text("edges"),
            "mix ms (p10-p90)": text_spread("mix_ms", 2),
            "share": text("share", "{:.0%}"),
            "in place ms": text("in_place_ms", "{:.2f}"),
            "its share": text("share_in_place", "{:.0%}"),
            "step ms (p10-p90)": text_spread("step_ms", 2),
            "rank-steps/s": text("rank_steps_per_s", "{:,.0f}"),
            "mix +copies": text("mix_copies", "{:.2f}"),
            "step +copies": text("step_copies", "{:.2f}"),
        },
        title="simulate",
        as_json=as_json,
        extra={"fit": fitted},
    )
    if not as_json:
        typer.echo(
            "share: of a plain copy's speed, in turn in this run. step: x <- W x - lr g, in place\n"
            "+copies: of x, needed beyond x and g (known where x is over 32 MiB)\n"
            f"At {fitted['ranks']:.0f} ranks a round takes {fitted['ns_per_element']:.3f} ns x n d "
            f"+ {fitted['ns_per_edge_element']:.3f} ns x edges d "
            f"(R2 {fitted['r2']:.3f}, at most {fitted['worst']:.0%} off)."
        )
    return 0


def _integers(flag: str, text: str, least: int) -> list[int]:
    from gossamer.runtime.errors import ConfigError

    words = text.split(",")
    if not all(word.strip().isdigit() and int(word) >= least for word in words):
        raise ConfigError(f"{flag}: '{text}' must be numbers of at least {least}: 2,4,8")
    return [int(word) for word in words]
