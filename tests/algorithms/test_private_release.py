"""Private gradients that are not written down before they are used: the same runs, to the bit."""

import pytest
import torch
from test_dp import problem, run

from gossamer.algorithms.decentralized.all_reduce import AllReduce
from gossamer.algorithms.decentralized.choco import Choco
from gossamer.algorithms.decentralized.deepsqueeze import DeepSqueeze
from gossamer.algorithms.decentralized.dsgd import DSGD
from gossamer.algorithms.decentralized.gradient_tracking import GradientTracking
from gossamer.algorithms.optimizers.adam_bc import AdamBC
from gossamer.algorithms.optimizers.sgd import SGD, Momentum
from gossamer.algorithms.oracles.backprop import Backprop
from gossamer.algorithms.privacy import release as module
from gossamer.algorithms.privacy.disk import Disk
from gossamer.algorithms.privacy.doppler import Doppler
from gossamer.algorithms.privacy.dp import DP
from gossamer.algorithms.privacy.release import Release
from gossamer.algorithms.program import TrainingProgram
from gossamer.runtime import Communicator, StackedTransport, combine
from gossamer.runtime.perturb import perturb_
from gossamer.topologies import build

STACKS = {
    "dp": lambda dp: dp,
    "doppler": lambda dp: Doppler(inner=dp, beta=0.9),
    "doppler fir": lambda dp: Doppler(inner=dp, b=[0.5, 0.3, 0.2]),
    "doppler order 3": lambda dp: Doppler(inner=dp, a=[-1.2, 0.5, -0.1], b=[0.1, 0.2]),
    "disk": lambda dp: Disk(inner=dp, kappa=0.5, gamma=0.7),
    "disk at one point": lambda dp: Disk(inner=dp, kappa=0.5, gamma=0),
}
ALGORITHMS = {
    "all-reduce": lambda: AllReduce(optimizer=SGD(lr=0.5)),
    "all-reduce, decay": lambda: AllReduce(optimizer=SGD(lr=0.5, weight_decay=0.1)),
    "all-reduce, momentum": lambda: AllReduce(optimizer=Momentum(lr=0.1)),
    "all-reduce, adam-bc": lambda: AllReduce(optimizer=AdamBC(lr=0.01)),
    "dsgd": lambda: DSGD(optimizer=SGD(lr=0.5)),
    "dsgd, cta": lambda: DSGD(optimizer=SGD(lr=0.5), order="cta"),
    "choco": lambda: Choco(optimizer=SGD(lr=0.5)),
    "deepsqueeze": lambda: DeepSqueeze(optimizer=SGD(lr=0.5)),
    "gradient-tracking": lambda: GradientTracking(optimizer=SGD(lr=0.1)),
}


def make(stack="doppler", algorithm="all-reduce", n=1, **dp):
    comm = Communicator(build("ring", n), StackedTransport(), seed=0)
    inner = Backprop(batch_size=60 // n)
    private = DP(inner=inner, noise_multiplier=1.0, noise_seed=5, **dp)
    oracle = STACKS[stack](private)
    return TrainingProgram(comm, problem(n, hidden=7), oracle, ALGORITHMS[algorithm]()).start()


def written_at_once(layout, sums, noise, factors, out):
    """The rows of a Release, pass by pass: what it stands for."""
    for row, terms in zip(sums, noise, strict=True):
        for seed, p in terms:
            perturb_(row, layout, seed, p.step, p.probe, p.coefficient)
    return combine([(torch.tensor(factors, dtype=torch.float64)[:, None], sums)], out=out)


def same_run(monkeypatch, steps=6, **options):
    found = run(make(**options), steps)
    with monkeypatch.context() as patch:
        patch.setattr("gossamer.algorithms.privacy.dp.Release", written_at_once)
        expected = run(make(**options), steps)
    assert not torch.equal(found.state.x, make(**options).state.x)
    assert torch.equal(found.state.x, expected.state.x)
    states = [made.oracle.state_dict() for made in (found, expected)]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("stack", STACKS)
def test_a_filtered_run_has_the_bits_of_one_that_writes_every_pass(stack, n, monkeypatch):
    same_run(monkeypatch, stack=stack, n=n)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_so_does_a_run_of_any_algorithm_and_optimizer(algorithm, n, monkeypatch):
    same_run(monkeypatch, algorithm=algorithm, n=n)


@pytest.mark.parametrize("mode", ["split", "rank0", "replicated"])
def test_so_does_noise_in_every_mode(mode, monkeypatch):
    same_run(monkeypatch, n=4, noise_mode=mode)


@pytest.mark.parametrize(
    ("stack", "algorithm", "n", "is_fused"),
    [
        ("dp", "all-reduce", 1, True),
        ("doppler order 3", "all-reduce", 1, True),
        ("disk", "all-reduce", 1, True),
        ("disk", "dsgd", 4, True),
        ("doppler", "choco", 4, True),
        ("doppler", "deepsqueeze", 4, True),
        ("doppler", "all-reduce", 4, False),  # the mean over ranks comes between
        ("doppler", "all-reduce, adam-bc", 1, False),
        ("doppler", "gradient-tracking", 4, False),
    ],
)
def test_noise_filter_and_a_step_of_sgd_are_one_pass(stack, algorithm, n, is_fused, monkeypatch):
    calls = []

    def watch(row, layout, noise, factor, **options):
        calls.append((len(noise), len(options["kept"]), options["step"] is not None))
        return module_release(row, layout, noise, factor, **options)

    module_release = module.release_
    monkeypatch.setattr(module, "release_", watch)
    made = run(make(stack, algorithm, n), 3)
    kept = {"dp": 0, "doppler": 1, "doppler order 3": 4, "disk": 1}[stack]
    calls.clear()
    run(made, 1)
    assert calls == [(4, kept, is_fused)] * n


def a_release(**fields):
    made = make("dp", n=2)
    estimate = made.oracle.deferred(made.state.x, made._batches()[0])
    assert isinstance(estimate.grad, Release)
    return made, estimate


def test_rows_are_written_once_and_stay():
    _, estimate = a_release()
    sums = estimate.grad.sums.clone()
    rows = estimate.grad.dense().clone()
    assert not torch.equal(rows, sums)
    assert torch.equal(estimate.grad.dense(), rows)
    assert torch.equal(estimate.dense().grad, rows)


@pytest.mark.parametrize("first", ["dense", "add_to_"])
def test_what_is_added_is_what_the_rows_are(first):
    made, estimate = a_release()
    x = made.state.x.clone()
    expected_rows = a_release()[1].grad.dense()
    expected = combine([(1.0, x), (-0.3, expected_rows)])
    if first == "dense":
        estimate.grad.dense()
    assert torch.equal(estimate.grad.add_to_(x, -0.3), expected)
    assert torch.equal(estimate.grad.dense(), expected_rows)
