"""Updates parameter by parameter: the bits of whole gradients, on every transport."""

import functools
import json
import os

import pytest
import yaml
from test_same_bits import gossamer, mpirun, run, torchrun

MODULE = '''
import torch
from torch import nn

from gossamer.algorithms.problems import Problem
from gossamer.algorithms.tasks.language import Windows, count_next_tokens, next_token_loss
from gossamer.algorithms.tasks.transformer import Transformer


class WithIdle(nn.Module):
    """A tied transformer, and a layer that gets no gradient."""

    def __init__(self):
        super().__init__()
        self.model = Transformer(vocabulary=32, context=8, layers=1, width=16, heads=2, tied=True)
        self.idle = nn.Linear(3, 3)

    def forward(self, tokens):
        return self.model(tokens)


def make(n, seed):
    torch.manual_seed(seed)
    data = Windows(torch.randint(32, (8 * 20 * n + 1,)), 8)
    shards = tuple(torch.arange(len(data)).numpy().reshape(n, -1))
    return Problem(WithIdle(), data, shards, next_token_loss, weigh=count_next_tokens)
'''
OPTIMIZERS = {
    "sgd": {"lr": 0.3},
    "momentum": {"lr": 0.1},
    "adam": {"lr": 0.01},
    "adamw": {"lr": 0.01},
}


def runs(per_layer):
    made = {}
    for name, options in OPTIMIZERS.items():
        for micro in (None, 3):
            oracle = {"name": "backprop", "batch_size": 5, "micro_batch_size": micro}
            algorithm = {"name": "all-reduce", "per_layer": per_layer}
            optimizer = {"name": name, **options}
            made[f"{name}-{micro or 'whole'}"] = {
                "oracle": {k: v for k, v in oracle.items() if v is not None},
                "algorithm": algorithm,
                "optimizer": optimizer,
            }
    return made


def write(folder, per_layer, ranks):
    """All runs in one file, so that processes start once per transport."""
    values = {
        "task": {"name": "custom", "build": "idle_task:make"},
        "algorithm": {"name": "all-reduce"},
        "topology": {"name": "complete"},
        "ranks": ranks,
        "steps": 4,
        "timeout_s": 60,
        "evaluate_examples": 4,
        "compare": runs(per_layer),
    }
    path = folder / f"{ranks}-{per_layer}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers")
    (folder / "idle_task.py").write_text(MODULE)
    return folder


def outcome(out):
    found = {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/summary.json")}
    assert set(found) == set(runs(True))
    return {name: summary["parameters_sha256"] for name, summary in found.items()}, found


def go(command, path, out, environment):
    path_to_task = f"{path.parent}:{environment.get('PYTHONPATH', '')}"
    run([*command, str(path), "--out", str(out)], environment | {"PYTHONPATH": path_to_task})
    return outcome(out)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """Return a function: ranks -> what one process computes from whole gradients."""

    @functools.cache
    def of(ranks):
        out = tmp_path_factory.mktemp("whole") / "out"
        return go(gossamer(1), write(folder, False, ranks), out, dict(os.environ))

    return of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "ranks", "processes", "transport"),
    [
        (torchrun, 2, 2, "native"),
        (gossamer, 2, 2, "gloo"),
        (mpirun, 2, 2, "mpi"),
        pytest.param(gossamer, 3, 2, "native", id="two-ranks-in-one-process"),
    ],
)
def test_every_transport_gives_the_bits_of_whole_gradients(
    launcher, ranks, processes, transport, folder, whole, launch_environment, tmp_path
):
    expected, before = whole(ranks)
    command = [*launcher(processes), "--transport", transport]
    got, after = go(command, write(folder, True, ranks), tmp_path / "out", launch_environment)
    assert got == expected
    assert len(set(got.values())) == len(got)  # every run went its own way
    for name, summary in after.items():
        assert (summary["transport"], summary["processes"]) == (transport, processes)
        assert summary["bytes_sent"] <= before[name]["bytes_sent"]  # no padding
        assert summary["grad_norm"] is None
        assert before[name]["grad_norm"] > 0
