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
    topology = {"name": "custom", "edges": "rounds:later"}
    write_yaml(tmp_path / "run.yaml", topology=topology, timeout_s=20, steps=15)
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
