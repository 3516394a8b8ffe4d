"""The contrastive task: what it builds of digits and MNIST, and the figures of its evaluation."""

import os
from typing import get_args

import numpy as np
import pytest
import torch
from contrastive_for_tests import build, evaluate, rows_of, written_out
from sklearn.datasets import load_digits, load_sample_images
from sklearn.neighbors import KNeighborsClassifier
from thread_ranks import on_processes

from gossamer.algorithms.contrastive import evaluation
from gossamer.algorithms.registry import find
from gossamer.algorithms.tasks.files import DATA_VARIABLE
from gossamer.runtime.collectives import RankGroup
from gossamer.runtime.component import Component
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.random import Random
from gossamer.runtime.transports.stacked import StackedTransport

FINITE = {"mode": "finite", "recipe": "digits"}
SMALL = {"examples": 30, "views": FINITE, "encoder": {"name": "mlp", "hidden": [8], "dim": 4}}


def both_views(problem, ids):
    """Both views' embeddings, (2, N, D)."""
    inputs = problem.train[ids]
    views = problem.contrast
    given = [views.evaluated(inputs, ids, view) for view in (0, 1)]
    return torch.stack([views.embed(problem.module, g, v) for v, g in enumerate(given)])


def sections(cls):
    """The classes of all sections inside a component's fields, however deep."""
    found = set()
    for field in cls.model_fields.values():
        waiting = [field.annotation]
        while waiting:
            kind = waiting.pop()
            waiting += get_args(kind)
            if isinstance(kind, type) and issubclass(kind, Component):
                found |= {kind} | sections(kind)
    return found


def test_every_section_and_its_fields_are_documented():
    inside = sections(find("task", "contrastive"))
    assert len(inside) > 15
    for cls in inside:
        undocumented = [f for f, info in cls.model_fields.items() if not info.description]
        assert undocumented in ([], ["name"]), cls
        assert cls.__doc__, cls


# --- what is built ----------------------------------------------------------------------------


def test_digits_are_in_the_order_of_the_file_and_the_last_357_are_held_out():
    problem = build(examples=200, views=FINITE)
    data = load_digits()
    (images,) = problem.train[torch.arange(200)]
    assert len(problem.train) == 200
    assert torch.equal(images[:, 0], torch.from_numpy(data.images[:200] / 16).float())
    learnt, test = problem.figures.probing[1:]
    assert learnt.labels.tolist() == data.target[:1440].tolist()
    assert test.labels.tolist() == data.target[1440:].tolist()
    assert sorted(np.concatenate(problem.shards)) == list(range(200))
    shapes = [tuple(p.shape) for p in problem.module.parameters()]
    assert shapes == [(128, 64), (128,), (128, 128), (128,), (32, 128), (32,)]
    assert problem.contrast.mode == "finite"


@pytest.mark.skipif(DATA_VARIABLE not in os.environ, reason="no folder of data sets")
def test_mnist_is_8000_images_to_train_on_and_2000_to_test():
    problem = build(data="mnist", examples=500, encoder={"name": "mlp", "hidden": [128]})
    assert problem.train[torch.arange(500)][0].shape == (500, 1, 28, 28)
    learnt, test = problem.figures.probing[1:]
    assert len(learnt.dataset) == 8000
    assert len(learnt.places) == 4096
    assert len(test.labels) == 2000
    x, layout = rows_of(problem, 2, scale=0)
    figures = problem.figures(RankGroup(2, StackedTransport()), layout, x, x[:1])
    assert figures["knn1_accuracy"] > 0.8  # chance is 0.1, pixels give 0.95


def test_photographs_are_squares_of_the_two_whatever_the_seed():
    fields = {"data": {"name": "photographs", "count": 20, "size": 32}, "heterogeneity": "sorted"}
    problem = build(n=2, **fields)
    (squares,) = problem.train[torch.arange(20)]
    assert squares.shape == (20, 3, 32, 32)
    assert squares.dtype == torch.uint8
    assert problem.shards[0].tolist() == list(range(0, 20, 2))
    for k, photograph in enumerate(load_sample_images().images):
        windows = torch.tensor(photograph).permute(2, 0, 1).unfold(1, 32, 1).unfold(2, 32, 1)
        candidates = (windows[:, :, :, 0, 0] == squares[k, :, :1, 0, None]).all(dim=0)
        found = [windows[:, y, x] for y, x in candidates.nonzero().tolist()]
        assert any(torch.equal(window, squares[k]) for window in found)
    again = build(n=2, seed=5, **fields)
    assert torch.equal(again.train[torch.arange(20)][0], squares)
    assert len({square.sum().item() for square in squares}) == 20


def test_a_problem_is_a_function_of_the_seed_alone():
    one, two, other = (build(**SMALL, seed=seed) for seed in (1, 1, 2))
    ids = torch.arange(30)
    assert torch.equal(both_views(one, ids), both_views(two, ids))
    assert not torch.equal(both_views(one, ids), both_views(other, ids))
    assert all(map(np.array_equal, one.shards, two.shards))


def test_fixed_views_follow_the_image_not_the_number_of_examples_or_ranks():
    few, many = build(n=1, **SMALL), build(n=7, **{**SMALL, "examples": 100})
    ids = torch.tensor([3, 29])
    assert torch.equal(both_views(few, ids), both_views(many, ids))


# --- figures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["finite", "infinite"])
@pytest.mark.parametrize("chunk", [4, 256])
def test_loss_and_gradient_are_those_of_the_formula_at_the_mean(monkeypatch, mode, chunk):
    monkeypatch.setattr(evaluation, "_CHUNK", chunk)
    problem = build(**{**SMALL, "views": {"mode": mode}}, dtype="float64")
    problem.figures.beta = 5.0
    x, layout = rows_of(problem, 3)
    figures = evaluate(RankGroup(3, StackedTransport()), problem, x, layout)
    grad = torch.zeros(layout.d, dtype=torch.float64)
    layout.bind(problem.module, x.mean(dim=0), grad)
    z = both_views(problem, torch.arange(30))
    loss = written_out(z, 5.0, pairs=False)
    loss.backward()
    assert figures["loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert figures["grad_norm"] == pytest.approx(grad.norm().item(), rel=1e-10)
    assert figures["collapsed_loss"] == pytest.approx(np.log(58))
    others = ~torch.eye(30, dtype=torch.bool).repeat(2, 2)
    cosine = (z.flatten(0, 1) @ z.flatten(0, 1).T)[others].mean()
    assert figures["pairwise_cosine"] == pytest.approx(cosine.item(), rel=1e-10)
    assert figures["collapse"] == 0
    assert figures["consensus"] > 0


def test_probes_see_the_representation_of_images_without_augmentation():
    problem = build(examples=30, encoder={"name": "mlp", "hidden": [8]})
    x, layout = rows_of(problem, 2)
    figures = evaluate(RankGroup(2, StackedTransport()), problem, x, layout)
    layout.bind(problem.module, x.mean(dim=0))
    images = torch.from_numpy(load_digits().images[:, None] / 16).float()
    features = problem.module.backbone(images).detach().numpy()
    labels = load_digits().target
    for k in (1, 10):
        known = KNeighborsClassifier(k).fit(features[:1440], labels[:1440])
        expected = known.score(features[1440:], labels[1440:])
        assert figures[f"knn{k}_accuracy"] == pytest.approx(expected, abs=1e-12)
    assert "probe_accuracy" not in figures


def test_figures_are_equal_to_the_bit_on_any_split_of_the_ranks_over_processes():
    fields = {**SMALL, "probes": ["knn", {"name": "linear", "epochs": 2}], "probe_examples": 20}
    problems = [build(n=28, **fields) for _ in range(3)]  # threads must not share a module
    x, layout = rows_of(problems[0], 28)  # more ranks than examples that are looked at
    expected = evaluate(RankGroup(28, StackedTransport()), problems[0], x, layout)

    def work(transport):
        return evaluate(RankGroup(28, transport), problems[transport.process], x, layout)

    for processes in (2, 3):
        assert on_processes(processes, work)[0] == [expected] * processes


@pytest.mark.parametrize("n", [1, 2, 7])
def test_figures_are_the_same_for_any_number_of_ranks(n):
    problem = build(n=n, **SMALL, dtype="float64", probes=["knn", "linear"])
    x, layout = rows_of(problem, 1)
    figures = evaluate(RankGroup(n, StackedTransport()), problem, x.repeat(n, 1), layout)
    alone = evaluate(RankGroup(1, StackedTransport()), problem, x, layout)
    assert figures == pytest.approx(alone, rel=1e-10, abs=1e-10)


def test_evaluation_leaves_parameters_gradients_and_mode_as_they_were():
    problem = build(**SMALL)
    x, layout = rows_of(problem, 3)
    grad = torch.ones(layout.d)
    row = x[0].clone()
    layout.bind(problem.module, row, grad)
    evaluate(RankGroup(3, StackedTransport()), problem, x, layout)
    assert problem.module.training
    assert all(p.data_ptr() == v.data_ptr() for p, v in bound(problem, layout, row))
    assert torch.equal(grad, torch.ones(layout.d))


def bound(problem, layout, row):
    return zip(layout.parameters(problem.module), layout.views(row), strict=True)


def test_equal_embeddings_are_a_collapse():
    problem = build(**SMALL, dtype="float64")
    with torch.no_grad():
        problem.module.projector.weight.zero_()
    x, layout = rows_of(problem, 1, scale=0)
    figures = evaluate(RankGroup(1, StackedTransport()), problem, x, layout)
    assert figures["collapse"] == 1
    assert figures["loss"] == pytest.approx(figures["collapsed_loss"], abs=1e-10)
    assert figures["pairwise_cosine"] == pytest.approx(1)
    assert figures["grad_norm"] < 1e-10


def test_probe_examples_bounds_what_is_looked_at_evenly():
    problem = build(probe_examples=100)
    figures = problem.figures
    assert len(figures.places) == len(figures.probing.train.places) == 100
    assert figures.places.tolist()[:3] == [0, 14, 28]
    assert len(set(figures.probing.test.labels.tolist())) == 10
    assert len(build(probe_examples=0).figures.places) == 1440


def test_training_on_the_views_lowers_the_exact_loss_below_the_collapsed_one():
    problem = build(n=1, examples=60, views=FINITE)
    x, layout = rows_of(problem, 1, scale=0)
    layout.bind(problem.module, x[0])
    optimizer = torch.optim.SGD(problem.module.parameters(), lr=0.05)
    for step in range(150):
        ids = Random(0).stream("batch", step=step).permutation(60)[0][:16]
        views = [
            problem.contrast.embed(
                problem.module,
                problem.contrast.view(problem.train[ids], ids, view, Random(0), step, 0),
                view,
            )
            for view in (0, 1)
        ]
        scores = 14.28 * torch.cat(views) @ torch.cat(views).T
        scores = scores.masked_fill(torch.eye(32, dtype=torch.bool), -torch.inf)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(scores, torch.arange(32).roll(16))
        loss.backward()
        optimizer.step()
    figures = evaluate(RankGroup(1, StackedTransport()), problem, x, layout)
    assert figures["loss"] < figures["collapsed_loss"] - 2
    assert figures["collapse"] == 0


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": "digitz"}, r"task\.data\.name: unknown data 'digitz'; did you mean 'digits'"),
        ({"data": {"name": "arrays"}}, r"task\.data\.path: missing"),
        ({"views": {"recipe": "simclrr"}}, r"task\.views\.recipe\.name: unknown recipe 'simclrr'"),
        ({"views": {"mode": "fixed"}}, r"task\.views\.mode: must be 'infinite' or 'finite'"),
        ({"encoder": "resnet19"}, r"task\.encoder\.name: unknown encoder 'resnet19'"),
        ({"encoder": {"name": "mlp", "hidden": []}}, r"task\.encoder\.hidden"),
        ({"probes": ["knm"]}, r"task\.probes\.name: unknown probes 'knm'"),
        ({"text": "bag"}, r"task\.text: has no effect without pairs; leave it out"),
        ({"examples": 1}, r"task\.examples: must be greater than or equal to 2, got 1"),
        ({"probe_examples": 1}, r"task\.probe_examples: must be 2 at least, .*, got 1"),
        ({"examples": 1441}, r"task\.examples: 'digits' has 1440 training examples, got 1441"),
        ({"test_examples": 5}, r"task\.test_examples: 'digits' brings 357 test examples"),
        ({"data": {"name": "mnist", "path": "/nowhere"}}, r"task\.data\.path: no file or folder"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        build(**fields)


@pytest.mark.parametrize("option", [{"examples": 5}, {"gradient": False}])
def test_settings_of_other_evaluations_are_refused(option):
    problem = build(**SMALL)
    x, layout = rows_of(problem, 3)
    with pytest.raises(ConfigError, match=f"evaluate_{next(iter(option))}: has no effect"):
        evaluate(RankGroup(3, StackedTransport()), problem, x, layout, **option)
