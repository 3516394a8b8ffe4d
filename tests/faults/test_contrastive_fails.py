"""A rank that dies or hangs while embeddings cross: the others say who, and in what."""

import signal

import pytest
from harness import write_yaml

MODULE = '''
import os
import signal
import time

from gossamer.algorithms.contrastive.contrastive import Contrastive


class Dying(Contrastive):
    """An oracle that fails on rank 1 at step 6, before it does its part of an exchange."""

    before: str = ""
    fault: str = "kill"
    name: str = "dying"

    def _fail(self, before):
        if before == self.before and self._comm.step == 6 and 1 in self._comm.ranks:
            if self.fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            while True:
                time.sleep(3600)

    def _compared(self, batch, z):
        self._fail("all_gather")
        return super()._compared(batch, z)

    def _held(self, keys):
        self._fail("all_to_all_ragged")
        return super()._held(keys)

    def setup(self, comm, problem):
        plan = super().setup(comm, problem)
        scatter = self._exchange.scatter

        def failing(grads, shape):
            self._fail("reduce_scatter")
            return scatter(grads, shape)

        self._exchange.scatter = failing
        return plan
'''


@pytest.mark.parametrize(
    ("before", "fault", "transport"),
    [
        ("all_gather", "kill", "native"),
        ("all_to_all_ragged", "kill", "native"),
        ("reduce_scatter", "kill", "gloo"),
        ("all_to_all_ragged", "hang", "gloo"),
    ],
)
def test_a_rank_that_fails_in_an_exchange_is_named_with_it(
    zygote, tmp_path, before, fault, transport
):
    (tmp_path / "dying.py").write_text(MODULE)
    values = {
        "task": {
            "name": "contrastive",
            "examples": 24,
            "encoder": {"name": "mlp", "hidden": [8], "dim": 4},
            "probe_examples": 8,
        },
        "oracle": {
            "name": "dying:Dying",
            "before": before,
            "fault": fault,
            "batch_size": 3,
            "loss": {"name": "emc2", "score": "fresh"},
        },
        "algorithm": {"name": "all-reduce"},
        "ranks": 2,
        "timeout_s": 4 if fault == "hang" else 20,
    }
    path = write_yaml(tmp_path / "run.yaml", **values)
    command = ["run", path, "--out", "out", "--transport", transport]
    survivor, victim = zygote.start_ranks(tmp_path, command, 2)
    assert survivor.wait(90) == 1, survivor.stderr
    assert f"step 6: {before}" in survivor.stderr
    said = "process 1 is gone" if fault == "kill" else "no answer from process 1 within 4 s"
    assert said in survivor.stderr
    assert "Traceback" not in survivor.stderr
    if fault == "hang":
        victim.kill()
    assert victim.wait(90) == -signal.SIGKILL
