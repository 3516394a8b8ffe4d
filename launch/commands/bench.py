"""gossamer bench: what mixing, messages and draws cost, beside the plain way to do the same."""

from __future__ import annotations

from typing import Annotated

import typer

from gossamer.launch.commands.bench_contrastive import contrastive
from gossamer.launch.commands.bench_options import (
    Dtype,
    Factor,
    Iters,
    Json,
    MaxBytes,
    MinBytes,
    Warmup,
    integers,
)
from gossamer.launch.commands.bench_pretraining import low_rank, memory, pretraining
from gossamer.launch.commands.bench_private import private, release
from gossamer.launch.commands.bench_zo import zo

__all__ = ["app"]

app = typer.Typer(help="Measure what mixing and messages cost here.", no_args_is_help=True)


@app.command()
def collectives(
    ranks: Annotated[str, typer.Option(help="Numbers of processes, by commas.")] = "2,4,8",
    operations: Annotated[
        str,
        typer.Option(help="Topologies by name, all_reduce, broadcast, all_gather, by commas."),
    ] = "ring,exponential,complete,all_reduce,broadcast,all_gather",
    transport: Annotated[str, typer.Option(help="Ours: native, gloo, mpi or nccl.")] = "native",
    min_bytes: MinBytes = "8",
    max_bytes: MaxBytes = "8M",
    factor: Factor = 32,
    iters: Iters = 20,
    warmup: Warmup = 3,
    dtypes: Annotated[str, typer.Option(help="Of the rows, by commas.")] = "float32,bfloat16",
    as_json: Json = False,
) -> int:
    """Averages over graphs and collectives, against plain gloo, plain mpi4py and memory's limit.

    Starts its own processes with mpirun; under mpirun or torchrun (then without plain MPI) it uses
    those. A full sweep: --max-bytes 256M --factor 2.
    """
    from rich.console import Console

    from gossamer.launch.bench.collectives import CollectivesRequest
    from gossamer.launch.bench.collectives import collectives as measure
    from gossamer.launch.bench.limit import FORMULAS
    from gossamer.launch.bench.measure import Options, parse_bytes, print_rows, text, text_spread

    sizes = parse_bytes(min_bytes), parse_bytes(max_bytes), factor, iters, warmup
    sweeps = [Options(*sizes, dtype) for dtype in dtypes.split(",")]
    request = CollectivesRequest(
        transport, integers("--ranks", ranks, 2), operations.split(","), sweeps
    )
    with Console(stderr=True).status("") as status:
        found = measure(request, status.update)
    if found is None:
        return 0
    print_rows(
        found["rows"],
        {
            "operation": text("operation"),
            "n": text("ranks"),
            "dtype": text("dtype"),
            "bytes": text("bytes"),
            "us (p10-p90)": text_spread("us", 1),
            "MPI us": text("mpi_us", "{:.1f}"),
            "/ ours": text("mpi_ratio", "{:.2f}"),
            "gloo us": text("torch_us", "{:.1f}"),
            "/ ours ": text("torch_ratio", "{:.2f}"),
            "limit us": text("limit_us", "{:.1f}"),
            "share": text("share", "{:.0%}"),
            "once": text("share_once", "{:.0%}"),
        },
        title="collectives",
        as_json=as_json,
        extra={"skipped": found["skipped"]},
    )
    if not as_json:
        speeds = {row["ranks"]: row["triad_gbps"] for row in found["rows"] if row["triad_gbps"]}
        typer.echo(
            "limit: the bytes that must move over the speed of a triad in all processes at once: "
            + ", ".join(f"{gbps:.1f} GB/s with {n}" for n, gbps in speeds.items())
        )
        for line in (*FORMULAS, *(f"left out: {what}" for what in found["skipped"])):
            typer.echo(f"  {line}")
    return 0


@app.command()
def overlap(
    ranks: Annotated[str, typer.Option(help="Numbers of processes, by commas.")] = "2",
    transports: Annotated[
        str, typer.Option(help="native, gloo, mpi or nccl, by commas.")
    ] = "native,gloo,mpi",
    min_bytes: MinBytes = "64K",
    max_bytes: MaxBytes = "64M",
    factor: Factor = 32,
    iters: Iters = 20,
    warmup: Warmup = 3,
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> int:
    """An average beside a computation that takes about as long, against one after the other.

    Starts its own processes with mpirun; under mpirun or torchrun it uses those.
    """
    from rich.console import Console

    from gossamer.launch.bench.measure import Options, parse_bytes, print_rows, text, text_spread
    from gossamer.launch.bench.overlap import OverlapRequest
    from gossamer.launch.bench.overlap import overlap as measure

    options = Options(parse_bytes(min_bytes), parse_bytes(max_bytes), factor, iters, warmup, dtype)
    request = OverlapRequest(transports.split(","), integers("--ranks", ranks, 2), options)
    with Console(stderr=True).status("") as status:
        rows = measure(request, status.update)
    if rows is None:
        return 0
    print_rows(
        rows,
        {
            "transport": text("transport"),
            "n": text("ranks"),
            "bytes": text("bytes"),
            "compute us": text("compute_us", "{:.0f}"),
            "average us": text("average_us", "{:.0f}"),
            "in turn us (p10-p90)": text_spread("in_turn_us", 0),
            "beside us (p10-p90)": text_spread("overlap_us", 0),
            "saved": text("saved", "{:.0%}"),
        },
        title="overlap",
        as_json=as_json,
    )
    if not as_json:
        typer.echo(
            "saved: of the shorter of compute and average, which is all that can be hidden. With a "
            "core for\neach rank and none to spare, an average competes for the core unless it "
            "waits: what it copies and\nadds up is not hidden, what it waits for is."
        )
    return 0


@app.command()
def ddp(
    ranks: Annotated[str, typer.Option(help="Numbers of processes, by commas.")] = "2,4",
    widths: Annotated[str, typer.Option(help="Of the transformer, by commas.")] = "128,512",
    batch: Annotated[int, typer.Option(min=1, help="Windows per rank and step.")] = 2,
    iters: Iters = 20,
    warmup: Warmup = 3,
    as_json: Json = False,
) -> int:
    """A transformer's step under DistributedDataParallel: backend gossamer beside gloo."""
    from rich.console import Console

    from gossamer.launch.bench.ddp import DDPRequest
    from gossamer.launch.bench.ddp import ddp as measure
    from gossamer.launch.bench.measure import print_rows, text, text_spread

    request = DDPRequest(
        integers("--ranks", ranks, 2), integers("--widths", widths, 4), batch, iters, warmup
    )
    with Console(stderr=True).status("") as status:
        rows = measure(request, status.update)
    print_rows(
        rows,
        {
            "n": text("ranks"),
            "width": text("width"),
            "parameters": text("parameters", "{:,}"),
            "alone ms": text("alone_ms", "{:.1f}"),
            "gossamer ms (p10-p90)": text_spread("gossamer_ms", 1),
            "gloo ms (p10-p90)": text_spread("gloo_ms", 1),
            "gloo / ours": text("ratio", "{:.2f}"),
            "all-reduces ms": text("gossamer_comm_ms", "{:.2f}"),
            "gloo's ms": text("gloo_comm_ms", "{:.2f}"),
            "/ ours": text("comm_ratio", "{:.2f}"),
        },
        title="ddp",
        as_json=as_json,
    )
    return 0


app.command()(contrastive)
app.command()(private)
app.command()(release)
app.command()(low_rank)
app.command()(memory)
app.command()(pretraining)
app.command()(zo)


@app.command()
def random(
    min_bytes: MinBytes = "64K",
    max_bytes: MaxBytes = "64M",
    factor: Factor = 32,
    iters: Iters = 31,
    warmup: Warmup = 3,
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> int:
    """Adding random directions to a row on one core, against torch's normals and an addition."""
    from rich.console import Console

    from gossamer.launch.bench.measure import Options, parse_bytes, print_rows, text, text_spread
    from gossamer.launch.bench.random import random as measure

    options = Options(parse_bytes(min_bytes), parse_bytes(max_bytes), factor, iters, warmup, dtype)
    with Console(stderr=True).status("drawing"):
        rows = measure(options)
    print_rows(
        rows,
        {
            "bytes": text("bytes"),
            "normal (p10-p90)": text_spread("normal_ns", 2),
            "torch (p10-p90)": text_spread("torch_ns", 2),
            "torch / ours": text("normal_torch_ratio", "{:.2f}"),
            "in place": text("in_place_ns", "{:.2f}"),
            "/ ours": text("normal_in_place_ratio", "{:.2f}"),
            "share": text("normal_share", "{:.0%}"),
            "signs (p10-p90)": text_spread("rademacher_ns", 2),
            "torch / it": text("rademacher_torch_ratio", "{:.1f}"),
            "its share": text("rademacher_share", "{:.0%}"),
            "copy GB/s": text("copy_gbps", "{:.1f}"),
        },
        title="random",
        as_json=as_json,
    )
    if not as_json:
        typer.echo(
            "ns per element, on one core, in turn. normal, signs: x += a z in one pass\n"
            "torch: x.add_(torch.randn(n), alpha=a); in place: x.add_(z.normal_(), alpha=a)\n"
            "share: a plain copy's time over ours"
        )
    return 0


@app.command()
def device(
    ranks: Annotated[int, typer.Option(min=0, help="Processes; 0: the kernel alone.")] = 4,
    graph: Annotated[str, typer.Option(help="Topology by name.")] = "ring",
    min_bytes: MinBytes = "1M",
    max_bytes: MaxBytes = "1G",
    factor: Factor = 4,
    iters: Iters = 10,
    warmup: Warmup = 2,
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> int:
    """Averages on a GPU, against copies in its memory and gloo; needs a GPU.

    Checks every dtype on several graphs against the CPU's bits first.
    """
    from rich.console import Console

    from gossamer.launch.bench.device import DeviceRequest
    from gossamer.launch.bench.device import device as measure
    from gossamer.launch.bench.measure import Options, parse_bytes, print_rows, text, text_spread

    options = Options(parse_bytes(min_bytes), parse_bytes(max_bytes), factor, iters, warmup, dtype)
    with Console(stderr=True).status("") as status:
        rows = measure(DeviceRequest(ranks, graph, options), status.update)
    print_rows(
        rows,
        {
            "operation": text("operation"),
            "n": text("ranks"),
            "dtype": text("dtype"),
            "bytes": text("bytes"),
            "us (p10-p90)": text_spread("us", 1),
            "GB/s": text("gbps", "{:.0f}"),
            "copy GB/s": text("copy_gbps", "{:.0f}"),
            "share": text("share", "{:.0%}"),
            "gloo us": text("gloo_us", "{:.0f}"),
            "/ ours": text("gloo_ratio", "{:.1f}"),
        },
        title="device",
        as_json=as_json,
    )
    if not as_json:
        typer.echo(
            "GB/s: rows read and written, by all processes of a GPU together. copy: of one row, "
            "read and written.\ngloo: rows to the host's memory, exchanged and added up there, "
            "and back."
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
        rows = measure(graphs.split(","), integers("--ranks", ranks, 2), options)
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
