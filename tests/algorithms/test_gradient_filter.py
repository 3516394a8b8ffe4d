"""Filters around an oracle in a run: restarts, resumes, what is refused and what is said."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import PrivateAttr
from quadratic_for_tests import STACKS, D, Given, Quadratic, Run, given_rows, gradients, random_rows
from torch import nn

from gossamer.algorithms.estimates import Estimate, Origin
from gossamer.algorithms.optimizers.sgd import SGD
from gossamer.algorithms.oracles.wrapper import OracleWrapper
from gossamer.algorithms.privacy.disk import Disk
from gossamer.algorithms.privacy.doppler import Doppler
from gossamer.algorithms.registry import find
from gossamer.runtime import ConfigError
from gossamer.runtime.component import validate


@pytest.mark.parametrize("stack", STACKS)
def test_a_restart_of_the_gradients_starts_the_filter_anew(stack):
    rows = random_rows(30)
    rows[:12] *= 1e30  # nothing of it may be left over
    after = gradients(STACKS[stack](inner=given_rows(rows, restart_at=12)), SGD(lr=1e-40), 30)[12:]
    fresh = gradients(STACKS[stack](inner=given_rows(rows[12:])), SGD(lr=1e-40), 18)
    assert after[0].origin.restart
    for ours, theirs in zip(after, fresh, strict=True):
        assert torch.equal(ours.grad, theirs.grad)
        assert ours.origin.noise_var == theirs.origin.noise_var


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_resumed_run_goes_on_to_the_bit(stack, dtype):
    def run():
        return Run(STACKS[stack](inner=Quadratic(noise=0.3, dtype=dtype)), SGD(lr=0.5))

    whole, found, expected = run(), [], []
    whole.steps(7)
    saved = {k: v.clone() for k, v in whole.oracle.state_dict().items()}
    x, step = whole.x.clone(), whole.comm.step
    whole.steps(9, lambda x, e: expected.append((x, e.grad.clone(), e.origin)))

    resumed = run()
    resumed.steps(3)  # whatever was there before is overwritten
    resumed.oracle.load_state_dict(saved)
    resumed.x.copy_(x)
    resumed.comm.step = step
    resumed.steps(9, lambda x, e: found.append((x, e.grad.clone(), e.origin)))
    for (x1, g1, o1), (x2, g2, o2) in zip(found, expected, strict=True):
        assert torch.equal(x1, x2)
        assert torch.equal(g1, g2)
        assert o1 == o2


@pytest.mark.parametrize("stack", ["doppler butter2", "disk 0.5 0.7"])
def test_a_checkpoint_of_another_filter_is_refused(stack):
    run = Run(STACKS[stack](inner=Quadratic()), SGD(lr=0.5))
    with pytest.raises(ConfigError, match="resume: the checkpoint has no"):
        run.oracle.load_state_dict({})


@pytest.mark.parametrize("stack", STACKS)
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(stack):
    rows = nn.functional.pad(random_rows(12, local=5).float(), (0, 8))  # whole 64 bytes a row
    many = gradients(
        STACKS[stack](inner=given_rows(rows, dtype="float32")), SGD(lr=0.1), 12, ranks=5
    )
    few = gradients(
        STACKS[stack](inner=given_rows(rows[:, :2], dtype="float32")), SGD(lr=0.1), 12, ranks=2
    )
    for a, b in zip(many, few, strict=True):
        assert torch.equal(a.grad[:2], b.grad)


@pytest.mark.parametrize("stack", ["doppler ema", "doppler none", "disk 0.5 0.7"])
def test_a_gradient_in_slices_is_refused(stack):
    oracle = STACKS[stack](inner=Quadratic())
    run = Run(oracle, SGD(lr=0.1))
    with pytest.raises(ConfigError, match="cannot hand one out in slices"):
        oracle(run.x, [None] * 2, sink=lambda where, grad: None)


@pytest.mark.parametrize("kind", ["doppler", "disk"])
def test_two_filters_are_refused(kind):
    cls = find("oracle", kind)
    for inner in (Doppler(inner=Quadratic()), Disk(inner=Quadratic())):
        with pytest.raises(ConfigError, match=r"oracle\.inner: .* filters already"):
            validate(cls, {"inner": inner}, "oracle")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"a": [-1.2], "b": [0.1]}, r"oracle\.a: the filter is unstable.*multiply every a_k"),
        ({"a": [-0.5]}, r"oracle\.b: missing"),
        ({"b": [0, 1]}, r"oracle\.b: b_0 must not be 0"),
        ({"b": [1, -1]}, r"oracle\.b: the filter answers a constant by 0"),
        ({"filter": "butter2"}, r"oracle\.cutoff: missing"),
        ({"filter": "butter2", "cutoff": 0.1, "beta": 0.5}, r"oracle\.beta: has no effect"),
        ({"filter": "ema", "b": [1.0]}, r"oracle\.b: has no effect with filter ema"),
        ({"filter": "emaa"}, r"oracle\.filter: must be"),
        ({"beta": 1.0}, r"oracle\.beta: must be less than 1"),
        ({"gamma": 1.0}, r"oracle\.gamma: unknown field"),
    ],
)  # fmt: skip
def test_a_doppler_that_cannot_serve_is_refused_with_the_field(values, message):
    with pytest.raises(ConfigError, match=message):
        validate(Doppler, {**values, "inner": Quadratic()}, "oracle")


@pytest.mark.parametrize("values", [{"kappa": 0}, {"kappa": 1.5}, {"gamma": -0.1}])
def test_a_disk_that_cannot_serve_is_refused_with_the_field(values):
    with pytest.raises(ConfigError, match=r"oracle\.(kappa|gamma): must be"):
        validate(Disk, {**values, "inner": Quadratic()}, "oracle")


def test_a_gain_that_vanishes_is_refused_when_the_run_is_long_enough_to_meet_it():
    oracle = Doppler(inner=Quadratic(), b=[1.0, -1.0, 1.0])
    oracle.start(1, 1)
    for steps, draws in ((2, 1), (1, 2), (None, 1)):
        with pytest.raises(ConfigError, match=r"oracle\.b: .* at call 1"):
            oracle.start(steps, draws)


def test_a_filter_that_outlasts_the_run_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING, "gossamer"):
        Doppler(inner=Quadratic(), beta=0.99).start(20, 1)
        Doppler(inner=Quadratic(), filter="cheby_default").start(1000, 1)
        assert not caplog.records
        Doppler(inner=Quadratic(), filter="cheby_default").start(200, 1)
    assert "cheby_default still rings" in caplog.text


def test_the_statement_names_the_filter_and_what_it_leaves_of_the_noise():
    ema = Doppler(inner=Quadratic()).statement()["filter"]
    assert (ema["filter"], ema["a"]) == ("ema", [-0.9])
    assert ema["rho_inf"] == pytest.approx(0.1 / 1.9)
    disk = Disk(inner=Quadratic(), kappa=0.5, gamma=0).statement()["filter"]
    assert disk == {"name": "disk", "kappa": 0.5, "gamma": 1.0, "evaluations": 1,
                    "rho_inf": pytest.approx(1 / 3)}  # fmt: skip


class Unknown(Quadratic):
    """Says nothing of its noise."""

    def __call__(self, x, batch, **options):
        found = super().__call__(x, batch, **options)
        return Estimate(found.loss, found.grad, found.weight)


def test_unknown_noise_stays_unknown_and_none_none():
    for oracle, known in [(Unknown(), Origin()), (Quadratic(), Origin(noise_var=0.0))]:
        for estimate in gradients(Doppler(inner=oracle), SGD(lr=0.1), 3):
            assert estimate.origin == estimate.mean_origin == known
    assert gradients(given_rows(random_rows(3)), SGD(lr=0.1), 1)[0].origin.noise_var == 1


class Changing(Given):
    """Gradients given beforehand whose noise has another variance at every call and rank."""

    variances: Any = None

    def __call__(self, x, batch, **ignored):
        found, now = super().__call__(x, batch), self.variances[self._comm.step]
        origins = Origin(now[:, None]), Origin(float(now.mean()))
        return Estimate(found.loss, found.grad, found.weight, *origins)


@pytest.mark.parametrize("stack", STACKS)
def test_noise_that_changes_from_call_to_call_has_the_variance_of_the_convolution(stack):
    steps, stated = 30, []
    variances = torch.from_numpy(np.random.default_rng(0).uniform(0.1, 4.0, (steps, 2)))
    impulses = torch.eye(D, dtype=torch.float64)[:steps, None].expand(-1, 2, -1)

    def run():
        inner = Changing(gradients=impulses, variances=variances)
        return Run(STACKS[stack](inner=inner), SGD(lr=1e-40))

    def watch(x, estimate):
        stated.append((estimate.grad[0].numpy().copy(), estimate.origin, estimate.mean_origin))

    half, resumed = run().steps(11, watch), run()
    resumed.oracle.load_state_dict({k: v.clone() for k, v in half.oracle.state_dict().items()})
    resumed.comm.step = 11
    resumed.steps(steps - 11, watch)
    weights = np.stack([grad for grad, *_ in stated])[:, :steps]
    expected = np.square(weights) @ variances.numpy()
    rows = np.stack([origin.noise_var[:, 0] for _, origin, _ in stated])
    means = [mean.noise_var for *_, mean in stated]
    np.testing.assert_allclose(rows, expected, rtol=1e-9)
    np.testing.assert_allclose(means, expected.mean(1), rtol=1e-9)


class Named(OracleWrapper):
    """A user's own wrapper, which may stand in the list twice."""

    name: str = "named"
    _number: torch.Tensor = PrivateAttr()

    def __call__(self, x, batch, **options):
        return self.inner(x, batch, **options)

    def own_state(self):
        return {"number": self._number}

    def load_own_state(self, state):
        self._number = state["number"].clone()


def test_two_wrappers_of_one_name_keep_their_states_apart():
    def stack(numbers):
        found = Quadratic()
        for number in numbers:
            found = Named(inner=found)
            found._number = torch.full((2, 1), number)
        return found

    saved = stack([1, 2, 3]).state_dict()
    assert set(saved) == {"named.number", "named@2.number", "named@3.number"}
    other = stack([0, 0, 0])
    other.load_state_dict(saved)
    layers = [other, other.inner, other.inner.inner]
    assert [int(layer._number[0]) for layer in layers] == [3, 2, 1]
