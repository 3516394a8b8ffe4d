"""A rank raises, hangs or is killed during a round: all end in time, peer and operation named."""

import signal
import subprocess
import sys
import time
import uuid

import pytest
from faulty import MODULE
from harness import MARKER, alive, environment, until, write_yaml

from gossamer.runtime.checkpoint import Checkpoint

TIMEOUT_S = 4
BOUND_S = TIMEOUT_S + 5
START_S = 5
"""Imports and the first steps of an idle machine; what a start takes longer is a busy one's."""


@pytest.fixture
def job(tmp_path):
    """Write the module and a YAML whose rank 1 of 4 fails at step 3."""

    def write(fault, rank=1, **changes):
        (tmp_path / "faulty.py").write_text(MODULE)
        algorithm = {"name": "faulty:Faulty", "fault": fault, "rank": rank}
        values = {"algorithm": algorithm, "timeout_s": TIMEOUT_S, "steps": 2000, **changes}
        return write_yaml(tmp_path / "run.yaml", **values)

    return write


def failed_at(folder):
    """Return when the metrics reached step 3, whose next step fails."""
    path = folder / "out" / "metrics.jsonl"
    return path.exists() and '"step": 3,' in path.read_text() and time.monotonic()


FAULTS = ["raise", "sleep", "kill"]
"""A rank that sleeps does not answer; neither does one that is stopped, in more launches."""


@pytest.mark.parametrize(
    ("transport", "processes"),
    [
        ("native", 4),
        ("gloo", 2),
        pytest.param("native", 2, marks=pytest.mark.long),
        pytest.param("gloo", 4, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("fault", [*FAULTS, "stop"])
def test_the_others_notice_and_name_peer_and_operation(
    zygote, job, tmp_path, fault, transport, processes
):
    command = ["run", job(fault), "--out", "out", "--transport", transport]
    children = zygote.start_ranks(tmp_path, command, processes)
    victim = children[1 * processes // 4]
    others = [child for child in children if child is not victim]
    failed = until(lambda: failed_at(tmp_path), 60, "step 3")
    for child in others:
        child.wait(BOUND_S + 30)
        assert child.ended - failed < BOUND_S, child.stderr
        assert child.status == 1, child.stderr
        assert "step " in child.stderr
        assert "process " in child.stderr
    heard = "".join(child.stderr for child in others)
    assert "neighbor_average" in heard
    assert f"({transport}" in heard
    index = children.index(victim)
    if fault in ("sleep", "stop"):
        assert f"no answer from process {index} within {TIMEOUT_S} s" in heard
        victim.kill()  # here nothing stands above it; launchers do this, see below
        assert victim.wait() == -signal.SIGKILL
    else:
        assert f"process {index} is gone" in heard
        assert victim.wait() == (1 if fault == "raise" else -signal.SIGKILL)
    if fault == "raise":
        assert "a lemon" in victim.stderr
        assert "faulty.py" in victim.stderr, "the traceback shows the user's line"


def test_a_rank_that_raises_in_one_process_ends_the_run(zygote, job, tmp_path):
    child = zygote.run(tmp_path, ["run", job("raise"), "--out", "out"])
    assert child.status == 1
    assert "a lemon" in child.stderr
    assert "faulty.py" in child.stderr


STARTS = {
    "gossamer": ["-m", "gossamer", "run", "run.yaml", "--processes", "2", "--transport", "gloo"],
    "torchrun": [
        *["-m", "torch.distributed.run", "--nproc-per-node", "2"],
        *["-m", "gossamer", "run", "run.yaml"],
    ],
    "mpirun": ["-n", "2", sys.executable, "-m", "gossamer", "run", "run.yaml"],
}


def start(launcher, folder):
    """Start a run of two processes under ``launcher``; return it with the marker of its family."""
    marker = uuid.uuid4().hex
    program = "mpirun" if launcher == "mpirun" else sys.executable
    with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as err:
        process = subprocess.Popen(
            [program, *STARTS[launcher], "--out", "out"],
            cwd=folder,
            env=environment(**{MARKER: marker}),
            stdout=out,
            stderr=err,
        )
    return process, marker


def ended(process, seconds, folder):
    until(lambda: process.poll() is not None, seconds, (folder / "stderr").read_text())
    return time.monotonic()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["gossamer", "torchrun", "mpirun"])
@pytest.mark.parametrize("fault", [*FAULTS, pytest.param("stop", marks=pytest.mark.long)])
def test_a_launched_job_ends_in_time_and_leaves_no_process(job, tmp_path, launcher, fault):
    job(fault, rank=2)  # of process 1
    begun = time.monotonic()
    process, marker = start(launcher, tmp_path)
    try:
        failed = until(lambda: failed_at(tmp_path), 120, "step 3")
        bound = BOUND_S + max(0, failed - begun - START_S)
        end = ended(process, bound + 60, tmp_path)
        err = (tmp_path / "stderr").read_text()
        assert end - failed < bound, err
        until(lambda: not alive(marker), failed + bound - end, lambda: alive(marker))
        # mpirun reports a signal's death as 128 + 9; all else is 1.
        assert process.returncode == (137 if (launcher, fault) == ("mpirun", "kill") else 1), err
        if fault == "raise":
            assert "a lemon" in err
        if fault in ("sleep", "stop"):
            assert f"no answer from process 1 within {TIMEOUT_S} s" in err.replace("[1]", "1")
            assert "neighbor_average" in err
        if fault == "kill" and launcher != "mpirun":
            assert "process 1 is gone" in err
            assert "neighbor_average" in err
        if fault == "kill" and launcher == "mpirun":
            assert "signal 9" in err
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["gossamer", "torchrun", "mpirun"])
def test_killing_the_command_leaves_no_process(job, tmp_path, launcher):
    job("slow", steps=100_000)
    process, marker = start(launcher, tmp_path)
    until(lambda: failed_at(tmp_path), 120, "step 3")
    assert len(alive(marker)) >= 3, "the command and its two processes"
    process.kill()
    process.wait()
    until(lambda: not alive(marker), BOUND_S, lambda: alive(marker))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number", "status"),
    [
        ("gossamer", signal.SIGTERM, 143),
        ("torchrun", signal.SIGTERM, 1),
        ("mpirun", signal.SIGUSR1, 143),  # SIGTERM to mpirun kills its ranks at once
    ],
)
def test_a_signal_to_the_command_saves_the_run(job, tmp_path, launcher, number, status):
    job("slow", steps=100_000)
    process, marker = start(launcher, tmp_path)
    until(lambda: failed_at(tmp_path), 120, "step 3")
    process.send_signal(number)
    ended(process, 60, tmp_path)
    assert process.returncode == status, (tmp_path / "stderr").read_text()
    assert Checkpoint.open(tmp_path / "out").meta["step"] > 3
    until(lambda: not alive(marker), BOUND_S, lambda: alive(marker))
