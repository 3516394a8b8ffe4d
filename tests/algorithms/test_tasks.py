"""The classification tasks, the streams and the user's own: data, objectives, errors."""

import numpy as np
import pytest
import torch
from sklearn import datasets
from torch import nn

from gossamer.algorithms.oracles.per_sample import PerSampleGradients
from gossamer.algorithms.problems import Problem
from gossamer.algorithms.registry import REGISTRY, find
from gossamer.algorithms.tasks.bundled import BreastCancer, Digits, Wine
from gossamer.algorithms.tasks.least_squares import LeastSquares
from gossamer.runtime import RowLayout
from gossamer.runtime.component import validate
from gossamer.runtime.errors import ConfigError


def build(name, n=4, seed=0, **fields):
    return validate(find("task", name), {"name": name, **fields}, "task").build(n, seed)


def parameters(problem):
    return torch.cat([p.detach().flatten() for p in problem.module.parameters()])


@pytest.mark.parametrize("name", sorted(REGISTRY["task"]))
def test_every_field_of_every_task_is_documented(name):
    cls = find("task", name)
    assert cls.__doc__
    undocumented = [f for f, info in cls.model_fields.items() if not info.description]
    assert undocumented == ["name"]


@pytest.mark.parametrize("name", ["digits", "breast-cancer", "breast_cancer", "wine"])
def test_a_problem_is_a_function_of_the_seed_alone_and_leaves_the_global_generator(name):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = build(name, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    two = build(name, seed=5)
    assert torch.equal(parameters(one), parameters(two))
    assert all(map(np.array_equal, one.shards, two.shards))
    assert all(map(torch.equal, one.train.tensors, two.train.tensors))
    assert not torch.equal(parameters(one), parameters(build(name, seed=6)))


def test_digits_are_1440_for_training_and_357_for_the_test():
    problem = build("digits", model="mlp", hidden=[32], init="normal")
    features, labels = problem.train.tensors
    assert features.shape == (1440, 64)
    assert features.dtype == torch.float32
    assert len(problem.test) == 357
    assert labels.dtype == torch.int64
    assert float(features.max()) == 1.0
    shapes = [tuple(p.shape) for p in problem.module.parameters()]
    assert shapes == [(32, 64), (32,), (10, 32), (10,)]


def test_every_example_is_either_trained_on_or_held_out():
    problem = build("digits")
    both = torch.cat([problem.train.tensors[0], problem.test.tensors[0]])
    data = torch.from_numpy(datasets.load_digits().data / 16).float()
    assert torch.equal(both.sum(dim=0), data.sum(dim=0))  # sixteenths add exactly
    assert torch.equal(both.sum(dim=1).sort()[0], data.sum(dim=1).sort()[0])


def test_normal_initialisation_has_the_stated_deviation_and_zero_biases():
    problem = build("digits", model="mlp", hidden=[500], init="normal")
    weight, bias, _, _ = problem.module.parameters()
    assert torch.equal(bias, torch.zeros(500))
    # 32,000 normals: the sample deviation is within 3 % of 1/8 beyond doubt.
    assert weight.std().item() == pytest.approx(1 / 8, rel=0.03)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_the_cnn_takes_images(activation):
    problem = build("digits", model="cnn", activation=activation)
    features, labels = problem.train[torch.arange(3)]
    assert features.shape == (3, 1, 8, 8)
    assert problem.module(features).shape == (3, 10)
    loss = problem.loss(problem.module, (features, labels))
    assert loss.item() == pytest.approx(2.3, abs=0.3)


def test_the_convnet_is_stages_of_convolution_norm_and_pooling_without_mixing_examples():
    fields = {"model": "convnet", "activation": "relu", "channels": [8, 16], "groups": [2, 4]}
    problem = build("digits", **fields)
    assert sum(p.numel() for p in problem.module.parameters()) == 1946
    features, _ = problem.train[torch.arange(5)]
    together, alone = problem.module(features), problem.module(features[3:4])
    torch.testing.assert_close(together[3:4], alone)  # to rounding
    assert PerSampleGradients(problem, RowLayout(problem.module)).is_tapped
    pooled = build("digits", **{**fields, "global_pool": True}).module
    assert pooled[-1].in_features == 16  # one number for each map


def test_normal_initialisation_leaves_normalisations_at_the_identity():
    problem = build("digits", model="convnet", init="normal")
    norms = [layer for layer in problem.module.modules() if isinstance(layer, nn.GroupNorm)]
    assert len(norms) == 2
    for norm in norms:
        assert torch.equal(norm.weight, torch.ones(norm.num_channels))
        assert not norm.bias.any()


def test_normalize_scales_by_its_constants_and_leaves_examples_apart():
    plain, scaled = build("digits"), build("digits", normalize=[0.3, 0.37])
    for before, after in ((plain.train, scaled.train), (plain.test, scaled.test)):
        expected = (before.tensors[0].double() - 0.3) / 0.37
        torch.testing.assert_close(after.tensors[0].double(), expected, rtol=1e-6, atol=1e-6)
    assert not scaled.mixes_examples


def nonconvex_breast_cancer(**fields):
    """The objective of the heterogeneity experiment: standardized, +-1, sorted, 8 blocks of 71."""
    return build(
        "breast-cancer",
        n=8,
        positive=1,
        nonconvex=0.1,
        init="zeros",
        heterogeneity="sorted",
        drop_remainder=True,
        shuffle=False,
        test_examples=0,
        dtype="float64",
        **fields,
    )


def test_the_nonconvex_logistic_objective_and_its_gradient_match_the_closed_form():
    problem = nonconvex_breast_cancer()
    assert [len(s) for s in problem.shards] == [71] * 8
    assert problem.test is None
    data = datasets.load_breast_cancer()
    a = (data.data - data.data.mean(0)) / data.data.std(0)
    a = np.hstack([a, np.ones((569, 1))])
    order = np.argsort(data.target, kind="stable")
    rows = order[3 * 71 : 4 * 71]
    assert np.array_equal(problem.shards[3], rows)
    a, b = a[rows], 2.0 * data.target[rows] - 1
    weight, bias = problem.module.parameters()
    assert not torch.cat([weight.detach().flatten(), bias.detach()]).any()
    x = np.random.default_rng(0).normal(size=31)
    with torch.no_grad():
        weight.copy_(torch.from_numpy(x[None, :30]))
        bias.fill_(x[30])
    loss = problem.loss(problem.module, problem.train[torch.from_numpy(rows)])
    loss.backward()
    margin = b * (a @ x)
    expected = np.log1p(np.exp(-margin)).mean() + 0.1 * (x**2 / (1 + x**2)).sum()
    gradient = -(a.T @ (b / (1 + np.exp(margin)))) / 71 + 0.1 * 2 * x / (1 + x**2) ** 2
    assert loss.item() == pytest.approx(expected, rel=1e-13)
    ours = torch.cat([weight.grad.flatten(), bias.grad]).numpy()
    np.testing.assert_allclose(ours, gradient, rtol=0, atol=1e-14)


def test_logistic_loss_and_accuracy_hold_far_from_zero():
    problem = nonconvex_breast_cancer()
    weight, _ = problem.module.parameters()
    with torch.no_grad():
        weight.fill_(1e3)
    inputs = problem.train[torch.arange(569)]
    assert torch.isfinite(problem.loss(problem.module, inputs))
    right = problem.score(problem.module, inputs)["accuracy"].item()
    outputs = problem.module(inputs[0])[:, 0]
    assert right == int(((outputs > 0) == (inputs[1] > 0)).sum())


def test_the_wine_fixture_gives_its_published_figures():
    # x <- W (x - .1 grad f(x)) on the complete graph, 60 steps; the figure stands to 1e-9.
    problem = build(
        "wine",
        n=6,
        positive=0,
        l2=0.005,
        init="zeros",
        heterogeneity="sorted",
        shuffle=False,
        test_examples=0,
        dtype="float64",
    )
    assert [len(s) for s in problem.shards] == [30, 30, 30, 30, 29, 29]
    shards = [problem.train[torch.from_numpy(s)] for s in problem.shards]

    def objective():
        return sum(problem.loss(problem.module, s) for s in shards) / 6

    for _ in range(60):
        problem.module.zero_grad()
        objective().backward()
        with torch.no_grad():
            for p in problem.module.parameters():
                p -= 0.1 * p.grad
    assert objective().item() == pytest.approx(0.159564909304, abs=1e-9)


def test_l2_is_over_all_parameters():
    fields = {"n": 1, "dtype": "float64", "seed": 3}
    plain, penalised = build("wine", **fields), build("wine", l2=0.5, **fields)
    inputs = plain.train[torch.arange(7)]
    gap = penalised.loss(penalised.module, inputs) - plain.loss(plain.module, inputs)
    assert gap.item() == pytest.approx(0.5 * float(parameters(plain).square().sum()), rel=1e-12)


def test_examples_keeps_the_first_ones():
    problem = build("breast-cancer", examples=560, shuffle=False, test_examples=0)
    everything = build("breast-cancer", shuffle=False, test_examples=0)
    assert len(problem.train) == 560
    assert torch.equal(problem.train.tensors[0], everything.train.tensors[0][:560])


def test_standardization_uses_the_training_set():
    problem = build("wine", dtype="float64")
    features = problem.train.tensors[0]
    assert float(features.mean(dim=0).abs().max()) < 1e-13
    torch.testing.assert_close(features.std(dim=0, correction=0), torch.ones(13).double())
    assert float(problem.test.tensors[0].mean(dim=0).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hiden": [3]}, "task.hiden: unknown field; did you mean 'hidden'?"),
        ({"model": "linear", "hidden": [3]}, "task.hidden: has no effect with model: linear"),
        ({"model": "linear", "activation": "relu"}, "task.activation: has no effect"),
        ({"model": "cnn", "hidden": [3]}, "task.hidden: has no effect with model: cnn"),
        ({"model": "transformer"}, "task.model: must be 'linear', 'mlp', 'cnn' or 'convnet'"),
        ({"channels": [8]}, "task.channels: has no effect with model: mlp; set model: convnet"),
        ({"model": "convnet", "channels": []}, "task.channels: "),
        ({"model": "convnet", "groups": 3}, "task.groups: must be a divisor of every one of"),
        ({"model": "convnet", "groups": [4]}, "task.groups: must be a divisor of every one of"),
        ({"model": "convnet", "channels": [4] * 4}, "task.model: convnet needs images of at least"),
        ({"normalize": [0, 0]}, "task.normalize.1: must be greater than 0"),
        ({"init": "zeros"}, "task.init: leaves deep models without a gradient"),
        ({"heterogeneity": "dirichlet"}, "task.alpha: missing"),
        ({"alpha": 0.1}, "task.alpha: has no effect without heterogeneity: dirichlet"),
        ({"heterogeneity": "dirichlet", "alpha": 0}, "task.alpha: must be greater than 0"),
        (
            {"heterogeneity": "dirichlet", "alpha": 1, "drop_remainder": True},
            "task.drop_remainder: dirichlet shards are unequal",
        ),
        ({"hidden": [0]}, "task.hidden.0: must be greater than or equal to 1"),
        ({"examples": 5000}, "task.examples: 'digits' has 1440 training examples, got 5000"),
        ({"test_examples": 1797}, "task.test_examples: must be less than the 1797 examples"),
        ({"test_examples": True}, "task.test_examples: must be a number, got true"),
        ({"positive": 10}, "task.positive: 'digits' has classes 0..9, got 10"),
        ({"n": 1441}, "ranks: 1441 ranks for 1440 training examples of task 'digits'; use at most"),
    ],
)
def test_errors_name_field_value_and_fix(fields, message):
    with pytest.raises(ConfigError) as error:
        build("digits", **fields)
    assert str(error.value).startswith(message)


def test_a_resolved_configuration_is_accepted_again():
    for task in (Digits(model="linear"), Wine(), BreastCancer(), LeastSquares()):
        assert validate(type(task), task.model_dump(), "task") == task


@pytest.mark.parametrize("model", ["cnn", "convnet"])
def test_convolutions_on_a_table_are_refused(model):
    with pytest.raises(ConfigError, match=f"{model} needs images"):
        build("wine", model=model)


def test_features_that_are_standardized_are_not_normalized_again():
    with pytest.raises(ConfigError, match=r"task\.normalize: standardize scales"):
        build("wine", normalize=[0, 1])


# --- the stream -----------------------------------------------------------------------------


def test_a_stream_is_a_pure_function_of_its_counters():
    stream = build("least-squares").train
    a, b = stream.draw(0, 3, 17, 0, 5)
    assert a.shape == (5, 100)
    assert b.shape == (5,)
    for other in [(1, 3, 17, 0, 5), (0, 2, 17, 0, 5), (0, 3, 16, 0, 5), (0, 3, 17, 1, 5)]:
        assert not torch.equal(a, stream.draw(*other)[0])
    assert torch.equal(a, stream.draw(0, 3, 17, 0, 5)[0])


def test_least_squares_has_its_stated_distribution():
    problem = build("least-squares", dtype="float64", noise=0.2, spike=True)
    stream = problem.train
    assert int((stream.beta != 0).sum()) == 30
    a, b = stream.draw(0, 0, 0, 0, 20_000)
    residual = b - a @ stream.beta
    assert float(residual.std()) == pytest.approx(0.2, rel=0.03)
    assert float(a[:, 0].std()) == pytest.approx(100, rel=0.03)
    assert float(a[:, 1:].std()) == pytest.approx(1, rel=0.01)
    with torch.no_grad():
        next(problem.module.parameters()).copy_(stream.beta)
    loss = problem.loss(problem.module, problem.test.tensors).item()
    assert loss == pytest.approx(0.02, rel=0.15)  # half the noise's variance, 1,000 samples


# --- the user's own -------------------------------------------------------------------------


def test_a_function_of_ones_own_builds_a_problem(tmp_path, monkeypatch):
    (tmp_path / "my_problem.py").write_text(
        "from gossamer.algorithms.tasks.bundled import Wine\n"
        "def make(n, seed, examples=100):\n"
        "    return Wine(examples=examples).build(n, seed)\n"
        "def wrong(n, seed):\n"
        "    return Wine().build(n + 1, seed)\n"
        "def nothing(n, seed):\n"
        "    return None\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    problem = build("custom", build="my_problem:make", options={"examples": 50})
    assert isinstance(problem, Problem)
    assert len(problem.train) == 50
    for function, message in [
        ("wrong", "must return 4 shards .*, got 5"),
        ("nothing", "must return a gossamer.algorithms.problems.Problem, got NoneType"),
        ("mkae", "my_problem has no 'mkae'; did you mean 'make'?"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build("custom", build=f"my_problem:{function}")
    with pytest.raises(ConfigError, match=r"task\.build"):
        build("custom", build="no colon")


def test_a_seed_of_its_own_holds_the_same_examples_out_in_every_run():
    held_out = [build("digits", seed=seed, shuffle_seed=5).test[torch.arange(9)] for seed in (1, 2)]
    assert torch.equal(held_out[0][0], held_out[1][0])
    starts = [build("digits", seed=seed, shuffle_seed=5).module for seed in (1, 2)]
    assert not torch.equal(*(next(iter(module.parameters())) for module in starts))
