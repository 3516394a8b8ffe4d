"""Backend gossamer of torch.distributed, under torchrun, beside gloo in the same processes."""

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from gossamer.runtime import CommError
from gossamer.runtime.process_group import group

WORKER = Path(__file__).with_name("process_group_worker.py")


def torchrun(ranks, script, environment, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_collective_gives_what_gloo_gives(ranks, launch_environment):
    done = torchrun(ranks, WORKER, launch_environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split()[-1] == "check_gossip_hook"


LEAVES = """
import os, sys, torch, torch.distributed as dist
from datetime import timedelta
dist.init_process_group("gossamer", timeout=timedelta(seconds=60))
store = dist.distributed_c10d._get_default_store()
x = torch.ones(100_000)
dist.all_reduce(x)
if dist.get_rank() == 1:
    if sys.argv[1] == "dies":
        os._exit(0)
    store.wait(["told"])  # alive, in no call
else:
    dist.group.WORLD.set_timeout(timedelta(seconds=int(sys.argv[2])))
    calls = {
        "all_reduce": lambda: dist.all_reduce(x),
        "recv": lambda: dist.recv(x, 1),
        "backward": lambda: dist.all_reduce(x, async_op=True).get_future().wait(),
    }
    for name, call in calls.items():
        try:
            call()
        except RuntimeError as error:
            print(name, type(error).__name__, error, flush=True)
    store.set("told", "")
os._exit(0)
"""


@pytest.mark.parametrize(
    ("ending", "timeout_s", "error", "reason"),
    [
        ("dies", 60, "PeerLost", "process 1 is gone"),
        ("hangs", 1, "CommTimeout", "no answer from process 1 within 1 s"),
    ],
)
def test_a_lost_peer_is_named(ending, timeout_s, error, reason, tmp_path, launch_environment):
    script = tmp_path / "leaves.py"
    script.write_text(LEAVES)
    done = torchrun(2, script, launch_environment, ending, str(timeout_s))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"all_reduce {error} all_reduce (call 2): {reason}" in done.stdout, done.stdout
    assert f"recv {error} recv from rank 1: {reason}" in done.stdout, done.stdout
    assert reason in done.stdout.split("backward RuntimeError")[1], done.stdout


def test_ranks_of_several_hosts_are_refused(monkeypatch):
    monkeypatch.setattr(group, "hosts_of", lambda gather: [[0], [1]])
    with pytest.raises(CommError, match="the 2 of this group are on 2; use gloo or nccl"):
        group.GossamerGroup(dist.HashStore(), 0, 2, timedelta(seconds=1), [0, 1])


def test_a_rank_that_never_comes_is_not_waited_for_longer_than_the_timeout():
    with pytest.raises(CommError, match=r"the 2 processes did not all meet within 0.1 s"):
        group.GossamerGroup(dist.HashStore(), 0, 2, timedelta(seconds=0.1), [0, 1])
