"""The loop: drives, logs, checkpoints and stops anything that has a state and a step.

It knows nothing of gradients. Time moves here: ``comm.step`` by one per step, ``comm.round`` by the
program's rounds per step.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gossamer.runtime.communicator import Communicator
from gossamer.runtime.state import Scalar

__all__ = [
    "LoopOptions",
    "Program",
    "Record",
    "Terminated",
    "run_loop",
    "terminations",
    "traffic_totals",
]

Record = dict[str, float | int]
"""One line of the metrics."""

_POLL_S = 1.0
"""How often, at most, the processes ask each other whether one was told to stop."""


class Terminated(Exception):
    """The run was told to stop; its state is saved if it has checkpoints."""


class Program(Protocol):
    """What the loop drives."""

    rounds_per_step: int

    def step(self) -> Mapping[str, Tensor | float]:
        """Make one step; figures are numbers or (local,) tensors."""
        ...

    def evaluate(self) -> Mapping[str, float]:
        """Return figures of the whole run at this step, the same on every process."""
        ...

    def totals(self) -> Mapping[str, int]:
        """Return counts over all ranks since step 0, by name; every process calls it."""
        ...

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Scalar]]:
        """Return rows (local, ...) and numbers: all that a resume needs."""
        ...


@dataclass(frozen=True)
class LoopOptions:
    """How long, how often.

    Attributes:
        steps: where the run ends.
        log_every: steps between lines of the metrics; the first and last step are always logged.
        evaluate_every: steps between evaluations, a multiple of ``log_every``.
        checkpoint_every: steps between checkpoints; 0: only when told to stop, and at the end.
    """

    steps: int
    log_every: int
    evaluate_every: int
    checkpoint_every: int


@dataclass
class StopRequest:
    """Set by a signal; read by the loop between steps."""

    event: threading.Event = field(default_factory=threading.Event)


@contextmanager
def terminations() -> Iterator[StopRequest]:
    """Turn SIGTERM, or SIGUSR1, into a request that the loop meets at the next step.

    Open MPI's mpirun kills its ranks a fraction of a second after it is sent SIGTERM, too soon to
    save; SIGUSR1 it hands on and leaves them to end.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.signal(number, lambda *_: request.event.set()) for number in numbers]
    try:
        yield request
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def run_loop(
    comm: Communicator,
    program: Program,
    options: LoopOptions,
    *,
    log: Callable[[Record], None],
    save: Callable[[], None] | None = None,
    evaluated: Callable[[Record], None] = lambda record: None,
    stop: StopRequest | None = None,
) -> None:
    """Run from ``comm.step`` to ``options.steps``.

    Args:
        comm: the ranks; its step and round are moved.
        program: what to run.
        options: how long, how often.
        log: takes each record, on every process.
        save: writes a checkpoint of this step.
        evaluated: takes the figures of each evaluation, on every process, before the next step.
        stop: a request to end early.

    Raises:
        Terminated: ``stop`` was set on some process; the state was saved first.
    """
    clock = _Clock(comm, program)
    poll = _StopPoll(comm, stop)
    saved_at = comm.step
    if comm.step == 0:
        with clock.paused():
            first: Record = {"step": 0, **program.evaluate()}
            evaluated(first)
        log(first)
    while comm.step < options.steps:
        with comm.traffic.span("compute", "step", comm.step):  # the trace takes the waits out
            figures = program.step()
        comm.step += 1
        comm.round += program.rounds_per_step
        last = comm.step == options.steps
        if comm.step % options.log_every == 0 or last:
            record: Record = {"step": comm.step, **_means(comm, figures), **clock.read()}
            if comm.step % options.evaluate_every == 0 or last:
                with clock.paused():
                    found: Record = {"step": comm.step, **program.evaluate()}
                    evaluated(found)
                record |= found
            log(record)
        due = options.checkpoint_every and comm.step % options.checkpoint_every == 0
        if save is not None and (due or last):
            with clock.paused():
                save()
            saved_at = comm.step
        if not last and poll.told_to_stop():
            if save is not None and saved_at != comm.step:
                save()
            raise Terminated(f"told to stop after step {comm.step}")


class _Clock:
    """Seconds and bytes since the start, evaluation and checkpoints left out.

    Also what the program counts, and by how much that has grown per such second since the start,
    or since the run was resumed.
    """

    def __init__(self, comm: Communicator, program: Program) -> None:
        self._program, self._before = program, program.totals()
        self._comm, self._begin, self._out = comm, time.perf_counter(), 0.0
        self._lanes_out = dict.fromkeys(comm.traffic.seconds, 0.0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        begin, lanes = time.perf_counter(), dict(self._comm.traffic.seconds)
        yield
        self._out += time.perf_counter() - begin
        for lane, seconds in self._comm.traffic.seconds.items():
            self._lanes_out[lane] += seconds - lanes[lane]

    def read(self) -> Record:
        traffic = self._comm.traffic
        seconds = time.perf_counter() - self._begin - self._out
        lanes = {k: v - self._lanes_out[k] for k, v in traffic.seconds.items()}
        communicate = lanes["communicate"] + lanes["wait"]
        totals = self._program.totals()
        rates = {f"{k}_per_second": (v - self._before[k]) / seconds for k, v in totals.items()}
        return {
            **traffic_totals(self._comm),
            **totals,
            **rates,
            "seconds": seconds,
            "seconds_compute": max(0.0, seconds - communicate),
            "seconds_communicate": communicate,
        }


def traffic_totals(comm: Communicator) -> dict[str, int]:
    """Return what all ranks have sent; every process calls it."""
    traffic = comm.traffic
    sent = torch.from_numpy(np.stack([traffic.bytes_sent, traffic.messages_sent], axis=1))
    totals = comm.all_reduce(sent.to(comm.device), "sum", count=False)[0].tolist()
    return {"bytes_sent": totals[0], "messages_sent": totals[1]}


class _StopPoll:
    """Asks all processes, about once a second, whether one of them was told to stop.

    The next step at which they ask follows from the slowest one's pace, so they agree on it.
    """

    def __init__(self, comm: Communicator, stop: StopRequest | None) -> None:
        self._comm, self._stop = comm, stop
        self._next = comm.step + 1
        self._since, self._asked = time.perf_counter(), comm.step

    def told_to_stop(self) -> bool:
        if self._stop is None or self._comm.step < self._next:
            return False
        now, step = time.perf_counter(), self._comm.step
        pace = (now - self._since) / max(1, step - self._asked)
        row = torch.tensor([[float(self._stop.event.is_set()), pace]], dtype=torch.float64)
        rows = row.expand(self._comm.local, 2).contiguous().to(self._comm.device)
        flag, slowest = self._comm.all_reduce(rows, "max", count=False)[0].tolist()
        self._next = step + max(1, min(1000, int(_POLL_S / max(slowest, 1e-9))))
        self._since, self._asked = now, step
        return bool(flag > 0)


def _means(comm: Communicator, figures: Mapping[str, Any]) -> Record:
    """Return the mean over ranks of each figure; equal on every process."""
    if not figures:
        return {}
    columns = [
        value.detach().double().cpu().reshape(comm.local)
        if isinstance(value, Tensor)
        else torch.full((comm.local,), float(value), dtype=torch.float64)
        for value in figures.values()
    ]
    rows = torch.stack(columns, dim=1).to(comm.device)
    means = comm.all_reduce(rows, "mean", count=False)[0].tolist()
    return dict(zip(figures, means, strict=True))
