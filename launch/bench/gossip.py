"""``bench gossip``: averaging over a graph and all-reduce, against the plain way to write them.

One rank per process. Both ways run in turn, in blocks of calls between barriers; the slowest rank's
time of a block counts, and the figures are over blocks.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gossamer.launch.bench.measure import DTYPES, Options, Row, spread
from gossamer.launch.bench.plain import Plain, plain_for
from gossamer.launch.processes import run_processes
from gossamer.runtime import Communicator
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.transports import Transport, open_transport
from gossamer.runtime.transports.select import detect_launcher
from gossamer.topologies import Round, build

__all__ = ["OPERATIONS", "STARTED_TRANSPORTS", "GossipRequest", "gossip"]

OPERATIONS = ("ring", "exponential", "all_reduce")
STARTED_TRANSPORTS = ("gloo", "mpi")

_MOST_CALLS = 20
_BLOCK_BYTES = 1 << 20
_TILE = 1 << 16
_TIMEOUT_S = 120.0
_ROUNDING = {"float32": 1e-5, "float64": 1e-12, "bfloat16": 0.1, "float16": 0.01}
"""Errors of sums of standard normals, per rank; the plain way adds in the dtype itself."""


@dataclass(frozen=True)
class GossipRequest:
    """What to measure.

    Attributes:
        transports: each beside its plain way; started here where nothing launched the program.
        ranks: numbers of processes to start.
        operations: graphs by name, or ``all_reduce``.
        options: sizes and samples.
    """

    transports: Sequence[str]
    ranks: Sequence[int]
    operations: Sequence[str]
    options: Options

    def arguments(self) -> list[str]:
        """Return the command line that asks for the operations and options."""
        o = self.options
        flags = {"min-bytes": o.min_bytes, "max-bytes": o.max_bytes, "factor": o.factor}
        flags |= {"iters": o.iters, "warmup": o.warmup}
        words = [f"--{name}={value}" for name, value in flags.items()]
        return [*words, f"--dtype={o.dtype}", f"--operations={','.join(self.operations)}", "--json"]


def gossip(request: GossipRequest, progress: Callable[[str], object]) -> list[Row] | None:
    """Measure; a row of figures for every transport, n, operation and size.

    Under torchrun, mpirun or srun the launched processes are the ranks; None on all but process 0.

    Raises:
        ConfigError: a transport is unknown, or its processes failed.
    """
    if detect_launcher() != "none":
        return _in_world("auto", request)
    rows = []
    for transport in request.transports:
        if transport not in STARTED_TRANSPORTS:
            raise ConfigError(
                f"--transports: '{transport}' cannot be started here; "
                f"use {list(STARTED_TRANSPORTS)}, or launch with torchrun (nccl)"
            )
        for n in request.ranks:
            progress(f"{transport}, {n} ranks")
            rows += (_start_mpi if transport == "mpi" else _start_gloo)(n, request)
    return rows


def _start_gloo(n: int, request: GossipRequest) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="gossamer-") as folder:
        result = Path(folder) / "rows.json"
        status = run_processes(n, _child, replace(request, transports=("gloo",)), str(result))
        if status != 0:
            raise ConfigError(f"bench gossip: the {n} processes of gloo ended with status {status}")
        rows: list[Row] = json.loads(result.read_text())
        return rows


def _child(request: GossipRequest, result: str) -> int:
    from gossamer.launch.status import exit_status

    def work() -> int:
        rows = _in_world("gloo", request)
        if rows is not None:
            Path(result).write_text(json.dumps(rows))
        return 0

    return exit_status(work)


def _start_mpi(n: int, request: GossipRequest) -> list[Row]:
    # run_mpi replaces its process by mpirun, which starts this benchmark in a launched world.
    code = "import sys; from gossamer.launch.processes import run_mpi as r; r({n}, sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code.format(n=n), "bench", "gossip", *request.arguments()],
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode != 0:
        raise ConfigError(f"bench gossip: mpirun -n {n} ended with status {done.returncode}")
    rows: list[Row] = json.loads(done.stdout)["rows"]
    return rows


def _in_world(name: str, request: GossipRequest) -> list[Row] | None:
    torch.set_num_threads(1)
    transport = open_transport(name, timeout_s=_TIMEOUT_S)
    rows = [
        _measure(transport, operation, count, request.options)
        for operation in request.operations
        for count in request.options.counts()
    ]
    transport.close()
    return rows if transport.process == 0 else None


def _measure(transport: Transport, operation: str, count: int, options: Options) -> Row:
    n, dtype = transport.processes, DTYPES[options.dtype]
    collective = operation == "all_reduce"
    comm = Communicator(
        build("complete" if collective else operation, n), transport, timeout_s=_TIMEOUT_S
    )
    round_ = comm.topology.round(0)
    tiles = comm.random("bench", ids=range(n)).normal_(torch.empty(n, min(count, _TILE))).to(dtype)
    x, out, plain_out = (comm.alloc(count, dtype) for _ in range(3))
    tile = tiles[transport.process].to(x.device)
    x.copy_(tile.repeat(-(-count // len(tile)))[None, :count])
    plain = plain_for(transport.name, round_, transport.process, x[0])
    bfloat16_mpi = dtype == torch.bfloat16 and transport.name == "mpi"  # sums bytes in Open MPI
    cases = _cases(comm, plain, collective, x, out, plain_out)
    if collective and bfloat16_mpi:
        del cases["plain"]
    _check(comm, cases, collective, tiles.double(), round_, options.dtype)
    message_bytes = count * dtype.itemsize
    times = _time(comm, cases, message_bytes, options)

    own, other = spread(times["gossamer"]), spread(times["plain"]) if "plain" in times else None
    degree = int(comm.all_reduce(torch.tensor([[len(round_.send(transport.process)[0])]]), "max"))
    moved = message_bytes * (1 if collective else degree)
    algbw = moved / own.median / 1e9
    row: Row = {"transport": transport.name, "operation": operation, "ranks": n}
    row |= {"dtype": options.dtype, "bytes": message_bytes, "bytes_sent": moved}
    row |= {"us": 1e6 * own.median, "us_p10": 1e6 * own.p10, "us_p90": 1e6 * own.p90}
    row |= {"algbw_gbps": algbw, "busbw_gbps": algbw * (2 * (n - 1) / n if collective else 1)}
    row |= {"baseline": plain.name}
    for key, value in (("", "median"), ("_p10", "p10"), ("_p90", "p90")):
        row[f"baseline_us{key}"] = None if other is None else 1e6 * getattr(other, value)
    return row | {"ratio": None if other is None else other.median / own.median}


def _cases(
    comm: Communicator, plain: Plain, collective: bool, x: Tensor, out: Tensor, plain_out: Tensor
) -> dict[str, Callable[[], Tensor]]:
    def own_call() -> Tensor:
        average = comm.neighbor_average
        return comm.all_reduce(x, out=out) if collective else average(x, out=out)

    def plain_call() -> Tensor:
        (plain.all_reduce if collective else plain.neighbor_average)(x[0], plain_out[0])
        return plain_out

    return {"gossamer": own_call, "plain": plain_call}


def _check(
    comm: Communicator,
    cases: dict[str, Callable[[], Tensor]],
    collective: bool,
    tiles: Tensor,
    round_: Round,
    dtype: str,
) -> None:
    """Compare both ways with float64 sums, over the first columns.

    Raises:
        ConfigError: on every rank, where any rank's result is wrong.
    """
    rank = comm.ranks.start
    expected = tiles.sum(0) if collective else torch.from_numpy(round_.apply(tiles.numpy()))[rank]
    for name, case in cases.items():
        found = case()[0, : len(expected)].double().cpu()
        right = torch.allclose(found, expected, rtol=0, atol=_ROUNDING[dtype] * comm.n)
        if not comm.agree(right):
            raise ConfigError(
                f"bench gossip: {name} gave a wrong result over {comm.transport.name}"
            )


def _time(
    comm: Communicator,
    cases: dict[str, Callable[[], Tensor]],
    message_bytes: int,
    options: Options,
) -> dict[str, list[float]]:
    """Return seconds per call of each block, the slowest rank's, in turn over the cases."""

    def block(case: Callable[[], Tensor], calls: int) -> float:
        comm.barrier()
        begin = time.perf_counter()
        for _ in range(calls):
            case()
        if comm.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / calls

    # Several calls of small messages: a single one would mostly time how unevenly ranks leave the
    # barrier.
    calls = max(1, min(_MOST_CALLS, _BLOCK_BYTES // message_bytes))
    mine = torch.zeros(len(cases), options.iters, dtype=torch.float64)
    for k in range(-options.warmup, options.iters):
        for c, case in enumerate(cases.values()):
            seconds = block(case, calls)
            if k >= 0:
                mine[c, k] = seconds
    slowest = comm.all_reduce(mine.reshape(1, -1).to(comm.device), "max").cpu()
    return dict(zip(cases, slowest.reshape(len(cases), -1).tolist(), strict=True))
