"""``bench collectives``: averages over graphs and collectives, against plain gloo and plain MPI.

One rank per process; all ways live in the same processes. They run in turn, in blocks of calls
between barriers, each time in another order; the slowest rank's time of a block counts, and the
figures are over blocks. The barrier is Gossamer's for all: one of MPI would have ranks spin beside
those that still work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gossamer.launch.bench.limit import MemorySpeed, bytes_to_move, memory_bytes
from gossamer.launch.bench.measure import DTYPES, Options, Row, spread
from gossamer.launch.bench.plain import Ours, PlainBuffers, PlainMPI, PlainTorch, Way
from gossamer.launch.bench.world import TIMEOUT_S, World, join_world, start_world
from gossamer.runtime import Communicator
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.transports.select import detect_launcher
from gossamer.topologies import build

__all__ = ["OPERATIONS", "CollectivesRequest", "collectives"]

COLLECTIVES = ("all_reduce", "broadcast", "all_gather")
OPERATIONS = ("ring", "exponential", "complete", *COLLECTIVES)

_BLOCK_S = 0.002
"""How long a block lasts at least: a short one would time how unevenly ranks leave the barrier."""
_MOST_CALLS = 1000
_TILE = 1 << 16
_ROUNDING = {"float32": 1e-5, "float64": 1e-12, "bfloat16": 0.1, "float16": 0.01}
"""Errors of sums of standard normals, per rank; the plain ways add in the dtype itself."""


@dataclass(frozen=True)
class CollectivesRequest:
    """What to measure.

    Attributes:
        transport: Gossamer's, beside the plain ways.
        ranks: numbers of processes to start.
        operations: graphs by name, or any of ``all_reduce``, ``broadcast``, ``all_gather``.
        sweeps: sizes and samples, one for each dtype.
    """

    transport: str
    ranks: Sequence[int]
    operations: Sequence[str]
    sweeps: Sequence[Options]

    def arguments(self) -> list[str]:
        """Return the command line that asks for the same in a launched world."""
        o = self.sweeps[0]
        flags = {"min-bytes": o.min_bytes, "max-bytes": o.max_bytes, "factor": o.factor}
        flags |= {"iters": o.iters, "warmup": o.warmup}
        words = [f"--{name}={value}" for name, value in flags.items()]
        words += [f"--dtypes={','.join(s.dtype for s in self.sweeps)}"]
        words += [f"--operations={','.join(self.operations)}", f"--transport={self.transport}"]
        return words


def collectives(
    request: CollectivesRequest, progress: Callable[[str], object]
) -> dict[str, Any] | None:
    """Measure.

    Under torchrun or mpirun the launched processes are the ranks; None on all but process 0.

    Returns:
        rows: figures of every n, operation, dtype and size; skipped: what was left out, and why.

    Raises:
        ConfigError: the processes cannot be started, or failed.
    """
    if detect_launcher() != "none":
        return _in_world(request)
    found: dict[str, Any] = {"rows": [], "skipped": []}
    for n in request.ranks:
        progress(f"{n} ranks")
        document = start_world(n, ["collectives", *request.arguments()])
        for key, values in found.items():
            values += document[key]
    return found


def _in_world(request: CollectivesRequest) -> dict[str, Any] | None:
    world = join_world(request.transport)
    n = world.transport.processes
    speed = None
    if world.transport.device.type == "cpu":
        speed = MemorySpeed(Communicator(build("complete", n), world.transport))
    rows: list[Row] = []
    skipped: list[str] = []
    for options in request.sweeps:
        for operation in request.operations:
            if speed is not None:
                speed.sample(3)
            for count in options.counts():
                row = _measure(world, operation, count, options)
                rows.append(row) if isinstance(row, dict) else skipped.append(row)
    for row in rows:
        _add_limit(row, None if speed is None else speed.bytes_per_s())
    world.transport.close()
    dist.destroy_process_group()
    return {"rows": rows, "skipped": skipped} if world.transport.process == 0 else None


def _measure(world: World, operation: str, count: int, options: Options) -> Row | str:
    """Return the figures, or why there are none."""
    transport, dtype = world.transport, DTYPES[options.dtype]
    n, row_bytes = transport.processes, count * dtype.itemsize
    kind = operation if operation in COLLECTIVES else "average"
    topology = build("complete" if kind != "average" else operation, n)
    round_ = topology.round(0)
    rows = n if kind == "all_gather" else 1
    most_received = max(len(round_.recv(i)[0]) for i in range(n)) if kind == "average" else 0
    needed = n * (2 * (1 + rows) + most_received) * row_bytes
    if transport.device.type == "cpu" and needed > memory_bytes() // 2:
        return (
            f"{operation}, {n} ranks, {options.dtype}, {row_bytes} bytes: would take "
            f"{needed / 2**30:.0f} of {memory_bytes() / 2**30:.0f} GiB of memory"
        )
    comm = Communicator(topology, transport, timeout_s=TIMEOUT_S)
    ours = Ours(comm, count, dtype, rows)
    buffers = PlainBuffers(
        torch.empty_like(ours.x, memory_format=torch.contiguous_format),
        rows,
        round_ if kind == "average" else None,
        transport.process,
    )
    ways: list[Way] = [ours, PlainTorch(buffers)]
    if world.has_mpi and not (kind == "all_reduce" and dtype == torch.bfloat16):
        ways.append(PlainMPI(buffers))  # Open MPI has no sum of bfloat16
    _check(comm, ways, kind, count, options.dtype)
    calls = {way.name: getattr(way, kind) for way in ways}
    times = _time(comm, calls, options)

    degree = len(round_.sources) / n if kind == "average" else None
    row: Row = {"transport": transport.name, "operation": operation, "ranks": n, "degree": degree}
    row |= {"dtype": options.dtype, "bytes": row_bytes}
    row["bytes_to_move"], row["bytes_once"] = bytes_to_move(kind, n, round_, row_bytes)
    row |= _figures("us", times[ours.name])
    plain = ways[1].name
    for key, name in (("torch", plain), ("mpi", PlainMPI.name)):
        row |= _figures(f"{key}_us", times.get(name))
        row[f"{key}_ratio"] = row[f"{key}_us"] and row[f"{key}_us"] / row["us"]
    return row


def _figures(key: str, seconds: Sequence[float] | None) -> Row:
    if seconds is None:
        return {key: None}
    found = spread(seconds)
    return {key: 1e6 * found.median, f"{key}_p10": 1e6 * found.p10, f"{key}_p90": 1e6 * found.p90}


def _add_limit(row: Row, bytes_per_s: float | None) -> None:
    row["triad_gbps"] = bytes_per_s and bytes_per_s / 1e9
    row["limit_us"] = bytes_per_s and 1e6 * row["bytes_to_move"] / bytes_per_s
    row["share"] = bytes_per_s and row["limit_us"] / row["us"]
    row["share_once"] = bytes_per_s and 1e6 * row["bytes_once"] / bytes_per_s / row["us"]


def _check(comm: Communicator, ways: Sequence[Way], kind: str, count: int, dtype: str) -> None:
    """Fill the rows and compare every way's result with float64 sums, in three places.

    Raises:
        ConfigError: on every rank, where any rank's result is wrong.
    """
    n, rank = comm.n, comm.ranks.start
    width = min(count, _TILE)
    tiles = comm.random("bench", ids=range(n)).normal_(torch.empty(n, width)).to(DTYPES[dtype])
    row = tiles[rank : rank + 1].to(comm.device)
    for way in ways:
        way.x.copy_(row.repeat(1, -(-count // width))[:, :count])
    exact = tiles.double()
    expected = {
        "average": lambda: torch.from_numpy(comm.topology.round(0).apply(exact.numpy()))[[rank]],
        "all_reduce": lambda: exact.sum(0, keepdim=True),
        "broadcast": lambda: exact[:1],
        "all_gather": lambda: exact,
    }[kind]()
    last = count // width - 1
    for way in ways:
        way.out.copy_(way.x.expand_as(way.out))  # plain sums and broadcasts are in place
        getattr(way, kind)()
        right = all(
            _close(way.out[:, at * width : (at + 1) * width], expected, _ROUNDING[dtype] * n)
            for at in {0, last // 2, last}
        )
        if not comm.agree(right):
            raise ConfigError(
                f"bench collectives: {way.name} gave a wrong {kind} of {count} {dtype} over "
                f"{comm.transport.name}"
            )


def _close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return torch.allclose(found.double().cpu(), expected, rtol=0, atol=tolerance)


def _time(
    comm: Communicator, calls: dict[str, Callable[[], object]], options: Options
) -> dict[str, list[float]]:
    """Return seconds per call of each block, the slowest rank's, in turn over the ways."""

    def block(call: Callable[[], object], count: int) -> float:
        comm.barrier()
        begin = time.perf_counter()
        for _ in range(count):
            call()
        if comm.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / count

    def slowest(mine: Tensor) -> Tensor:
        return comm.all_reduce(mine.reshape(1, -1).to(comm.device), "max", count=False).cpu()

    names = list(calls)
    first = torch.tensor([min(block(calls[name], 1) for _ in range(3)) for name in names])
    counts = [max(1, min(_MOST_CALLS, int(_BLOCK_S / s))) for s in slowest(first)[0].tolist()]
    mine = torch.zeros(len(names), options.iters, dtype=torch.float64)
    for k in range(-options.warmup, options.iters):
        for i in range(len(names)):
            c = (i + k) % len(names)  # in another order each time
            seconds = block(calls[names[c]], counts[c])
            if k >= 0:
                mine[c, k] = seconds
    found = slowest(mine).reshape(len(names), -1).tolist()
    return dict(zip(names, found, strict=True))
