"""``bench private``: a private step beside Opacus' and a plain torch step, time and memory.

Same model, batch, clipping norm and noise for all; one thread per process. The ways run in turn in
the same processes, each time in another order, from a barrier on; the slowest rank's time counts.
Beside the clock's stands the time that a rank was on a CPU, which other programs enter less; with
several ranks it has the waiting for messages in it, where that polls.
Memory is measured with one way alone in fresh processes: the most that is resident from before the
model is built until two steps are made, of the rank that needs most.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gossamer.launch.bench.children import peak_of, started
from gossamer.launch.bench.measure import Row, spread
from gossamer.launch.bench.private_ways import WAYS, PrivateModel, make_way
from gossamer.runtime import Communicator, ConfigError, StackedTransport
from gossamer.runtime.errors import nearest
from gossamer.runtime.transports.select import join_torch
from gossamer.topologies import build

__all__ = ["Aim", "PrivateRequest", "aims", "parse_models", "private"]

_TIMEOUT_S = 300.0
_MIB = 1 << 20
_CHANNELS = 64


@dataclass(frozen=True)
class PrivateRequest:
    """What to measure.

    Attributes:
        ranks: numbers of processes to start.
        models: what to train.
        iters: samples per figure.
        warmup: samples thrown away before them.
    """

    ranks: Sequence[int]
    models: Sequence[PrivateModel]
    iters: int
    warmup: int


class Aim(NamedTuple):
    """A ratio that a row must not exceed."""

    name: str
    figure: float
    bound: float

    @property
    def is_met(self) -> bool:
        """Whether it does not."""
        return self.figure <= self.bound


def parse_models(
    names: str, batch: int, width: int, layers: int, context: int
) -> list[PrivateModel]:
    """Return the models called ``names``, by commas.

    Raises:
        ConfigError: a name is unknown, or the width is none.
    """
    if width % 8:
        raise ConfigError(f"--width: {width} must be a multiple of 8, for heads and groups")
    made = {
        "transformer": PrivateModel("transformer", batch, width, layers, context),
        "cnn": PrivateModel("cnn", batch, width=_CHANNELS),
    }
    for name in names.split(","):
        if name not in made:
            raise ConfigError(f"--models: unknown model '{name}'{nearest(name, made)}")
    return [made[name] for name in names.split(",")]


def private(request: PrivateRequest, progress: Callable[[str], object]) -> list[Row]:
    """Measure; a row of figures for every number of ranks, model and way.

    Raises:
        ConfigError: Opacus is not installed, the processes failed, or two private ways disagree.
    """
    try:
        import opacus  # noqa: F401 - whether there is one
    except ImportError as error:
        raise ConfigError(
            f"bench private: stands beside opacus ({error}); pip install 'gossamer[privacy]'"
        ) from None
    rows: list[Row] = []
    for n in request.ranks:
        for model in request.models:
            progress(f"{model.name}, {n} ranks, times")
            times = started("private", n, _time_child, model, request.iters, request.warmup)
            for way in WAYS:
                progress(f"{model.name}, {n} ranks, memory of {way}")
                peak = started("private", n, _memory_child, model, way)
                rows.append(_row(n, model, way, times, peak))
    return rows


def _row(n: int, model: PrivateModel, way: str, times: Mapping[str, Any], peak: float) -> Row:
    row: Row = {"ranks": n, "model": model.name, "way": way, "parameters": times["parameters"]}
    found = spread(times["seconds"][way])
    for key in ("", "_p10", "_p90"):
        row[f"step_ms{key}"] = 1e3 * getattr(found, key.removeprefix("_") or "median")
    for other in ("plain", "dp"):
        row[f"{other}_ratio"] = found.median / spread(times["seconds"][other]).median
    row["cpu_ms"] = 1e3 * spread(times["cpu_seconds"][way]).median
    return row | {"memory_mib": peak, "settings": asdict(model)}


def aims(rows: Sequence[Row]) -> list[Aim]:
    """Return what the rows are held to."""
    found = {(row["model"], row["ranks"], row["way"]): row for row in rows}
    held = []
    for model, n in dict.fromkeys((row["model"], row["ranks"]) for row in rows):
        here = {way: found[model, n, way] for way in WAYS}
        time_of = {way: row["step_ms"] for way, row in here.items()}
        memory_of = {way: row["memory_mib"] for way, row in here.items()}
        at = f"{model}, n = {n}"
        if model == "transformer":
            times = time_of["dp"] / time_of["opacus"], time_of["dp"] / time_of["opacus ghost"]
            held.append(Aim(f"{at}: time over Opacus' materialised", times[0], 0.6))
            memory = memory_of["dp"] / memory_of["opacus"]
            held.append(Aim(f"{at}: memory over Opacus' materialised", memory, 0.6))
            held.append(Aim(f"{at}: time over Opacus' ghost", times[1], 1.0))
        one = time_of["disk one"] / time_of["dp"]
        held.append(Aim(f"{at}: time of DiSK, one evaluation, over dp", one, 1.1))
    return held


# --- in the processes -----------------------------------------------------------------------


def _join() -> Communicator:
    """Return the ranks of the started processes; torch's default group is gloo's, for Opacus."""
    torch.set_num_threads(1)
    # Opacus' hooks on the first layer, whose inputs need no gradients: once a step.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    n = int(os.environ["WORLD_SIZE"])
    if n == 1:
        return Communicator(build("ring", 1), StackedTransport())
    dist.init_process_group(
        "gloo",
        init_method=os.environ["GOSSAMER_RENDEZVOUS"],
        rank=int(os.environ["RANK"]),
        world_size=n,
        timeout=timedelta(seconds=_TIMEOUT_S),
    )
    transport = join_torch(torch.device("cpu"), _TIMEOUT_S)
    return Communicator(build("ring", n), transport, timeout_s=_TIMEOUT_S)


def _time_child(model: PrivateModel, iters: int, warmup: int, result: str) -> int:
    comm = _join()
    _check(model, comm)
    steps = {way: make_way(way, model, comm) for way in WAYS}
    spent = torch.zeros(2, len(steps), iters, dtype=torch.float64)  # by the clock, and of the CPU
    for k in range(-warmup, iters):
        batch = model.batch(comm.ranks.start, k)
        for c in range(len(WAYS)):
            c = (c + k) % len(WAYS)
            comm.barrier()
            begin, busy = time.perf_counter(), time.process_time()
            steps[WAYS[c]].run(batch)
            if k >= 0:
                spent[0, c, k] = time.perf_counter() - begin
                spent[1, c, k] = time.process_time() - busy
    slowest = comm.all_gather(spent.reshape(1, -1)).amax(0).view_as(spent)
    if comm.ranks.start == 0:
        seconds, busy_s = (dict(zip(WAYS, times, strict=True)) for times in slowest.tolist())
        count = len(steps["plain"].flat())
        document = {"seconds": seconds, "cpu_seconds": busy_s, "parameters": count}
        Path(result).write_text(json.dumps(document))
    return _leave(comm)


def _check(model: PrivateModel, comm: Communicator) -> None:
    """Compare the private ways' first steps without noise.

    Raises:
        ConfigError: one of them moves the parameters elsewhere than by rounding.
    """
    batch = model.batch(comm.ranks.start, 0)
    moves: dict[str, Tensor] = {}
    for way in ("dp", "opacus", "opacus ghost"):
        step = make_way(way, replace(model, noise_multiplier=0.0), comm)
        before = step.flat()
        step.run(batch)
        moves[way] = step.flat() - before
    for way, move in moves.items():
        away = float((move - moves["dp"]).norm() / moves["dp"].norm())
        # Norms may be counted 1 % too large, for the rounding of float32.
        if not away < 2e-2:
            raise ConfigError(
                f"bench private: without noise the steps of dp and {way} are {away:.1e} apart on "
                f"the {model.name}; the times would be of different things"
            )


def _memory_child(model: PrivateModel, way: str, result: str) -> int:
    comm = _join()
    _two_steps(way, model.tiny(), comm)  # what is loaded once is no memory of a step
    found = peak_of(lambda: _two_steps(way, model, comm))
    peak = torch.tensor([[found]], dtype=torch.float64)
    most = float(comm.all_reduce(peak, "max"))
    if comm.ranks.start == 0:
        Path(result).write_text(json.dumps(most / _MIB))
    return _leave(comm)


def _two_steps(way: str, model: PrivateModel, comm: Communicator) -> None:
    step = make_way(way, model, comm)
    for k in range(2):
        step.run(model.batch(comm.ranks.start, k))


def _leave(comm: Communicator) -> int:
    comm.barrier()
    comm.close()
    with suppress(ValueError, AssertionError):  # there is no group of one process
        dist.destroy_process_group()
    return 0
