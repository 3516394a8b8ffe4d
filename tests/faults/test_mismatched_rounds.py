"""Processes that disagree about the round: RoundMismatch on every one, before anything is mixed."""

import pytest
from harness import write_yaml

MODULE = """
import os

RING = [[0, 1], [1, 0], [1, 2], [2, 1], [2, 3], [3, 2], [3, 0], [0, 3]]
STAR = [[0, 1], [1, 0], [0, 2], [2, 0], [0, 3], [3, 0]]


def from_the_start(t):
    return RING if os.environ.get("RANK", "0") == "0" else STAR


def later(t):
    return STAR if t == 20 and os.environ.get("RANK") == "1" else RING


def alike(t):
    return STAR if t == 20 else RING
"""


@pytest.mark.parametrize(
    ("function", "words"),
    [("from_the_start", ["different topologies"]), ("later", ["different rounds t=20"])],
)
def test_a_round_that_differs_between_processes_stops_all_of_them(
    zygote, tmp_path, function, words
):
    (tmp_path / "rounds.py").write_text(MODULE)
    topology = {"name": "custom", "edges": f"rounds:{function}"}
    write_yaml(tmp_path / "run.yaml", topology=topology, timeout_s=5, steps=40)
    children = zygote.start_ranks(tmp_path, ["run", "run.yaml", "--out", "out"], 2)
    for process, child in enumerate(children):
        assert child.wait() == 1, child.stderr
        assert f"gossamer: process {process}: topology: the processes hold" in child.stderr
        for word in words:
            assert word in child.stderr
        assert "Traceback" not in child.stderr
    assert not (tmp_path / "out" / "summary.json").exists()


def test_the_same_function_of_t_runs_on_all_processes(zygote, tmp_path):
    (tmp_path / "rounds.py").write_text(MODULE)
    topology = {"name": "custom", "edges": "rounds:alike"}
    write_yaml(tmp_path / "run.yaml", topology=topology, timeout_s=20, steps=25)
    children = zygote.start_ranks(tmp_path, ["run", "run.yaml", "--out", "out"], 2)
    assert [child.wait() for child in children] == [0, 0], children[0].stderr


def test_processes_that_never_meet_end_in_time_and_say_so(zygote, tmp_path):
    write_yaml(tmp_path / "run.yaml", timeout_s=2)
    store = tmp_path / "store"
    child = zygote.run(
        tmp_path,
        ["run", "run.yaml", "--out", "out"],
        RANK=0,
        LOCAL_RANK=0,
        WORLD_SIZE=2,
        GOSSAMER_RENDEZVOUS=f"file://{store}",
    )
    assert child.status == 1, child.stderr
    assert "the 2 processes did not all meet within 2 s" in child.stderr
    assert "Traceback" not in child.stderr


# --- what only some processes find wrong ------------------------------------------------------

MINE = """
import os

from gossamer.algorithms.decentralized.dsgd import DSGD
from gossamer.runtime.errors import ConfigError

FAULT = os.environ.get("FAULT")
if os.environ["RANK"] == "1" and FAULT == "import":
    1 / 0


class Mine(DSGD):
    name: str = "mine"

    def init(self, comm, oracle, x, batches):
        comm.all_reduce(x, "mean")
        return super().init(comm, oracle, x, batches)

    def step(self, comm, oracle, state, batches):
        if os.environ["RANK"] == "1" and FAULT == "step" and comm.step == 5:
            raise ConfigError("mine.field: found wrong too late")
        return super().step(comm, oracle, state, batches)


def problem(n, seed):
    if os.environ["RANK"] == "1":
        return "no problem"
    from gossamer.algorithms.tasks.bundled import Wine

    return Wine(model="linear").build(n, seed)
"""


@pytest.mark.parametrize(
    ("fault", "words"),
    [("import", ["algorithm.name", "ZeroDivisionError"]), ("task", ["task.build", "str"])],
)
def test_what_process_1_alone_finds_wrong_is_said_by_process_0(zygote, tmp_path, fault, words):
    (tmp_path / "mine.py").write_text(MINE)
    changes = {"task": {"name": "custom", "build": "mine:problem"}} if fault == "task" else {}
    write_yaml(tmp_path / "run.yaml", algorithm={"name": "mine:Mine"}, timeout_s=20, **changes)
    command = ["run", "run.yaml", "--out", "out"]
    children = zygote.start_ranks(tmp_path, command, 2, FAULT=fault)
    assert [child.wait() for child in children] == [2, 2], children[0].stderr
    assert children[0].stderr.count("gossamer: error:") == 1
    for word in [*words, "(on process 1)"]:
        assert word in children[0].stderr
    assert children[1].stderr == ""


def test_a_configuration_error_of_one_process_after_training_began_is_a_failure(zygote, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    write_yaml(tmp_path / "run.yaml", algorithm={"name": "mine:Mine"}, timeout_s=20)
    command = ["run", "run.yaml", "--out", "out"]
    children = zygote.start_ranks(tmp_path, command, 2, FAULT="step")
    assert [child.wait() for child in children] == [1, 1], children[0].stderr
    assert "gossamer: process 1: mine.field: found wrong too late" in children[1].stderr
    assert "gossamer: process 0: " in children[0].stderr
    assert "Traceback" not in children[0].stderr + children[1].stderr


def test_processes_that_were_given_different_settings_refuse_to_run(zygote, tmp_path):
    write_yaml(tmp_path / "run.yaml", timeout_s=20)
    store = tmp_path / "store"
    children = [
        zygote.start(
            tmp_path,
            ["run", "run.yaml", "--out", "out", "-s", f"optimizer.lr=0.{p + 1}"],
            RANK=p,
            LOCAL_RANK=p,
            WORLD_SIZE=2,
            GOSSAMER_RENDEZVOUS=f"file://{store}",
        )
        for p in range(2)
    ]
    assert [child.wait() for child in children] == [2, 2], children[0].stderr
    assert "process 1 holds another than process 0: optimizer differ" in children[0].stderr
    assert children[1].stderr == ""
    assert not (tmp_path / "out").exists()
