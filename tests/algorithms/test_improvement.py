"""What a private step gains: the formula against simulation, its terms against exact ones."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn
from typer.testing import CliRunner

from gossamer.algorithms.privacy.clipping import FlatClip
from gossamer.algorithms.privacy.improvement import Budget, Terms, _calibrated, advise, best_batch
from gossamer.algorithms.privacy.improvement_terms import estimate_terms
from gossamer.algorithms.problems import Problem
from gossamer.algorithms.tasks.arrays import TensorDataset
from gossamer.launch.cli import app

D, N = 6, 400


class Point(nn.Module):
    """A point of space, as parameters that belong to no layer."""

    def __init__(self, start):
        super().__init__()
        self.x = nn.Parameter(start)


def quadratic():
    """Return a problem with loss (x - a)' H (x - a) / 2, its H, the a and x."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(D, D, generator=generator, dtype=torch.float64) / D**0.5
    h = root @ root.T + 0.1 * torch.eye(D, dtype=torch.float64)
    a = torch.randn(N, D, generator=generator, dtype=torch.float64)
    x = torch.full((D,), 1.5, dtype=torch.float64)

    def loss(model, inputs):
        apart = dict(model.named_parameters())["x"] - inputs[0]
        return 0.5 * ((apart @ h) * apart).sum(1).mean()

    return Problem(Point(x.clone()), TensorDataset((a,)), (np.arange(N),), loss), h, a, x


def exact_terms(h, a, x, c):
    grads = (x - a) @ h
    mean = grads.mean(0)
    sigma = torch.cov(grads.T)
    return Terms(
        grad_square=float(mean @ mean),
        curvature=float(mean @ h @ mean),
        trace=float(h.trace()),
        noise_curvature=float((h @ sigma).trace()),
        clip_factor=c,
    )


def calibrate_fast(monkeypatch):
    """Put a stand-in of the same shape for calibration: a floor, and rate sqrt(steps) above it."""

    def calibrate(epsilon, delta, rate, steps, accountant):
        return 0.4 + 3 * rate * steps**0.5 / epsilon

    monkeypatch.setattr("gossamer.algorithms.privacy.improvement.accounting.calibrate", calibrate)
    _calibrated.cache_clear()


@pytest.fixture(autouse=True)
def _no_cache():
    """Leave no figure of the stand-in behind."""
    yield
    _calibrated.cache_clear()


# --- the formula ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "noise", "c"), [(8, None, 1.0), (8, 2.0, 0.4), (32, 8.0, 0.4), (4, 0.5, 0.8)]
)
def test_the_improvement_of_a_step_is_that_of_simulated_steps(batch, noise, c):
    _, h, a, x = quadratic()
    terms = exact_terms(h, a, x, c)
    lr = terms.best_lr(batch, noise)
    generator = np.random.default_rng(1)
    runs = 100_000
    grads = ((x - a) @ h).numpy()
    drawn = generator.integers(N, size=(runs, batch))
    step = (1.0 if noise is None else c) * grads[drawn].mean(1)
    if noise is not None:
        step += noise / batch * generator.standard_normal((runs, D))
    # On a quadratic the change follows from the step: lr G's - lr^2/2 s'Hs.
    gain = lr * step @ grads.mean(0) - lr**2 / 2 * ((step @ h.numpy()) * step).sum(1)
    # The spread of one run is a few times its mean: 2 % is over five standard errors.
    assert gain.std() / runs**0.5 / abs(gain.mean()) < 0.004
    assert gain.mean() == pytest.approx(terms.expected(lr, batch, noise), rel=0.02)
    assert terms.expected(lr, batch, noise) / batch == pytest.approx(
        terms.per_example(batch, noise)
    )


@pytest.mark.parametrize("noise", [None, 3.0])
def test_the_best_rate_is_the_argmax(noise):
    terms = Terms(2.0, 0.7, 5.0, 3.0, clip_factor=0.3)
    best = terms.best_lr(16, noise)
    gains = [terms.expected(best * factor, 16, noise) for factor in (0.9, 1.0, 1.1)]
    assert max(gains) == gains[1]


@pytest.mark.parametrize("noise", [0.5, 3.0, 20.0])
def test_the_best_batch_for_a_given_noise_is_the_argmax(noise):
    terms = Terms(2.0, 0.7, 50.0, 3.0, clip_factor=0.3)
    best = terms.best_batch(noise)
    batches = np.arange(1, 4000)
    brute = batches[np.argmax([terms.per_example(b, noise) for b in batches])]
    assert abs(brute - best) <= 1


@pytest.mark.parametrize("epochs", [0.5, 8, 40])
def test_the_best_batch_within_a_budget_is_the_argmin_of_the_cost(epochs, monkeypatch):
    calibrate_fast(monkeypatch)
    terms = Terms(2.0, 0.02, 500.0, 30.0, clip_factor=0.3)
    budget = Budget(epsilon=2.0, delta=1e-6, epochs=epochs, examples=5000)
    found = best_batch(terms, budget)
    costs = {b: terms.cost(b, budget.noise(b)) for b in range(1, 5001)}
    assert costs[found] <= 1.01 * min(costs.values())


def test_the_best_batch_with_a_real_accountant():
    terms = Terms(2.0, 0.05, 300.0, 10.0, clip_factor=0.5)
    budget = Budget(epsilon=2.0, delta=1e-5, epochs=10, examples=2000)
    found = best_batch(terms, budget)
    costs = {b: terms.cost(b, budget.noise(b)) for b in (found // 2, found, min(2000, found * 2))}
    assert costs[found] == min(costs.values())


# --- the terms --------------------------------------------------------------------------------


def test_the_terms_of_a_quadratic():
    problem, h, a, x = quadratic()
    exact = exact_terms(h, a, x, 1.0)
    found = estimate_terms(problem, probes=80, chunk=250)
    assert found.grad_square == pytest.approx(exact.grad_square, rel=1e-10)
    assert found.curvature == pytest.approx(exact.curvature, rel=1e-10)
    # Five standard errors of the probes.
    assert abs(found.trace - exact.trace) < 5 * found.trace_error < 0.5 * exact.trace
    apart = abs(found.noise_curvature - exact.noise_curvature)
    assert apart < 5 * found.noise_curvature_error < exact.noise_curvature
    assert found.clip_factor == 1.0
    assert found.examples == N


def network():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(90, 5, generator=generator)
    targets = torch.randint(3, (90,), generator=generator)
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3))

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    return Problem(module, TensorDataset((inputs, targets)), (np.arange(90),), loss)


def exact_of_network(problem):
    """Return the terms from the whole Hessian and every gradient, in float64."""
    module = problem.module.double().eval()
    inputs, targets = problem.train.tensors
    names = [name for name, _ in module.named_parameters()]
    shapes = [p.shape for p in module.parameters()]
    flat = torch.cat([p.detach().flatten() for p in module.parameters()])

    def loss_of(row, features, labels):
        parts = torch.split(row, [s.numel() for s in shapes])
        given = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        out = torch.func.functional_call(module, given, features)
        return F.cross_entropy(out, labels)

    h = torch.autograd.functional.hessian(lambda r: loss_of(r, inputs.double(), targets), flat)
    each = torch.func.vmap(
        torch.func.grad(lambda r, f, y: loss_of(r, f[None], y[None])), in_dims=(None, 0, 0)
    )
    grads = each(flat, inputs.double(), targets)
    mean = grads.mean(0)
    factors = FlatClip(0.5).factors((grads**2).sum(1, keepdim=True))
    terms = [mean @ mean, mean @ h @ mean, h.trace(), (h @ torch.cov(grads.T)).trace()]
    return Terms(*map(float, terms), clip_factor=float(factors.mean()) / 0.5)


def test_the_terms_of_a_network():
    found = estimate_terms(network(), clip=FlatClip(0.5), probes=80, chunk=50)
    exact = exact_of_network(network())
    # The inputs are float32, the rest is float64 in both.
    assert found.grad_square == pytest.approx(exact.grad_square, rel=1e-9)
    assert found.curvature == pytest.approx(exact.curvature, rel=1e-9)
    assert found.clip_factor == pytest.approx(exact.clip_factor, rel=1e-5)
    assert abs(found.trace - exact.trace) < 5 * found.trace_error
    assert abs(found.noise_curvature - exact.noise_curvature) < 5 * found.noise_curvature_error


def test_estimates_are_counted_numbers_and_leave_the_model_alone():
    problem = network()
    before = [p.detach().clone() for p in problem.module.parameters()]
    found = [estimate_terms(problem, probes=3, seed=seed) for seed in (4, 4, 5)]
    assert found[0] == found[1]
    assert found[0].trace != found[2].trace
    assert found[0].grad_square == found[2].grad_square
    assert all(map(torch.equal, before, problem.module.parameters()))
    assert all(p.dtype == torch.float32 for p in problem.module.parameters())


def test_parameters_and_places_say_where_to_look():
    problem = network()
    given = {name: p.detach() + 0.1 for name, p in problem.module.named_parameters()}
    moved = estimate_terms(problem, parameters=given, probes=2)
    assert moved.loss != estimate_terms(problem, probes=2).loss
    assert estimate_terms(problem, places=np.arange(7), probes=2).examples == 7
    assert estimate_terms(problem, examples=11, probes=2).examples == 11


# --- the advice -------------------------------------------------------------------------------


def budget(epsilon=1.0):
    return Budget(epsilon=epsilon, delta=1e-5, epochs=5, examples=2000)


def test_noise_sends_public_examples_first_and_little_of_it_does_not(monkeypatch):
    calibrate_fast(monkeypatch)
    noisy = advise(Terms(1.0, 0.1, 1e4, 1.0, clip_factor=0.3), budget())
    assert noisy.public_first
    assert any("train on them first" in line for line in noisy.text)
    calm = advise(Terms(1.0, 0.1, 0.1, 50.0, clip_factor=1.0), budget(8.0))
    assert not calm.public_first
    assert calm.ratio < 2


def test_a_loss_that_does_not_curve_up_has_no_best_step(monkeypatch):
    calibrate_fast(monkeypatch)
    found = advise(Terms(1.0, -0.1, 10.0, 1.0), budget())
    assert math.isnan(found.ratio)
    assert "estimate again" in " ".join(found.text)
    assert math.isinf(found.batch_fixed_noise)


# --- the command ------------------------------------------------------------------------------


def analyzed(tmp_path, monkeypatch, oracle, *options):
    calibrate_fast(monkeypatch)
    path = tmp_path / "run.yaml"
    values = {
        "task": {"name": "digits", "model": "linear"},
        "oracle": oracle,
        "optimizer": {"name": "sgd", "lr": 0.1},
        "algorithm": {"name": "all-reduce"},
        "ranks": 2,
        "steps": 90,
    }
    path.write_text(yaml.safe_dump(values))
    command = ["analyze", "improvement", str(path), "--probes", "2", "--examples", "40", *options]
    return CliRunner().invoke(app, command)


DP_STACK = [{"name": "backprop", "batch_size": 32}, {"name": "dp", "epsilon": 2.0}]


def test_the_command_takes_the_budget_of_the_file_and_prints_json(tmp_path, monkeypatch):
    public = {"name": "public", "fraction": 0.1, "switch": 0.5}
    done = analyzed(tmp_path, monkeypatch, [*DP_STACK, public], "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["budget"]["examples"] == 1296  # of 1,440, a tenth is public
    assert found["budget"]["epochs"] == pytest.approx(45 * 64 / 1296)
    assert found["budget"]["epsilon"] == 2.0
    assert "public examples" in found["source"]
    assert found["advice"]["batch"] in {row["batch_size"] for row in found["batch_sizes"]}
    assert found["terms"]["clip_factor"] <= 1


def test_the_command_says_that_figures_of_private_examples_are_not_private(tmp_path, monkeypatch):
    done = analyzed(tmp_path, monkeypatch, DP_STACK, "--epsilon", "4")
    assert done.exit_code == 0, done.output
    assert "at epsilon 4" in done.stdout
    assert "in the clear" in done.stdout


def test_the_command_asks_for_an_epsilon_that_the_file_lacks(tmp_path, monkeypatch):
    done = analyzed(tmp_path, monkeypatch, DP_STACK[0])
    assert "--epsilon" in str(done.exception)
