"""``bench zo``: a zeroth-order step beside MeZO in plain torch, two forward passes, and Adam.

Same model and batch for all, one thread. The ways run in turn in one process, each time in another
order; so does what moves parameters in a step, alone: MeZO's four passes, and our two moves through
scratch and the update. Ratios are of the time on the CPU, which other programs enter less than the
clock's. Memory is measured with one way alone in a fresh process: the most that is resident while
two steps are made, beyond what was before the model was built, less that of two forward passes.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gossamer.algorithms.optimizers.sgd import SGD
from gossamer.algorithms.problems import Batch
from gossamer.algorithms.zeroth_order.zeroth_order import ZerothOrder
from gossamer.launch.bench.children import held_by, started
from gossamer.launch.bench.measure import Row, spread
from gossamer.launch.bench.private import Aim
from gossamer.launch.bench.zo_ways import EPS, WAYS, Step, ZoModel, make_program, make_way
from gossamer.runtime import Communicator, ConfigError, StackedTransport, native
from gossamer.topologies import build

__all__ = ["ZoRequest", "aims", "parse_models", "zo"]

_OURS = ("ours", "ours signs", "ours adam")
_COPIED = 1 << 24
"""Elements of the row whose copy says what memory allows."""


@dataclass(frozen=True)
class ZoRequest:
    """What to measure.

    Attributes:
        models: what to train.
        iters: samples per figure.
        warmup: samples thrown away before them.
    """

    models: Sequence[ZoModel]
    iters: int
    warmup: int


def parse_models(sizes: str, vocabulary: int, context: int, batch: int) -> list[ZoModel]:
    """Return models of 10M or 1G parameters, by commas (powers of 1000).

    Raises:
        ConfigError: one is no number, or there is no such model.
    """
    models = []
    for word in sizes.split(","):
        match = re.fullmatch(r"(\d+)([KMG]?)", word.strip().upper())
        if match is None:
            raise ConfigError(f"--parameters: '{word}' is no number; write 500K, 10M or 1G")
        count = int(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2]]
        models.append(ZoModel.of_size(count, vocabulary, context, batch))
    return models


def zo(request: ZoRequest, progress: Callable[[str], object]) -> list[Row]:
    """Measure; a row of figures for every model and way.

    Raises:
        ConfigError: the processes failed, or moved layers do not give the loss of moved parameters.
    """
    rows: list[Row] = []
    for model in request.models:
        progress(f"width {model.width}, {model.layers} layers: times")
        times = started("zo", 1, _time_child, model, request.iters, request.warmup)
        peaks = {}
        for way in WAYS:
            progress(f"width {model.width}, {model.layers} layers: memory of {way}")
            peaks[way] = started("zo", 1, _memory_child, model, way)
        rows += [_row(model, way, times, peaks) for way in WAYS]
    return rows


def _row(model: ZoModel, way: str, times: Mapping[str, Any], peaks: Mapping[str, float]) -> Row:
    count = times["parameters"]
    row: Row = {"parameters": count, "way": way}
    found = spread(times["seconds"][way])
    for key in ("", "_p10", "_p90"):
        row[f"step_ms{key}"] = 1e3 * getattr(found, key.removeprefix("_") or "median")
    cpu = {name: spread(samples).median for name, samples in times["cpu_seconds"].items()}
    row["cpu_ms"] = 1e3 * cpu[way]
    row["mezo_ratio"], row["forwards_ratio"] = cpu[way] / cpu["mezo"], cpu[way] / cpu["forwards"]
    row["beyond_ms"] = 1e3 * (cpu[way] - cpu["forwards"])
    row["moves_ms"] = 1e3 * cpu[f"{way} moves"] if f"{way} moves" in cpu else None
    # x is read twice, and read and written once more: two copies of it.
    row["limit_ms"] = 2e3 * cpu["copy"] * count / _COPIED if way in _OURS[:2] else None
    row["memory_mib"] = (peaks[way] - peaks["forwards"]) / 2**20
    row["memory_share"] = (peaks[way] - peaks["forwards"]) / (4 * count)
    return row | {"settings": asdict(model)}


def aims(rows: Sequence[Row]) -> list[Aim]:
    """Return what the rows are held to."""
    held = []
    for count in dict.fromkeys(row["parameters"] for row in rows):
        ours, theirs = (
            next(r for r in rows if r["parameters"] == count and r["way"] == way)
            for way in ("ours", "mezo")
        )
        at = f"{count:,} parameters"
        for key, what in (("moves_ms", "alone"), ("beyond_ms", "step less two forwards")):
            ratio = ours[key] / theirs[key]
            held.append(Aim(f"{at}: moves and update over MeZO's, {what}", ratio, 0.25))
        held.append(Aim(f"{at}: step over MeZO's", ours["cpu_ms"] / theirs["cpu_ms"], 1.0))
        held.append(Aim(f"{at}: memory above inference", ours["memory_share"], 0.01))
    return held


# --- in the processes -----------------------------------------------------------------------


def _alone() -> Communicator:
    torch.set_num_threads(1)
    native.use_threads(1)
    return Communicator(build("ring", 1), StackedTransport())


def _time_child(model: ZoModel, iters: int, warmup: int, result: str) -> int:
    comm = _alone()
    _check(model, comm)
    steps = {way: make_way(way, model, comm) for way in WAYS}
    cases = _cases(steps)
    names = list(cases)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    busy_s: dict[str, list[float]] = {name: [] for name in names}
    for k in range(-warmup, iters):
        batch = model.batch(k + warmup)
        for c in range(len(names)):
            name = names[(c + k) % len(names)]
            begin, busy = time.perf_counter(), time.process_time()
            cases[name](batch)
            if k >= 0:
                seconds[name].append(time.perf_counter() - begin)
                busy_s[name].append(time.process_time() - busy)
    count = sum(p.numel() for p in model.module().parameters())
    document = {"seconds": seconds, "cpu_seconds": busy_s, "parameters": count}
    Path(result).write_text(json.dumps(document))
    return 0


def _cases(steps: Mapping[str, Step]) -> dict[str, Callable[[Any], object]]:
    x, out = torch.ones(_COPIED), torch.ones(_COPIED)
    cases: dict[str, Callable[[Any], object]] = {"copy": lambda batch: out.copy_(x)}
    for way, step in steps.items():
        cases[way] = step.run
        if step.moves is not None:
            cases[f"{way} moves"] = partial(_call, step.moves)
    return cases


def _call(moves: Callable[[], object], batch: object) -> None:
    moves()


def _check(model: ZoModel, comm: Communicator) -> None:
    """Compare an estimate by moved layers with one by a moved copy of the row.

    Raises:
        ConfigError: their losses differ by more than rounding.
    """
    batch = [Batch(model.batch(0))]
    losses = []
    for restore in ("transient", "snapshot"):
        oracle = ZerothOrder(batch_size=model.batch_size, eps=EPS, restore=restore)
        program = make_program(model, comm, oracle, SGD(lr=1.0))
        losses.append(float(oracle.deferred(program.state.x, batch).loss))
    away = abs(losses[0] - losses[1]) / abs(losses[1])
    if not away < 1e-5:
        raise ConfigError(
            f"bench zo: the losses of moved layers and of moved parameters are {away:.1e} apart; "
            "the times would be of different things"
        )


def _memory_child(model: ZoModel, way: str, result: str) -> int:
    comm = _alone()
    _two_steps(way, model.tiny(), comm)()  # what is loaded once is no memory of a step
    held = held_by(lambda: _two_steps(way, model, comm))
    Path(result).write_text(json.dumps(held))
    return 0


def _two_steps(way: str, model: ZoModel, comm: Communicator) -> Callable[[], None]:
    step = make_way(way, model, comm)

    def run() -> None:
        for k in range(2):
            step.run(model.batch(k))

    return run
