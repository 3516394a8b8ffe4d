"""The Chrome trace: lanes, overlap, and one clock for all processes."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from thread_ranks import on_processes

from gossamer.launch.trace import trace_events, write_trace
from gossamer.runtime import Communicator
from gossamer.runtime.collectives import RankGroup
from gossamer.runtime.traffic import Event
from gossamer.runtime.transports.stacked import StackedTransport
from gossamer.topologies import build

STEP = Event("compute", "step", 0.0, 10.0, 3)
EXCHANGE = Event("wait", "neighbor_average", 2.0, 4.0, 3)
SUM = Event("communicate", "weighted sum", 4.0, 5.0, 3)


def lanes(events):
    """Return lane number -> [(begin, end)] in seconds."""
    found = {}
    for e in trace_events(0, events):
        span = (e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6)
        found.setdefault(e["tid"], []).append(span)
    return found


def test_compute_is_what_waits_and_communication_leave_of_a_step():
    assert lanes([EXCHANGE, SUM, STEP]) == {0: [(0, 2), (5, 10)], 1: [(2, 4)], 2: [(4, 5)]}


def test_a_transfer_beside_the_computation_does_not_interrupt_it():
    awaited = Event("wait", "wait for neighbor_average", 8.0, 8.5, 3)
    beside = [replace(event, background=True) for event in (EXCHANGE, SUM)]
    found = lanes([*beside, awaited, STEP])
    assert found == {0: [(0, 8), (8.5, 10)], 1: [(8, 8.5)], 2: [(2, 4), (4, 5)]}


def test_spans_outside_steps_are_kept():
    evaluation = Event("wait", "all_reduce(mean)", 11.0, 12.0, 4)
    assert lanes([STEP, evaluation]) == {0: [(0, 10)], 1: [(11, 12)]}


@pytest.mark.parametrize("processes", [1, 3])
def test_processes_with_clocks_of_their_own_are_aligned(tmp_path, processes):
    path = tmp_path / "trace.json"

    def act(transport):
        group = RankGroup(6, transport if processes > 1 else StackedTransport(), timeout_s=30)
        group.traffic.tracing = True
        # As if this machine had started long ago.
        group.traffic.origin -= 1000.0 * transport.process
        group.barrier()
        with group.traffic.span("compute", "step", 0):
            pass
        for _ in range(transport.process * 50):  # traces of different lengths
            with group.traffic.span("wait", "something", 0):
                pass
        write_trace(path, group)

    on_processes(processes, act)
    events = json.loads(path.read_text())["traceEvents"]
    steps = {e["pid"]: e["ts"] / 1e6 for e in events if e["name"] == "compute"}
    assert set(steps) == set(range(processes))
    # Their clocks are 1,000 s apart; that they acted together is seen to the scheduler's delays.
    assert max(steps.values()) - min(steps.values()) < 20
    for process in range(processes):
        waits = [e for e in events if e["pid"] == process and e["name"] == "something"]
        assert len(waits) == 50 * process


def test_lanes_and_ranks_are_named(tmp_path):
    comm = Communicator(build("ring", 4), StackedTransport())
    write_trace(tmp_path / "trace.json", comm)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [(e["ph"], e["args"]["name"]) for e in events] == [
        ("M", "process 0: ranks 0..3"),
        ("M", "compute"),
        ("M", "wait"),
        ("M", "communicate"),
    ]


def lie_beside_each_other(events, process, name):
    """Whether an operation of this name went on while the process computed."""
    spans = [
        (e["name"], e["tid"], e["ts"], e["ts"] + e["dur"])
        for e in events
        if e["ph"] == "X" and e["pid"] == process
    ]
    sent = [s for s in spans if s[0] == name and s[1] == 2]
    computed = [s for s in spans if s[1] == 0]
    # What follows one upon the other may touch, by the rounding of the times to 1 ns.
    return any(min(a[3], b[3]) - max(a[2], b[2]) > 1.0 for a in sent for b in computed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "operation", "overlaps"),
    [
        ({"name": "dsgd", "order": "cta"}, "neighbor_average", True),
        ({"name": "dsgd", "order": "atc"}, "neighbor_average", False),
        ({"name": "extra"}, "neighbor_average", True),
        ({"name": "d-nasa", "grad_point": "half"}, "neighbor_average", True),
        ({"name": "choco"}, "neighbor_gather", True),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else None,
)
def test_what_a_rule_sends_during_the_gradient_lies_beside_it(
    tmp_path, algorithm, operation, overlaps
):
    config = {
        "task": {"name": "digits", "model": "mlp"},
        "oracle": {"name": "backprop", "batch_size": 64},
        "algorithm": algorithm,
        "topology": {"name": "ring"},
        "ranks": 2,
        "steps": 20,
        "transport": "native",
        "trace": True,
    }
    if algorithm["name"] != "d-nasa":
        config["optimizer"] = {"name": "sgd", "lr": 0.1}
    (tmp_path / "run.yaml").write_text(json.dumps(config))  # JSON is YAML
    done = subprocess.run(
        [sys.executable, "-m", "gossamer", "run", "run.yaml", "--processes=2", "--out=out"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("out/**/trace.json")
    events = json.loads(path.read_text())["traceEvents"]
    found = [lie_beside_each_other(events, process, operation) for process in range(2)]
    assert found == [overlaps] * 2
