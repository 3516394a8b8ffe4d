"""A rank that dies while parameters are updated one by one: the others say who, and in what."""

import signal

import pytest
from harness import DIGITS, write_yaml

MODULE = '''
import os
import signal

from gossamer.algorithms.optimizers.sgd import SGD


class Dying(SGD):
    """SGD that is killed on rank 1, in the middle of the fourth backward pass."""

    def update_(self, state, x, grad, comm, origin):
        if comm.step == 3 and 1 in comm.ranks and self._columns.start > 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().update_(state, x, grad, comm, origin)
'''


@pytest.mark.parametrize("transport", ["native", "gloo"])
def test_a_rank_that_dies_during_backward_is_named_with_the_operation(zygote, tmp_path, transport):
    (tmp_path / "dying.py").write_text(MODULE)
    values = {
        "task": {**DIGITS["task"], "model": "mlp", "hidden": [4]},
        "algorithm": {"name": "all-reduce", "per_layer": True},
        "optimizer": {"name": "dying:Dying", "lr": 0.1},
        "ranks": 2,
        "timeout_s": 20,
    }
    path = write_yaml(tmp_path / "run.yaml", **values)
    command = ["run", path, "--out", "out", "--transport", transport]
    survivor, victim = zygote.start_ranks(tmp_path, command, 2)
    assert victim.wait(90) == -signal.SIGKILL
    assert survivor.wait(90) == 1, survivor.stderr
    assert "step 3: all_reduce" in survivor.stderr
    assert "process 1 is gone" in survivor.stderr
    assert "Traceback" not in survivor.stderr
