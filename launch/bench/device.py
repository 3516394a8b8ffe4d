"""``bench device``: averages of rows on a GPU, beside what the GPU's memory allows and gloo.

First the kernel alone, in one process, against a copy of as many bytes; then several processes that
share the GPU (or have one each) average over a graph, against gloo through the host's memory. What
is timed is checked first, against the CPU's sums, to the bit.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gossamer.launch.bench.measure import DTYPES, Options, Row, spread
from gossamer.launch.bench.plain import Ours, PlainBuffers, PlainTorch
from gossamer.launch.bench.world import TIMEOUT_S, join_world
from gossamer.launch.processes import run_processes
from gossamer.runtime import Communicator, StackedTransport
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.native import Terms, build_info, weighted_sum
from gossamer.runtime.transports import Transport
from gossamer.topologies import build

__all__ = ["DeviceRequest", "check_averages", "device", "kernel_rows", "process_rows"]

_CHECKED_GRAPHS = ("ring", "exponential", "star", "complete", "directed_ring")
_CHECKED_SIZES = (1, 1000, 40_003)
_BLOCK_BYTES = 64 << 20
_MOST_CALLS = 20
_TERMS = 3  # of an average over a ring


@dataclass(frozen=True)
class DeviceRequest:
    """What to measure.

    Attributes:
        ranks: processes to start; 0: only the kernel.
        graph: topology by name.
        options: sizes and samples.
    """

    ranks: int
    graph: str
    options: Options


def device(request: DeviceRequest, progress: Callable[[str], object]) -> list[Row]:
    """Measure; a row of figures per size for the kernel, then for the processes.

    Raises:
        ConfigError: there is no GPU or no kernel for it, or a result was wrong.
    """
    if not torch.cuda.is_available() or not build_info()["cuda_kernels"]:
        raise ConfigError(
            "bench device: needs a GPU that torch sees and a build with CUDA kernels; here "
            f"torch.cuda.is_available() is {torch.cuda.is_available()} and the build has "
            f"{'kernels' if build_info()['cuda_kernels'] else 'none'}"
        )
    progress("the kernel alone")
    rows = kernel_rows(torch.device("cuda", 0), request.options)
    torch.cuda.empty_cache()
    if request.ranks == 0:
        return rows
    progress(f"{request.ranks} processes")
    with tempfile.TemporaryDirectory(prefix="gossamer-") as folder:
        found = Path(folder) / "rows.json"
        status = run_processes(request.ranks, _process, request, str(found))
        if status != 0:
            raise ConfigError(f"bench device: the {request.ranks} processes ended with {status}")
        return _with_shares(rows + json.loads(found.read_text()))


def kernel_rows(where: torch.device, options: Options) -> list[Row]:
    """Time one weighted sum of three rows against a copy, in this process."""
    rows = []
    dtype = DTYPES[options.dtype]
    terms = Terms(np.array([0, _TERMS]), np.arange(_TERMS), np.full(_TERMS, 1 / _TERMS))
    for count in options.counts():
        sources = [torch.randn(1, count, device=where).to(dtype) for _ in range(_TERMS)]
        out = torch.empty_like(sources[0])
        weighted_sum(sources, terms, out)
        expected = torch.empty(1, count, dtype=dtype)
        weighted_sum([source.cpu() for source in sources], terms, expected)
        if not torch.equal(out.cpu(), expected):
            raise ConfigError(f"bench device: the kernel's sum of {count} {dtype} is wrong")
        row_bytes = count * dtype.itemsize
        sum_s = _queue_times(partial(weighted_sum, sources, terms, out), where, options)
        copy_s = _queue_times(partial(out.copy_, sources[0]), where, options)
        rows.append(
            _row("kernel", 1, options, row_bytes, sum_s, (_TERMS + 1) * row_bytes)
            | {"copy_gbps": 2 * row_bytes / spread(copy_s).median / 1e9}
        )
        rows[-1]["share"] = rows[-1]["gbps"] / rows[-1]["copy_gbps"]
    return rows


def _queue_times(call: Callable[[], object], where: torch.device, options: Options) -> list[float]:
    """Return seconds per call, as the GPU's own clock has it; each sample is of several calls."""
    samples = []
    for k in range(options.warmup + options.iters):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(torch.cuda.current_stream(where))
        for _ in range(_MOST_CALLS):
            call()
        end.record(torch.cuda.current_stream(where))
        end.synchronize()
        if k >= options.warmup:
            samples.append(begin.elapsed_time(end) / 1e3 / _MOST_CALLS)
    return samples


def _process(request: DeviceRequest, found: str) -> int:
    from gossamer.launch.status import exit_status

    def work() -> int:
        transport = join_world("native").transport
        if transport.device.type != "cuda":
            raise ConfigError("bench device: the processes cannot share GPU memory; see the log")
        check_averages(transport)
        rows = process_rows(transport, request.graph, request.options)
        transport.close()
        if transport.process == 0:
            Path(found).write_text(json.dumps(rows))
        return 0

    return exit_status(work)


def check_averages(transport: Transport) -> None:
    """Compare averages and sums of every dtype and graph with the CPU's, to the bit.

    Raises:
        ConfigError: on every process, where any process has a wrong result.
    """
    n = transport.processes
    for graph in _CHECKED_GRAPHS:
        comm = Communicator(build(graph, n), transport, timeout_s=TIMEOUT_S)
        stacked = Communicator(build(graph, n), StackedTransport())
        here = slice(comm.ranks.start, comm.ranks.stop)
        for dtype in DTYPES.values():
            for count in _CHECKED_SIZES:
                full = stacked.random("x").normal_(torch.empty(n, count)).to(dtype)
                full_y = stacked.random("y").normal_(torch.empty(n, count)).to(dtype)
                x = comm.alloc(count, dtype).copy_(full[here])
                y = full_y[here].to(comm.device)
                results = {
                    "average": (
                        comm.neighbor_average(x, axpy=(-0.1, y)),
                        stacked.neighbor_average(full, axpy=(-0.1, full_y))[here],
                    ),
                    "all_reduce": (comm.all_reduce(x, "mean"), stacked.all_reduce(full, "mean")),
                    "average in place": (
                        comm.neighbor_average(x, out=x, rounds=2),
                        stacked.neighbor_average(full, rounds=2)[here],
                    ),
                    "all_gather": (comm.all_gather(y.contiguous()), full_y),
                }
                for name, (result, expected) in results.items():
                    if not comm.agree(torch.equal(result.cpu(), expected)):
                        raise ConfigError(
                            f"bench device: {name} of {count} {dtype} over {graph} is wrong"
                        )


def process_rows(transport: Transport, graph: str, options: Options) -> list[Row]:
    """Time an average over the graph, and gloo's through the host's memory, in turn."""
    n, dtype = transport.processes, DTYPES[options.dtype]
    comm = Communicator(build(graph, n), transport, timeout_s=TIMEOUT_S)
    round_ = comm.topology.round(0)
    terms = len(round_.recv(transport.process)[0]) + 1
    rows = []
    for count in options.counts():
        row_bytes = count * dtype.itemsize
        ours = Ours(comm, count, dtype, 1)
        ours.x.copy_(torch.randn(1, count, device=comm.device))
        plain = PlainTorch(
            PlainBuffers(torch.empty(1, count, dtype=dtype), 1, round_, transport.process)
        )

        def through_host(ours: Ours = ours, plain: PlainTorch = plain) -> Tensor:
            plain.x.copy_(ours.x)
            plain.average()
            return ours.out.copy_(plain.out)

        own_s, plain_s = _in_turn(comm, [ours.average, through_host], row_bytes, options)
        # All processes of one GPU read and write at the same time.
        moved = (terms + 1) * row_bytes * (n if torch.cuda.device_count() == 1 else 1)
        row = _row(graph, n, options, row_bytes, own_s, moved)
        gloo = spread(plain_s)
        row |= {"gloo_us": 1e6 * gloo.median, "gloo_ratio": 1e6 * gloo.median / row["us"]}
        rows.append(row)
    return rows


def _in_turn(
    comm: Communicator,
    cases: Sequence[Callable[[], object]],
    row_bytes: int,
    options: Options,
) -> list[list[float]]:
    """Return seconds per call of each case's blocks, the slowest process's."""
    calls = max(1, min(_MOST_CALLS, _BLOCK_BYTES // row_bytes))
    mine = torch.zeros(len(cases), options.iters, dtype=torch.float64)
    for k in range(-options.warmup, options.iters):
        for c, case in enumerate(cases):
            comm.barrier()
            _finish(comm.device)
            begin = time.perf_counter()
            for _ in range(calls):
                case()
            _finish(comm.device)
            if k >= 0:
                mine[c, k] = (time.perf_counter() - begin) / calls
    slowest = comm.all_reduce(mine.reshape(1, -1).to(comm.device), "max").cpu()
    samples: list[list[float]] = slowest.reshape(len(cases), -1).tolist()
    return samples


def _finish(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def _row(
    operation: str, n: int, options: Options, row_bytes: int, seconds: list[float], moved: int
) -> Row:
    own = spread(seconds)
    row: Row = {"operation": operation, "ranks": n, "dtype": options.dtype, "bytes": row_bytes}
    row |= {"us": 1e6 * own.median, "us_p10": 1e6 * own.p10, "us_p90": 1e6 * own.p90}
    row |= {"moved_bytes": moved, "gbps": moved / own.median / 1e9}
    return row | dict.fromkeys(("copy_gbps", "share", "gloo_us", "gloo_ratio"))


def _with_shares(rows: list[Row]) -> list[Row]:
    """Hold the processes' speed against the copies of the kernel's rows, size by size."""
    copies = {row["bytes"]: row["copy_gbps"] for row in rows if row["operation"] == "kernel"}
    for row in rows:
        if row["copy_gbps"] is None and row["bytes"] in copies:
            row["copy_gbps"] = copies[row["bytes"]]
            row["share"] = row["gbps"] / row["copy_gbps"]
    return rows
