"""The loop: what is logged, saved and stopped, and when."""

import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch

from gossamer.runtime import Communicator, StackedTransport
from gossamer.runtime.loop import LoopOptions, StopRequest, Terminated, run_loop, terminations
from gossamer.topologies import build


class Counter:
    """Counts its steps; knows nothing of gradients."""

    def __init__(self, comm, rounds_per_step=1):
        self.comm, self.rounds_per_step, self.steps = comm, rounds_per_step, []
        self.on_step = {}

    def step(self):
        self.steps.append((self.comm.step, self.comm.round))
        self.on_step.get(self.comm.step, lambda: None)()
        return {"mine": torch.arange(4.0), "constant": 2.5}

    def evaluate(self):
        return {"evaluated": float(self.comm.step)}

    def totals(self):
        return {"apples": 10 * self.comm.step}

    def snapshot(self):
        return {}, {}


@pytest.fixture
def loop():
    """Return a program, and a function that runs it and keeps what the loop did."""
    comm = Communicator(build("ring", 4), StackedTransport())
    program = Counter(comm)

    def run(steps, log_every=1, evaluate_every=1, checkpoint_every=0, **options):
        done = SimpleNamespace(records=[], saved=[], terminated=None)
        options.setdefault("save", lambda: done.saved.append(comm.step))
        limits = LoopOptions(steps, log_every, evaluate_every, checkpoint_every)
        try:
            run_loop(comm, program, limits, log=done.records.append, **options)
        except Terminated as error:
            done.terminated = error
        return done

    return program, run


def test_step_and_round_move_after_each_step(loop):
    program, run = loop
    program.rounds_per_step = 3
    run(4)
    assert program.steps == [(0, 0), (1, 3), (2, 6), (3, 9)]
    assert program.comm.step == 4
    assert program.comm.round == 12


def test_the_start_and_the_last_step_are_always_logged_and_evaluated(loop):
    _, run = loop
    done = run(7, log_every=3, evaluate_every=6)
    assert [r["step"] for r in done.records] == [0, 3, 6, 7]
    assert [r.get("evaluated") for r in done.records] == [0.0, None, 6.0, 7.0]


def test_a_resumed_loop_does_not_log_its_start_again(loop):
    program, run = loop
    program.comm.step = 5
    assert [r["step"] for r in run(7).records] == [6, 7]


def test_figures_are_means_over_ranks(loop):
    _, run = loop
    record = run(1).records[-1]
    assert record["mine"] == 1.5
    assert record["constant"] == 2.5


def test_checkpoints_come_when_due_and_at_the_end(loop):
    _, run = loop
    assert run(7, checkpoint_every=3).saved == [3, 6, 7]


def test_no_interval_means_a_checkpoint_at_the_end_only(loop):
    _, run = loop
    assert run(7).saved == [7]


def test_a_run_that_is_over_does_nothing(loop):
    program, run = loop
    program.comm.step = 7
    done = run(7)
    assert (program.steps, done.records, done.saved) == ([], [], [])


def test_a_request_to_stop_saves_once_and_raises(loop):
    program, run = loop
    stop = StopRequest()
    program.on_step[0] = stop.event.set
    done = run(1000, stop=stop)
    assert done.saved == [1]
    assert "after step 1" in str(done.terminated)


def test_a_checkpoint_of_this_step_is_not_written_twice(loop):
    program, run = loop
    stop = StopRequest()
    program.on_step[0] = stop.event.set
    assert run(1000, checkpoint_every=1, stop=stop).saved == [1]


def test_a_request_at_the_last_step_lets_the_run_end(loop):
    program, run = loop
    stop = StopRequest()
    program.on_step[0] = stop.event.set
    done = run(1, stop=stop)
    assert done.terminated is None
    assert done.saved == [1]


def test_a_request_is_met_without_a_place_to_save(loop):
    program, run = loop
    stop = StopRequest()
    program.on_step[0] = stop.event.set
    assert run(1000, stop=stop, save=None).terminated is not None


def test_a_program_that_raises_is_not_saved(loop):
    program, run = loop

    def fail():
        raise ArithmeticError("lemon")

    program.on_step[2] = fail
    saved = []
    with pytest.raises(ArithmeticError, match="lemon"):
        run(5, save=lambda: saved.append(program.comm.step))
    assert saved == []


def test_sigterm_sets_the_request_and_the_handler_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with terminations() as stop:
        assert not stop.event.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.event.wait(10)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_thread_that_cannot_take_signals_runs_all_the_same():
    seen = []

    def body():
        with terminations() as stop:
            seen.append(stop.event.is_set())

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [False]


def test_seconds_leave_out_evaluation_and_checkpoints(loop):
    program, run = loop
    waits = threading.Event()
    program.evaluate = lambda: {"evaluated": float(waits.wait(0.3))}
    record = run(2, checkpoint_every=1, save=lambda: waits.wait(0.3)).records[-1]
    paused = 3 * 0.3 + 2 * 0.3
    assert 0 <= record["seconds"] < paused
    assert record["seconds_compute"] + record["seconds_communicate"] <= record["seconds"] + 1e-6


def test_what_the_program_counts_is_logged_with_its_rate(loop):
    _, run = loop
    first, *records = run(3).records
    assert "apples" not in first
    assert [record["apples"] for record in records] == [10, 20, 30]
    for record in records:
        assert record["apples_per_second"] == pytest.approx(record["apples"] / record["seconds"])


def test_a_resumed_loop_counts_on_but_its_rate_is_its_own(loop):
    program, run = loop
    program.comm.step = 5
    record = run(7).records[-1]
    assert record["apples"] == 70
    assert record["apples_per_second"] == pytest.approx(20 / record["seconds"])
