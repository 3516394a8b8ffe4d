"""``bench zo --ranks``: what ranks exchange in a step, numbers or gradients, and probes per second.

Every rank probes directions of its own on its own batch; beside it stands all-reduce on gradients
of the same model. The processes are started here, or by a launcher: over a slow link, say.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gossamer.algorithms.optimizers.sgd import SGD
from gossamer.algorithms.oracles.backprop import Backprop
from gossamer.algorithms.program import TrainingProgram
from gossamer.algorithms.protocols import Oracle
from gossamer.algorithms.zeroth_order.zeroth_order import ZerothOrder
from gossamer.launch.bench.children import started
from gossamer.launch.bench.measure import Row, spread
from gossamer.launch.bench.zo_ways import EPS, ZoModel, make_program, train
from gossamer.runtime import Communicator, ConfigError, StackedTransport, native, open_transport
from gossamer.runtime.transports import Transport
from gossamer.runtime.transports.select import detect_launcher
from gossamer.topologies import build

__all__ = ["ExchangeRequest", "exchange"]

_TIMEOUT_S = 3600.0
"""Of every wait: gradients over a slow link take minutes."""


@dataclass(frozen=True)
class ExchangeRequest:
    """What to measure.

    Attributes:
        ranks: numbers of processes to start; a launcher's number wins.
        model: what to train.
        iters: steps with numbers per figure; of those with gradients a fourth, at least one.
        warmup: steps thrown away before them, of numbers alone.
    """

    ranks: Sequence[int]
    model: ZoModel
    iters: int
    warmup: int


def exchange(request: ExchangeRequest, progress: Callable[[str], object]) -> list[Row] | None:
    """Measure; two rows of figures for every n.

    Under a launcher its processes are the ranks; None on all but process 0.

    Raises:
        ConfigError: the processes failed, or the ranks' parameters differ afterwards.
    """
    if detect_launcher() != "none":
        return _measure(request, open_transport("auto", timeout_s=_TIMEOUT_S))
    rows: list[Row] = []
    for n in request.ranks:
        progress(f"{n} ranks")
        rows += started("zo", n, _child, request)
    return rows


def _child(request: ExchangeRequest, result: str) -> int:
    alone = detect_launcher() == "none"
    transport = StackedTransport() if alone else open_transport("auto", timeout_s=_TIMEOUT_S)
    rows = _measure(request, transport)
    if rows is not None:
        Path(result).write_text(json.dumps(rows))
    return 0


def _measure(request: ExchangeRequest, transport: Transport) -> list[Row] | None:
    torch.set_num_threads(1)
    native.use_threads(1)
    model = request.model
    comm = Communicator(build("ring", transport.processes), transport, timeout_s=_TIMEOUT_S)
    rows = []
    for way, steps, warmup in (
        ("numbers", request.iters, request.warmup),
        ("gradients", max(1, request.iters // 4), 0),
    ):
        oracle: Oracle = Backprop(batch_size=model.batch_size)
        if way == "numbers":
            oracle = ZerothOrder(batch_size=model.batch_size, eps=EPS, directions="own")
        program = make_program(model, comm, oracle, SGD(lr=1e-7))
        rows.append(_row(way, program, model, steps, warmup))
    transport.close()
    return rows if comm.ranks.start == 0 else None


def _row(way: str, program: TrainingProgram, model: ZoModel, steps: int, warmup: int) -> Row:
    comm = program.comm
    spent: list[float] = []
    for k in range(-warmup, steps):
        batch = model.batch(1 + comm.ranks.start + comm.n * (k + warmup))
        comm.barrier()
        begin, sent = time.perf_counter(), int(comm.traffic.bytes_sent.sum())
        train(program, batch)
        if k >= 0:
            spent.append(time.perf_counter() - begin)
    moved = int(comm.traffic.bytes_sent.sum()) - sent
    table = torch.tensor([spent], dtype=torch.float64)
    found = spread(comm.all_reduce(table, "max", count=False)[0].tolist())
    hashes = program.state.x.view(torch.int32).sum(1, dtype=torch.int64)[:, None]
    everyone = comm.all_gather(hashes, count=False)
    if not bool((everyone == everyone[0]).all()):
        raise ConfigError(f"bench zo: the ranks' parameters differ after {steps} steps of {way}")
    row: Row = {"ranks": comm.n, "parameters": program.layout.size, "exchanged": way}
    for key in ("", "_p10", "_p90"):
        row[f"step_ms{key}"] = 1e3 * getattr(found, key.removeprefix("_") or "median")
    row["probes_per_s"] = comm.n / found.median if way == "numbers" else None
    return row | {"bytes_per_step": moved, "transport": comm.transport.name, "steps": steps}
