"""Processes whose modules differ: no step is made, and all say which ranks and which tensor."""

import json

import pytest
from harness import write_yaml

MODULE = """
import os

import torch
import torch.nn.functional as F
from torch import nn

from gossamer.algorithms.problems import Problem
from gossamer.algorithms.tasks.arrays import TensorDataset


class Sparse(nn.Module):
    def __init__(self, places):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(2))
        self.places = places

    def fixed_tensors(self):
        return {"places": self.places}

    def forward(self, h):
        return h.index_add(1, self.places, self.values.expand(len(h), -1))


def loss(module, inputs):
    return F.cross_entropy(module(inputs[0]), inputs[1])


def make(n, seed, differs="nothing"):
    torch.manual_seed(seed)
    odd = int(os.environ.get("RANK", "0")) == 1
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), Sparse(torch.tensor([0, 2])))
    module[0].bias.requires_grad_(False)
    with torch.no_grad():
        if odd and differs == "0.weight":
            module[0].weight[2, 3] += 1.0
        if odd and differs == "0.bias":
            module[0].bias[1] += 1.0
        if odd and differs == "1.num_batches_tracked":
            module[1].num_batches_tracked += 1
        if odd and differs == "2.places":
            module[2].places += torch.tensor([0, -1])
    data = TensorDataset((torch.randn(16, 4), torch.randint(3, (16,))))
    shards = tuple(torch.arange(16).reshape(n, -1).numpy())
    return Problem(module, data, shards, loss)
"""


def write(folder, differs, **changes):
    (folder / "odd_task.py").write_text(MODULE)
    options = {"differs": differs}
    task = {"name": "custom", "build": "odd_task:make", "options": options}
    values = {"task": task, "ranks": 4, "timeout_s": 20, "steps": 6, "checkpoint_every": 3}
    return write_yaml(folder / "run.yaml", **{**values, **changes})


@pytest.mark.parametrize("transport", ["native", "gloo"])
@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.num_batches_tracked", "2.places"])
def test_a_module_that_differs_is_refused_before_the_first_step(zygote, tmp_path, name, transport):
    command = ["run", write(tmp_path, name), "--out", "out", "--transport", transport]
    children = zygote.start_ranks(tmp_path, command, 2)
    for child in children:
        assert child.wait(90) == 1, child.stderr
    said = "".join(child.stderr for child in children)  # a launcher may end one before it speaks
    assert f"start: ranks [2, 3] hold another '{name}' than rank 0" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def run(zygote, folder, *argv):
    command = ["run", *argv, "--transport", "gloo"]
    for child in zygote.start_ranks(folder, command, 2):
        assert child.wait(90) == 0, child.stderr
    return json.loads((folder / "out" / "summary.json").read_text())


def test_equal_modules_run_and_the_summary_has_the_hash_of_what_is_not_trained(zygote, tmp_path):
    summary = run(zygote, tmp_path, write(tmp_path, "nothing"), "--out", "out")
    assert len(summary["fixed_sha256"]) == 64
    out = tmp_path / "out"
    (out / "summary.json").unlink()
    (out / "checkpoints" / "step-000000006").rename(tmp_path / "gone")
    text = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(text.replace("differs: nothing", "differs: 0.weight"))
    resumed = run(zygote, tmp_path, "--resume", "out")  # its rows come from the checkpoint
    assert resumed["parameters_sha256"] == summary["parameters_sha256"]


def test_a_checkpoint_of_other_supports_is_refused(zygote, tmp_path):
    run(zygote, tmp_path, write(tmp_path, "nothing"), "--out", "out")
    (tmp_path / "out" / "summary.json").unlink()
    (tmp_path / "out" / "checkpoints" / "step-000000006").rename(tmp_path / "gone")
    (tmp_path / "odd_task.py").write_text(MODULE.replace("[0, 2]", "[0, 1]"))
    child = zygote.run(tmp_path, ["run", "--resume", "out"])
    assert child.status == 2, child.stderr
    assert "beside other tensors that are not trained" in child.stderr
