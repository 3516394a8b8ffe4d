"""SIGKILL at random instants: the resumed run ends bit-equal to the undisturbed one."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from harness import until, write_yaml

from gossamer.runtime.checkpoint import Checkpoint, latest

MEETING_S = 8
"""While two meet, each step of it waits that long for one that was killed."""

TIMES = ("seconds", "seconds_compute", "seconds_communicate", "examples_per_second")
STEPS = 24
RUN = {"steps": STEPS, "log_every": 4, "checkpoint_every": 2, "timeout_s": 30, "seed": 5}


def outcome(folder):
    """Return the hash of the parameters and the metrics without times."""
    summary = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figures = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    return summary["parameters_sha256"], figures, summary["bytes_sent"]


@pytest.fixture(scope="module")
def undisturbed(zygote, tmp_path_factory):
    """Run to the end twice; return (outcome, seconds until the summary)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_yaml(folder / "run.yaml", **RUN)
    assert zygote.run(folder, ["run", "run.yaml", "--out", "warm"]).status == 0
    child = zygote.start(folder, ["run", "run.yaml", "--out", "out"])
    until(lambda: (folder / "out" / "summary.json").exists(), 120, "the summary")
    seconds = time.monotonic() - child.started
    assert child.wait() == 0
    assert outcome(folder / "out") == outcome(folder / "warm")
    return outcome(folder / "out"), seconds


def newest(folder):
    """Return the step of the newest checkpoint, 0 for none."""
    found = latest(folder)
    return int(found.name.removeprefix("step-")) if found else 0


def kill_after(child, seconds):
    """Kill a process that many seconds after its start, unless it has ended by itself."""
    with contextlib.suppress(AssertionError):
        until(lambda: child.poll() is not None, child.started + seconds - time.monotonic(), "")
    child.kill()


def finish(zygote, folder, *options):
    """Resume until done; a run that was killed before it had a folder is started again."""
    out = folder / "out"
    if (out / "summary.json").exists():
        return "finished"
    if not (out / "config.yaml").exists():
        shutil.rmtree(out, ignore_errors=True)
        child = zygote.run(folder, ["run", "run.yaml", "--out", "out", *options])
        assert child.status == 0, child.stderr
        return "restarted"
    complete = latest(out / "checkpoints")
    if complete is not None:
        Checkpoint.open(complete)
    child = zygote.run(folder, ["run", "--resume", "out", *options])
    assert child.status == 0, child.stderr
    return "no checkpoint" if complete is None else "resumed"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_killed_at_twenty_instants_ends_as_if_it_had_not_been(zygote, undisturbed, tmp_path):
    expected, seconds = undisturbed
    draw = np.random.default_rng(20261121).uniform
    # Half of them late: until the first checkpoint a run mostly starts.
    instants = np.concatenate([draw(0.0, 1.0, 10), draw(0.5, 1.0, 10)]) * seconds
    seen = []
    for k, instant in enumerate(instants):
        folder = tmp_path / f"{k}"
        folder.mkdir()
        write_yaml(folder / "run.yaml", **RUN)
        child = zygote.start(folder, ["run", "run.yaml", "--out", "out"])
        kill_after(child, instant)
        child.wait()
        seen.append(finish(zygote, folder))
        assert outcome(folder / "out") == expected, (k, instant, seen[-1])
        leftovers = list((folder / "out").rglob("*.partial"))
        assert not [p for p in leftovers if "checkpoints" in str(p)], leftovers
    assert seen.count("resumed") >= 5, seen


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(zygote, undisturbed, tmp_path):
    expected, _ = undisturbed
    write_yaml(tmp_path / "run.yaml", **RUN)
    argv = ["run", "run.yaml", "--out", "out"]
    checkpoints = tmp_path / "out" / "checkpoints"
    for step in (3, 7, 12, 19, STEPS):
        child = zygote.start(tmp_path, argv)
        until(lambda s=step: newest(checkpoints) >= s, 60, lambda c=child: c.stderr)
        child.kill()
        child.wait()
        argv = ["run", "--resume", "out"]
    finish(zygote, tmp_path)
    assert outcome(tmp_path / "out") == expected


@pytest.mark.slow
def test_two_processes_killed_end_as_if_they_had_not_been(zygote, undisturbed, tmp_path):
    expected, seconds = undisturbed
    for k, fraction in enumerate(np.random.default_rng(7).uniform(0.2, 1.0, 4)):
        folder = tmp_path / f"{k}"
        folder.mkdir()
        write_yaml(folder / "run.yaml", **RUN | {"timeout_s": MEETING_S})
        children = zygote.start_ranks(folder, ["run", "run.yaml", "--out", "out"], 2)
        kill_after(children[k % 2], seconds * fraction)  # the other one loses its peer
        for child in children:
            child.wait(10 * MEETING_S)
        # What one process wrote, another number of processes continues.
        finish(zygote, folder)
        assert outcome(folder / "out") == expected, (k, fraction)


# --- SIGTERM ----------------------------------------------------------------------------------


def start(zygote, folder, argv, processes):
    """Start a run of one process (stacked) or of several (gloo)."""
    if processes == 1:
        return [zygote.start(folder, argv)]
    return zygote.start_ranks(folder, argv, processes)


def stopped(zygote, folder, count):
    """Send SIGTERM to one process of a run in progress; return all of them, ended."""
    argv = ["run", "run.yaml", "--out", "out"]
    children = start(zygote, folder, argv, count)
    metrics = folder / "out" / "metrics.jsonl"
    until(lambda: metrics.exists() and metrics.read_text().count("\n") > 1, 60, "two records")
    children[-1].kill(signal.SIGTERM)  # any of them will do
    for child in children:
        child.wait()
    return children


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_and_the_resumed_run_ends_bit_equal(zygote, tmp_path, processes):
    long = RUN | {"steps": 3000, "checkpoint_every": 0, "log_every": 100}
    write_yaml(tmp_path / "run.yaml", **long)
    children = stopped(zygote, tmp_path, processes)
    assert [child.status for child in children] == [143] * processes, children[0].stderr
    assert children[0].stderr.count("told to stop after step") == 1
    assert all("told to stop" not in child.stderr for child in children[1:])
    assert not (tmp_path / "out" / "summary.json").exists()
    step = Checkpoint.open(tmp_path / "out").meta["step"]
    assert 100 <= step < 3000
    end = step + 50
    resumed = zygote.run(tmp_path, ["run", "--resume", "out", "-s", f"steps={end}"])
    assert resumed.status == 0, resumed.stderr
    whole = ["run", "run.yaml", "--out", "whole", "-s", f"steps={end}"]
    assert zygote.run(tmp_path, whole).status == 0
    assert outcome(tmp_path / "out")[0] == outcome(tmp_path / "whole")[0]


# --- a full disk ------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of 512 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


DISK = {
    "task": {"name": "wine", "model": "mlp", "hidden": [512]},
    "steps": 40,
    "checkpoint_every": 2,
    "keep_checkpoints": 1,
}


def check_failed_checkpoint(children, out):
    assert [child.status for child in children] == [1] * len(children), children[0].stderr
    for child in children:
        assert "checkpoint of step" in child.stderr, child.stderr
        assert "--resume" in child.stderr
        assert "Traceback" not in child.stderr
    assert not list((out / "checkpoints").glob(".*")), "a partial checkpoint was left"
    return Checkpoint.open(out).meta["step"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_leaves_the_earlier_checkpoints_and_no_partial_one(
    zygote, small_disk, tmp_path, processes
):
    write_yaml(tmp_path / "run.yaml", **DISK)
    argv = ["run", "run.yaml", "--out", "disk/out"]
    ballast = small_disk / "ballast"
    children = start(zygote, tmp_path, argv, processes)
    out = small_disk / "out"
    until(lambda: latest(out / "checkpoints"), 60, lambda: children[0].stderr)
    for child in children:
        child.kill(signal.SIGSTOP)
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:  # leave 48 KiB: metrics fit, a checkpoint does not
            file.write(bytes(4096))
    os.truncate(ballast, max(0, ballast.stat().st_size - 48 * 1024))
    for child in children:
        child.kill(signal.SIGCONT)
    for child in children:
        child.wait()
    step = check_failed_checkpoint(children, out)
    assert "No space left" in children[0].stderr
    ballast.unlink()
    resumed = zygote.run(tmp_path, ["run", "--resume", "disk/out"])
    assert resumed.status == 0, resumed.stderr
    whole = zygote.run(tmp_path, ["run", "run.yaml", "--out", "whole"])
    assert whole.status == 0
    assert 2 <= step < 40
    assert outcome(out) == outcome(tmp_path / "whole")


def test_a_file_size_limit_is_a_failed_checkpoint_and_not_a_crash(zygote, tmp_path):
    write_yaml(tmp_path / "run.yaml", **DISK)
    assert zygote.run(tmp_path, ["run", "run.yaml", "--out", "out", "-s", "steps=4"]).status == 0
    child = zygote.run(tmp_path, ["run", "--resume", "out", "-s", "steps=40"], limit_bytes=40_000)
    assert check_failed_checkpoint([child], tmp_path / "out") == 4
    assert "File too large" in child.stderr
    assert zygote.run(tmp_path, ["run", "--resume", "out", "-s", "steps=40"]).status == 0
