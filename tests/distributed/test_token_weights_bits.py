"""Documents of unequal length on real processes: one process's bits, and one rank's mean."""

import json

import pytest
import torch
import yaml
from test_same_bits import gossamer, run, torchrun

from gossamer.runtime.checkpoint import Checkpoint

MODULE = """
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from gossamer.algorithms.problems import Problem
from gossamer.algorithms.tasks.arrays import TensorDataset

LENGTHS = [6, 6, 5, 0, 1, 1, 0, 2]


class Next(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.output = nn.Embedding(7, 6), nn.Linear(6, 7)

    def forward(self, tokens):
        return self.output(torch.tanh(self.tokens(tokens)))


def loss(module, inputs):
    logits = module(inputs[0]).flatten(0, -2)
    return F.cross_entropy(logits, inputs[1].flatten(), ignore_index=-100)


def weigh(inputs):
    return float((inputs[1] != -100).sum())


def make(n, seed, uneven=True):
    torch.manual_seed(seed)
    tokens, targets = torch.randint(7, (2, 8, 6))
    targets[torch.arange(6) >= torch.tensor(LENGTHS)[:, None]] = -100
    shards = tuple(np.array_split(np.arange(8), n))
    data = TensorDataset((tokens, targets))
    options = {"weigh": weigh, "objective": "examples", "uneven": uneven}
    return Problem(Next(), data, shards, loss, **options)
"""
RUNS = {
    "whole": {"algorithm": {"name": "all-reduce"}},
    "per-layer": {"algorithm": {"name": "all-reduce", "per_layer": True}},
    "alike": {"task": {"name": "custom", "build": "documents:make", "options": {"uneven": False}}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    (folder / "documents.py").write_text(MODULE)
    for ranks in (1, 2):
        values = {
            "task": {"name": "custom", "build": "documents:make"},
            "oracle": {"name": "backprop", "sampling": "full"},
            "algorithm": {"name": "all-reduce"},
            "optimizer": {"name": "sgd", "lr": 0.5},
            "topology": {"name": "complete"},
            "ranks": ranks,
            "steps": 4,
            "timeout_s": 60,
            "compare": RUNS,
        }
        (folder / f"{ranks}.yaml").write_text(yaml.safe_dump(values))
    return folder


def outcome(command, folder, ranks, out, environment):
    """Return hash and bytes, and the final parameters, of each run."""
    environment = environment | {"PYTHONPATH": f"{folder}:{environment.get('PYTHONPATH', '')}"}
    run([*command, str(folder / f"{ranks}.yaml"), "--out", str(out)], environment)
    summaries = {name: json.loads((out / name / "summary.json").read_text()) for name in RUNS}
    digests = {k: (s["parameters_sha256"], s["bytes_sent"]) for k, s in summaries.items()}
    means = {name: Checkpoint.open(out / name).mean() for name in RUNS}
    return digests, {k: torch.cat([t.flatten() for t in m.values()]) for k, m in means.items()}


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "transport"), [(torchrun, "native"), (gossamer, "gloo")])
def test_two_processes_train_as_one_rank_with_all_documents(
    launcher, transport, folder, launch_environment, tmp_path
):
    stacked, _ = outcome(gossamer(1), folder, 2, tmp_path / "stacked", launch_environment)
    _, one = outcome(gossamer(1), folder, 1, tmp_path / "one", launch_environment)
    command = [*launcher(2), "--transport", transport]
    digests, two = outcome(command, folder, 2, tmp_path / "two", launch_environment)
    assert digests == stacked
    assert digests["whole"][0] == digests["per-layer"][0]
    assert relative(two["whole"], one["whole"]) <= 1e-5
    assert relative(two["alike"], one["alike"]) > 0.01  # nor could it be seen otherwise
