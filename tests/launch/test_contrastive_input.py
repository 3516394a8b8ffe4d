"""Contrastive runs that cannot be: status 2 and one message with field, value and fix."""

import pytest

TASK = {"name": "contrastive", "examples": 40, "encoder": {"name": "mlp", "hidden": [8], "dim": 4}}


def values(task=(), oracle=(), **changes):
    return {
        "task": {**TASK, **dict(task)},
        "oracle": oracle if isinstance(oracle, list) else contrastive(**dict(oracle)),
        "optimizer": {"name": "sgd", "lr": 0.1},
        "algorithm": {"name": "all-reduce"},
        "ranks": 4,
        "steps": 2,
        **changes,
    }


def contrastive(**fields):
    return {"name": "contrastive", "batch_size": 4, **fields}


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("emc", ["oracle.loss", "'emc'", "emc2"]),
        ("simclrr", ["oracle.loss", "'simclrr'", "simclr"]),
        ({"name": "sogcl"}, ["oracle.loss", "'sogcl'", "sogclr"]),
        ({"beta": 5}, ["oracle.loss", "name"]),
        ({"name": "emc2", "burnin": 0.5}, ["oracle.loss.burnin", "'burn_in'"]),
        ({"name": "emc2", "burn_in": 1.0}, ["oracle.loss.burn_in", "1.0"]),
        ({"name": "emc2", "beta": 0}, ["oracle.loss.beta", "0"]),
        ({"name": "emc2", "beta": float("inf")}, ["oracle.loss.beta"]),
        ({"name": "emc2", "score": "old"}, ["oracle.loss.score", "old", "fresh"]),
        ({"name": "simclr", "gamma": 0.5}, ["oracle.loss.gamma", "unknown"]),
        ({"name": "sogclr", "gamma": 0}, ["oracle.loss.gamma", "0"]),
        ({"name": "isogclr", "tau_min": 0.8}, ["oracle.loss.tau_max", "tau_min", "0.8"]),
        ({"name": "moco", "queue": 31}, ["oracle.loss.queue", "32 keys", "31"]),
        ({"name": "negcache", "refresh": 2}, ["oracle.loss.refresh", "2"]),
    ],
    ids=str,
)
def test_losses_that_cannot_be_are_named(refused, loss, words):
    refused(values(oracle={"loss": loss}), words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"oracle": {"batch_size": 1}, "ranks": 1},
            ["oracle.batch_size", "1 example", "2 or more"],
        ),
        ({"oracle": {"batch_size": 11}}, ["oracle.batch_size", "11", "at most 10"]),
        ({"oracle": {"batch_size": 0}}, ["oracle.batch_size", "0"]),
        ({"oracle": {"shards": 6}}, ["oracle.shards", "4 ranks", "got 6", "use 4"]),
        ({"oracle": {"shards": 32}}, ["oracle.shards", "16 examples", "got 32"]),
        ({"oracle": {"shards": 2}}, ["oracle.shards", "4 ranks", "got 2"]),
        (
            {"oracle": {"sampling": "full"}, "task": {"examples": 41}},
            ["oracle.sampling", "full", "drop_remainder"],
        ),
        ({"oracle": {"sampling": "poisson"}}, ["oracle.sampling", "poisson"]),
        ({"oracle": {"negatives": "near"}}, ["oracle.negatives", "near"]),
        ({"task": {"examples": 3}}, ["ranks: 4", "3 training examples"]),
        ({"task": {"examples": 1}}, ["task.examples", "1"]),
    ],
    ids=str,
)
def test_batches_that_cannot_be_are_named(refused, changes, words):
    refused(values(**changes), words)


@pytest.mark.parametrize("loss", ["negcache", "full", {"name": "moco", "queue": 64}])
def test_losses_that_look_beyond_the_neighbours_are_refused_with_them(refused, loss):
    oracle = {"loss": loss, "negatives": "neighbors"}
    name = loss if isinstance(loss, str) else loss["name"]
    refused(values(oracle=oracle), ["oracle.negatives", name, "all ranks", "use all"])


def test_backprop_has_no_loss_of_single_views(refused):
    backprop = [{"name": "backprop", "batch_size": 4}]
    refused(values(oracle=backprop), ["oracle", "backprop", "use oracle: contrastive"])


def test_other_tasks_show_no_views(refused):
    task = {"name": "wine", "model": "linear"}
    refused({**values(), "task": task}, ["oracle", "two views", "task: contrastive"])


def test_privacy_of_single_examples_is_refused_around_it(refused):
    dp = {"name": "dp", "noise_multiplier": 1.0}
    refused(values(oracle=[contrastive(), dp]), ["contrastive", "gradients of single examples"])


def test_zeroth_order_is_no_layer_around_it(refused):
    layers = [contrastive(), {"name": "zeroth-order", "batch_size": 4}]
    refused(values(oracle=layers), ["zeroth-order"])
    refused(values(oracle=layers[1:]), ["oracle", "use oracle: contrastive"])


def test_per_layer_updates_would_save_nothing(refused):
    algorithm = {"name": "all-reduce", "per_layer": True}
    refused(values(algorithm=algorithm), ["per_layer", "contrastive"])


MODULE = """
from types import SimpleNamespace
import numpy as np
import torch
from torch import nn
from gossamer.algorithms.contrastive.contrast import unit
from gossamer.algorithms.problems import Problem
from gossamer.algorithms.tasks.arrays import TensorDataset

class Contrast:
    mode = "finite"
    def view(self, inputs, ids, view, random, step, draw):
        return (inputs[0] + view,)
    def held(self, inputs, ids, view):
        return (inputs[0] + view,)
    def embed(self, module, inputs, view):
        return unit(module(*inputs))

def problem(n, seed, layer):
    torch.manual_seed(seed)
    layers = {"batch": nn.BatchNorm1d(6), "sync": nn.SyncBatchNorm(6)}
    module = nn.Sequential(nn.Linear(3, 6), layers[layer], nn.Linear(6, 4))
    data = TensorDataset((torch.randn(24, 3),))
    shards = tuple(np.arange(24)[k::n] for k in range(n))
    return Problem(module, data, shards, None, contrast=Contrast())
"""


@pytest.fixture
def custom(tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)

    def task(layer):
        return {"name": "custom", "build": "mine:problem", "options": {"layer": layer}}

    return task


@pytest.mark.parametrize("layer", ["batch", "sync"])
def test_a_module_that_normalises_by_batches_is_refused(refused, custom, layer):
    refused(
        {**values(), "task": custom(layer)}, ["1 normalises", "statistics of a batch", "GroupNorm"]
    )
