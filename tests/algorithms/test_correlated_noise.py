"""Correlated noise in a run: the noise itself, its sampling, its accounting and its resumes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from private_for_tests import noisy, problem, program, run
from quadratic_for_tests import STACKS, Given, gradients
from scipy.linalg import toeplitz

from gossamer.algorithms.decentralized.all_reduce import AllReduce
from gossamer.algorithms.estimates import Estimate, Origin
from gossamer.algorithms.optimizers.adam_bc import AdamBC
from gossamer.algorithms.optimizers.sgd import SGD
from gossamer.algorithms.privacy.accounting import Segment
from gossamer.algorithms.privacy.accounting import spent as epsilon_of
from gossamer.algorithms.privacy.doppler import Doppler
from gossamer.algorithms.privacy.noise_strategies import banded, inverse_coefficients
from gossamer.algorithms.problems import DataPlan
from gossamer.algorithms.sampling import Sampler
from gossamer.algorithms.tasks.arrays import TensorDataset
from gossamer.runtime import ConfigError

FOUR = {"name": "banded", "bands": 4}
ROOT = {"name": "sqrt-toeplitz", "bands": 4}
PAIRWISE = {"noise_mode": "pairwise", "pairwise_multiplier": 5.0}
MODES = {mode: {"noise_mode": mode} for mode in ("split", "rank0", "replicated", "local")}
MODES["pairwise"] = PAIRWISE
FEW = {"batch_size": 6}


def dense(strategy, steps):
    """K, (steps, steps) float64."""
    column = np.zeros(steps)
    column[: len(strategy)] = strategy[:steps]
    return toeplitz(column, np.zeros(steps))


# --- the noise --------------------------------------------------------------------------------


@pytest.mark.parametrize("correlation", [FOUR, ROOT], ids=["banded", "sqrt-toeplitz"])
@pytest.mark.parametrize("mode", MODES)
def test_the_strategy_times_the_noise_of_a_run_is_white_noise_of_its_keys(mode, correlation):
    steps, options = 11, MODES[mode] | {"correlation": correlation, "steps": 11}
    gossip = mode in ("local", "pairwise")
    noise, made, _ = noisy(4, steps, backprop=FEW, gossip=gossip, **options)
    source = made.oracle._noise
    assert np.dot(source.strategy, source.strategy) == pytest.approx(1)
    white = torch.zeros(steps, 4, made.layout.d)
    for t in range(steps):
        source.white.add_(white[t], made.layout, t, source.white.scales(2.0))
    rows = [[made.layout.values(row) for row in each] for each in white]
    expected = torch.stack([torch.stack(each) for each in rows])
    back = torch.einsum(
        "st,tnd->snd", torch.from_numpy(dense(source.strategy, steps)).float(), noise
    )
    # Each step rounds at 6e-8 of values up to 50.
    torch.testing.assert_close(back, expected, rtol=0, atol=3e-5)


def test_the_variance_of_each_step_is_that_of_its_row_and_the_optimizer_knows_it():
    steps, options = 9, {"correlation": FOUR, "backprop": FEW, "steps": 9}
    wide = {"width": 20_000, "noise_mode": "local"}
    known = []
    for calls in range(1, steps + 1):
        noise, made, estimate = noisy(2, calls, **(options | (wide if calls == steps else {})))
        known.append((estimate.origin.noise_var, estimate.mean_origin.noise_var))
    rows = np.cumsum(inverse_coefficients(made.oracle.noise_strategy, steps) ** 2)
    np.testing.assert_allclose([row for row, _ in known], rows * (2 / 6) ** 2)
    np.testing.assert_allclose([mean for _, mean in known], rows * (2 / 6) ** 2 / 2)
    # 480,000 normals: a standard error of .2%.
    measured = noise.flatten(1).double().var(dim=1).numpy()
    np.testing.assert_allclose(measured, 4 * rows, rtol=0.01)


class Coloured(Given):
    """Gradients given beforehand whose noise is said to be correlated by ``k``."""

    k: tuple[float, ...]

    @property
    def noise_strategy(self):
        return self.k

    def __call__(self, x, batch, **ignored):
        found = super().__call__(x, batch)
        inverse = inverse_coefficients(self.k, self._comm.step + 1)
        origin = Origin(float(inverse @ inverse))
        return Estimate(found.loss, found.grad, found.weight, origin, origin)


@pytest.mark.parametrize("stack", STACKS)
def test_a_filter_knows_the_variance_of_correlated_noise_behind_it(stack):
    steps, k = 30, tuple(banded(30, 5).tolist())
    impulses = torch.eye(40, dtype=torch.float64)[:steps, None].expand(-1, 2, -1)
    found = gradients(STACKS[stack](inner=Coloured(gradients=impulses, k=k)), SGD(lr=1e-40), steps)
    weights = np.stack([estimate.grad[0].numpy() for estimate in found])[:, :steps]
    expected = np.square(weights @ np.linalg.inv(dense(k, steps))).sum(axis=1)
    stated = [estimate.origin.noise_var for estimate in found]
    np.testing.assert_allclose(stated, expected, rtol=1e-9)


# --- sampling ---------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(8, 30), min_size=1, max_size=4),
    blocks=st.integers(1, 5),
    draws=st.integers(1, 3),
    rate=st.sampled_from([None, 0.2]),
)
def test_an_example_is_drawn_at_most_once_in_as_many_draws_as_blocks(lengths, blocks, draws, rate):
    task = problem(1, sum(lengths))
    task.shards = tuple(np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1]))
    plan = DataPlan(1, "poisson", indices=True, rate=rate, blocks=blocks)
    sampler = Sampler(task, plan, range(len(lengths)), seed=3)
    last, number = {}, 0
    for step in range(20):
        for draw in sampler.batches(step, draws):
            assert {batch.block for batch in draw} == {number % blocks}
            for batch in draw:
                for place in batch.indices.tolist():
                    assert number - last.get(place, -blocks) >= blocks
                    last[place] = number
            number += 1


@pytest.mark.parametrize("rate", [None, 0.07])
def test_blocks_keep_the_expected_batch(rate):
    task, steps = problem(2, 203), 4000
    sampler = Sampler(task, DataPlan(7, "poisson", rate=rate, blocks=5), range(2), seed=0)
    sizes = torch.zeros(2)
    for step in range(steps):
        sizes += torch.tensor([len(batch) for batch in sampler.batches(step, 1)[0]])
    expected = torch.tensor([102, 101]) * rate if rate else torch.tensor([7.0, 7.0])
    # A standard error of sqrt(7 / 4000) = .04.
    assert (sizes / steps - expected).abs().max() < 0.17


def test_a_batch_out_of_turn_is_refused():
    made = program(correlation=ROOT, noise_multiplier=1.0, backprop=FEW)
    made.oracle(made.state.x, made._batches()[0])
    made.comm.step = 2  # the second batch is left out
    with pytest.raises(ConfigError, match="leaves drawn batches out"):
        made.oracle(made.state.x, made._batches()[0])


# --- accounting -------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "rate"), [("split", 24 / 240), ("local", 6 / 60)])
def test_a_stream_is_counted_as_the_turns_of_a_block(mode, rate):
    options = {"correlation": FOUR, "backprop": FEW, "noise_mode": mode, "steps": 10}
    _, made, _ = noisy(4, 10, gossip=mode == "local", delta=1e-4, accountant="rdp", **options)
    expected = Segment(2.0, 4 * rate, 3)
    assert made.oracle._ledger.segments(0) == (expected,)
    assert made.oracle.spent() == epsilon_of([expected], 1e-4, "rdp")


def test_the_target_is_reached_by_the_turns_of_a_block():
    # A batch is a whole block, which is counted exactly.
    made = run(program(epsilon=3.0, delta=1e-4, steps=10, correlation=FOUR), 10)
    said = made.oracle.statement()["privacy"]
    assert said["epsilon_if_secret"] == pytest.approx(3.0)
    assert said["correlation"] == FOUR
    assert made.oracle._ledger.segments(0)[0].steps == 3


# --- resumes ----------------------------------------------------------------------------------


def filtered(**options):
    algorithm = AllReduce(optimizer=AdamBC(lr=0.05))
    options = {"correlation": FOUR, "backprop": FEW, "steps": 12, "delta": 1e-4, **options}
    around = {"around": lambda oracle: Doppler(inner=oracle, beta=0.5)}
    return program(2, algorithm=algorithm, **{"noise_multiplier": 1.0, **options, **around})


def resumed(half, **options):
    tensors, scalars = half.snapshot()
    made = filtered(**options)
    made.restore({k: v.clone() for k, v in tensors.items()}, scalars)
    made.comm.step = half.comm.step
    return made


@pytest.mark.parametrize("stop", [2, 5])
def test_a_resumed_run_repeats_the_undisturbed_one(stop):
    whole = run(filtered(), 9)
    again = run(resumed(run(filtered(), stop)), 9 - stop)
    assert torch.equal(again.state.x, whole.state.x)
    assert torch.equal(again.state.optimizer.noise, whole.state.optimizer.noise)
    assert again.oracle.inner.spent() == whole.oracle.inner.spent()


def test_a_longer_run_goes_on_with_the_strategy_it_began_with():
    half = run(filtered(), 5)
    longer = resumed(half, steps=40)
    assert longer.oracle.noise_strategy == half.oracle.noise_strategy
    assert longer.oracle.noise_strategy != filtered(steps=40).oracle.noise_strategy


def test_a_run_that_goes_on_otherwise_begins_a_stream_that_is_counted_apart():
    other = resumed(run(filtered(), 6))
    kept = other.oracle.inner._noise._stream.state_dict()
    assert all(block.abs().max() > 0 for block in kept.values())
    other.oracle.branch()
    source = other.oracle.inner._noise
    assert all(block.abs().max() == 0 for block in source._stream.state_dict().values())
    grad = other.oracle(other.state.x, other._batches()[0])
    # The first row of a stream, and of the filter behind it: as large as white noise over k_0.
    assert grad.origin.noise_var == pytest.approx(2 * (1 / 12 / source.strategy[0]) ** 2)
    assert other.oracle.inner._ledger.history == [(1.0, 6), (1.0, 1)]
    assert other.oracle.inner._ledger.segments(0) == (Segment(1.0, 0.2, 2), Segment(1.0, 0.2, 1))
    # It stays apart where it is saved before its first release, and after.
    again = resumed(resumed_and_branched(run(filtered(), 6)))
    assert run(again, 1).oracle.inner._ledger.history == [(1.0, 6), (1.0, 1)]


def resumed_and_branched(half):
    made = resumed(half)
    made.oracle.branch()
    return made


def test_a_stream_begins_anew_where_sigma_changes():
    other = resumed(run(filtered(), 6), noise_multiplier=2.0)
    assert run(other, 1).oracle.inner._ledger.history == [(1.0, 6), (2.0, 1)]
    assert int(other.oracle.inner._noise._place[0, 0]) == 1


def test_a_branch_that_would_pass_the_target_is_refused():
    options = {"noise_multiplier": None, "epsilon": 3.0, "backprop": {"batch_size": 30}}
    made = resumed(run(filtered(**options), 8), **options)
    made.oracle.branch()  # 2 and 1 turns of 4 bands: the 3 that sigma was found for
    made = resumed(run(filtered(**options), 6), **options)
    with pytest.raises(ConfigError, match="4 turns of a block where sigma was found for 3"):
        made.oracle.branch()


def test_a_restart_begins_the_stream_for_the_calls_that_remain():
    made = program(correlation=FOUR, noise_multiplier=1.0, backprop=FEW, steps=12)
    made.oracle.restart(7)
    assert made.oracle.noise_strategy == pytest.approx(banded(7, 4))
    run(made, 2)
    with pytest.raises(ConfigError, match="noise was found for 7 gradients, some of which"):
        made.oracle.restart(3)


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backprop": {"sampling": "full"}}, r"oracle\.sampling: full .* needs 4 steps"),
        ({"backprop": {"batch_size": 70}}, r"correlation\.bands: 4 .* 0\.2917.* at most 3 bands"),
        ({"clip": "adaptive"}, "clip: adaptive moves C"),
        ({"correlation": {"name": "banded"}}, r"oracle\.correlation\.bands: missing"),
        ({"correlation": {"name": "banded", "bands": 0}}, r"correlation\.bands: must be"),
        ({"correlation": {"name": "band", "bands": 2}}, r"correlation\.name: must be"),
        ({"correlation": {**FOUR, "width": 2}}, r"correlation\.width: unknown field"),
        ({"steps": None}, "banded is found for a number of steps.*sqrt-toeplitz"),
        ({"steps": 3}, r"oracle\.correlation\.bands: 4 is more than the 3 gradients"),
        ({"task": problem(1, 3), "backprop": {"batch_size": 1}, "delta": 0.1}, "bands"),
    ],
)
def test_what_has_no_known_sensitivity_is_refused(options, message):
    options = {"correlation": FOUR, "noise_multiplier": 1.0, "steps": 8, "backprop": FEW, **options}
    with pytest.raises(ConfigError, match=message):
        run(program(**options), 1)


def test_an_empty_batch_takes_its_turn_too():
    made = program(correlation=ROOT, noise_multiplier=1.0, backprop=FEW)
    drawn = made._batches()[0][0]
    empty = replace(drawn, inputs=tuple(t[:0] for t in drawn.inputs))
    made.oracle(made.state.x, [empty])
    with pytest.raises(ConfigError, match="leaves drawn batches out"):
        made.oracle(made.state.x, [replace(empty, drawn=(1, 0))])


def test_a_half_precision_model_has_correlated_noise_in_float32():
    task = problem(hidden=5)
    task.module.bfloat16()
    task.train = TensorDataset((task.train.tensors[0].bfloat16(), task.train.tensors[1]))
    made = run(program(task=task, steps=3, noise_multiplier=1.0, correlation=ROOT), 3)
    assert made.oracle._noise._z.dtype == torch.float32
    assert made.state.x.dtype == torch.bfloat16
    assert torch.isfinite(made.state.x).all()
