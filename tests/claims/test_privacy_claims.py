"""The reported epsilon against what canaries find out in one run."""

import json
import math
import sys

import pytest
import torch
import yaml

from gossamer.algorithms.decentralized.all_reduce import AllReduce
from gossamer.algorithms.optimizers.sgd import SGD
from gossamer.algorithms.oracles.backprop import Backprop
from gossamer.algorithms.privacy.audit import canaries, epsilon_at_least, guess
from gossamer.algorithms.privacy.dp import DP
from gossamer.algorithms.privacy.noise import SecretNoise
from gossamer.algorithms.program import TrainingProgram
from gossamer.launch.cli import main
from gossamer.runtime import Communicator, StackedTransport
from gossamer.runtime.component import validate
from gossamer.topologies import build

CANARIES, STEPS, EPSILON, DELTA, CLIP = 2000, 20, 2.0, 1e-5, 0.5


def audited(mode, seed):
    """Return (what is reported, what canaries bound it by) of a private run over four ranks."""
    included = torch.rand(CANARIES, generator=torch.Generator().manual_seed(seed)) < 0.5
    comm = Communicator(build("ring", 4), StackedTransport(), steps=STEPS)
    fields = {"epsilon": EPSILON, "delta": DELTA, "clip_norm": CLIP, "noise_mode": mode}
    oracle = validate(DP, {**fields, "inner": Backprop(sampling="full")}, "oracle")
    made = TrainingProgram(
        comm, canaries(included, 4, CLIP), oracle, AllReduce(optimizer=SGD(lr=1.0))
    ).start()
    for _ in range(STEPS):
        made.step()
        comm.step += 1
    said = oracle.statement()["privacy"]
    scores = -made.layout.values(made.state.x[0])
    return said["epsilon"], epsilon_at_least(guess(scores, included, CANARIES // 4), DELTA)


@pytest.mark.parametrize("mode", ["split", "rank0", "replicated"])
def test_canaries_do_not_find_more_than_the_reported_epsilon(mode):
    reported, found = audited(mode, seed=1)
    assert reported == pytest.approx(EPSILON, abs=0.01)
    assert 0.2 < found < reported  # the attack works, and finds no more


@pytest.mark.parametrize("mode", ["split", "rank0", "replicated"])
def test_canaries_find_out_noise_that_is_too_small(mode, monkeypatch):
    right = SecretNoise.scales
    monkeypatch.setattr(SecretNoise, "scales", lambda self, total: right(self, total / 8))
    reported, found = audited(mode, seed=1)
    assert reported == pytest.approx(EPSILON, abs=0.01)
    assert found > reported


def test_canaries_find_out_a_part_of_the_noise_where_all_of_it_is_due(monkeypatch):
    # Independent seeds with sigma C / n on each of n ranks: sigma C / sqrt(n) in the sum.
    ranks = 64
    right = SecretNoise.scales
    monkeypatch.setattr(
        SecretNoise, "scales", lambda self, total: right(self, total / math.sqrt(ranks))
    )
    reported, found = audited("split", seed=2)
    assert found > reported


def analyzed(tmp_path, monkeypatch, capsys, **changed):
    """Return (status, what ``gossamer analyze audit`` prints) for a run of two ranks."""
    values = {
        "task": {"name": "digits"},
        "oracle": [
            {"name": "backprop", "batch_size": 100},
            {"name": "dp", "epsilon": 2.0, "accountant": "rdp"},
        ],
        "optimizer": {"name": "sgd", "lr": 1.0},
        "algorithm": {"name": "all-reduce"},
        "ranks": 2,
        "steps": 20,
        **changed,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    argv = ["gossamer", "analyze", "audit", str(tmp_path / "run.yaml"), "--json"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as done:
        main()
    return done.value.code, capsys.readouterr()


def test_the_command_audits_a_files_oracle(tmp_path, monkeypatch, capsys):
    status, printed = analyzed(tmp_path, monkeypatch, capsys)
    assert status in (0, None)
    found = json.loads(printed.out)
    assert 0 <= found["found"] < found["reported"] == pytest.approx(2.0, abs=0.02)
    assert (found["guesses"]["canaries"], found["guesses"]["made"]) == (2000, 500)
    right = SecretNoise.scales
    monkeypatch.setattr(SecretNoise, "scales", lambda self, total: right(self, total / 20))
    status, printed = analyzed(tmp_path, monkeypatch, capsys)
    assert status == 1
    assert json.loads(printed.out)["found"] > 2.0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"oracle": {"name": "backprop"}}, "holds no dp"),
        ({"algorithm": {"name": "dsgd"}}, "algorithm.name=all-reduce"),
    ],
)
def test_the_command_refuses_what_it_cannot_audit(changed, message, tmp_path, monkeypatch, capsys):
    status, printed = analyzed(tmp_path, monkeypatch, capsys, **changed)
    assert status == 2
    assert message in printed.err
