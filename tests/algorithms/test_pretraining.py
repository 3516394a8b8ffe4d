"""Public examples beside private ones: the split, the switch, the mixes, what epsilon covers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from gossamer.algorithms.decentralized.all_reduce import AllReduce
from gossamer.algorithms.decentralized.dsgd import DSGD
from gossamer.algorithms.decentralized.local_sgd import LocalSGD
from gossamer.algorithms.optimizers.adam import AdamW
from gossamer.algorithms.optimizers.sgd import SGD
from gossamer.algorithms.oracles.backprop import Backprop
from gossamer.algorithms.oracles.wrapper import OracleWrapper
from gossamer.algorithms.privacy import accounting
from gossamer.algorithms.privacy.dp import DP
from gossamer.algorithms.privacy.public import PublicData
from gossamer.algorithms.privacy.public_schedule import mean_loss, public_weight
from gossamer.algorithms.privacy.public_split import split_public
from gossamer.algorithms.problems import Problem
from gossamer.algorithms.program import TrainingProgram
from gossamer.algorithms.tasks.arrays import TensorDataset
from gossamer.runtime import Communicator, ConfigError, StackedTransport
from gossamer.runtime.component import validate
from gossamer.topologies import build

EXAMPLES, FEATURES = 203, 12


class Filter(OracleWrapper):
    """A filter that keeps what it has seen since it started anew."""

    name: str = "filter"
    seen: list = Field(default_factory=list)
    restarts: list = Field(default_factory=list)

    def __call__(self, x, batch, *, combine=None, sink=None):
        estimate = self.inner(x, batch, combine=combine)
        self.seen.append(self.inner._comm.step)
        return estimate

    def restart(self, calls):
        super().restart(calls)
        self.seen.clear()
        self.restarts.append(calls)


def problem(n=1):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(EXAMPLES, FEATURES, generator=generator)
    y = (x[:, 0] > 0).long()
    torch.manual_seed(1)
    module = nn.Linear(FEATURES, 2)

    def loss(model, inputs):
        return F.cross_entropy(model(inputs[0]), inputs[1])

    data = TensorDataset((x, y))
    return Problem(module, data, tuple(np.array_split(np.arange(EXAMPLES), n)), loss, test=data)


def stack(dp=None, backprop=None, between=(), **public):
    base = Backprop(**{"batch_size": 10, **(backprop or {})})
    dp = {"noise_seed": 5, "delta": 1e-4, "accountant": "rdp", **(dp or {"noise_multiplier": 1.0})}
    oracle = validate(DP, {**dp, "inner": base}, "oracle")
    for cls in between:
        oracle = cls(inner=oracle)
    return validate(PublicData, {"fraction": 0.3, **public, "inner": oracle}, "oracle")


def program(n=1, *, steps=20, algorithm=None, task=None, seed=0, **options):
    comm = Communicator(build("ring", n), StackedTransport(), steps=steps, seed=seed)
    algorithm = algorithm or AllReduce(optimizer=SGD(lr=0.5))
    made = TrainingProgram(comm, task or problem(n), stack(**options), algorithm)
    return made.start()


def run(made, steps):
    for _ in range(steps):
        made.step()
        made.comm.step += 1
    return made


def releases(made):
    return made.oracle.statement()["privacy"]["steps"]


# --- the split --------------------------------------------------------------------------------


@pytest.mark.parametrize("indices", [None, "first"])
@pytest.mark.parametrize("n", [1, 4])
def test_the_parts_are_disjoint_and_cover_the_training_set(n, indices):
    shards = [np.arange(EXAMPLES)[rank::n] for rank in range(n)]
    split = split_public(shards, seed=3, fraction=0.3, indices=indices, validation=0.25)
    assert split.sizes == (142, 46, 15)
    parts = [*split.private, *split.training, *split.validation]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(EXAMPLES))
    for shard, private in zip(shards, split.private, strict=True):
        assert set(private) <= set(shard)
    assert max(map(len, split.training)) - min(map(len, split.training)) <= 1


def test_the_choice_is_the_seeds_and_not_that_of_the_ranks():
    one, four = (split_public(problem(n).shards, seed=3, fraction=0.3) for n in (1, 4))
    for part in ("private", "training"):
        whole = [np.sort(np.concatenate(getattr(split, part))) for split in (one, four)]
        assert np.array_equal(*whole)
    other = split_public(problem().shards, seed=4, fraction=0.3)
    assert not np.array_equal(other.private[0], one.private[0])


@pytest.mark.parametrize("suffix", ["txt", "npy"])
def test_a_file_says_which_examples_are_public(tmp_path, suffix):
    places, path = np.array([5, 3, 200, 8]), tmp_path / f"public.{suffix}"
    np.save(path, places) if suffix == "npy" else path.write_text("5\n3\n200\n8\n")
    split = split_public(problem().shards, seed=0, indices=str(path))
    assert split.training[0].tolist() == [3, 5, 8, 200]
    assert split.sizes == (199, 4, 0)


@pytest.mark.parametrize("n", [1, 4])
def test_private_batches_never_hold_a_public_example(n):
    made = program(n, mix="dpmd", backprop={"batch_size": 30})
    private = [set(map(tuple, made.problem.train[torch.from_numpy(p)][0].tolist()))
               for p in made.oracle._split.private]  # fmt: skip
    for _ in range(5):
        for rank, batch in enumerate(made._batches()[0]):
            assert set(map(tuple, batch.inputs[0].tolist())) <= private[rank]
        made.comm.step += 1


def test_figures_of_privacy_are_those_of_the_private_part():
    said = program(4, mix="only-private").oracle.statement()
    assert said["privacy"]["examples"] == 142
    assert said["privacy"]["rate"] == pytest.approx(40 / 142)
    assert said["public_data"]["public_examples"] == 61
    assert "epsilon refers to the private examples" in said["public_data"]["covers"]


# --- the switch -------------------------------------------------------------------------------


def test_nothing_is_released_before_the_switch_and_epsilon_is_met_after_it():
    made = program(switch=0.6, dp={"epsilon": 2.0})
    run(made, 12)
    assert releases(made) == 0
    assert made.oracle.statement()["privacy"]["epsilon_if_secret"] == 0
    run(made, 8)
    said = made.oracle.statement()["privacy"]
    assert said["steps"] == 8
    assert 1.95 < said["epsilon_if_secret"] <= 2.0
    sigma = accounting.calibrate(2.0, 1e-4, 10 / 142, 8, "rdp")
    assert said["noise_multiplier"] == sigma
    assert made.oracle.statement()["public_data"]["switched_at_step"] == 12


def test_no_gradient_of_a_private_example_is_taken_before_the_switch(monkeypatch):
    made = program(switch=0.5)
    monkeypatch.setattr(Backprop, "clipped", lambda *_, **__: pytest.fail("a private gradient"))
    run(made, 10)
    with pytest.raises(pytest.fail.Exception, match="a private gradient"):
        run(made, 1)


def validation_losses(monkeypatch, losses):
    """Make the validation losses those given."""
    given = iter(losses)
    monkeypatch.setattr("gossamer.algorithms.privacy.public.mean_loss", lambda *_: next(given))


def test_patience_runs_out_after_so_many_evaluations_without_a_lower_loss(monkeypatch):
    made = program(steps=40, dp={"epsilon": 2.0}, patience=2, evaluate_every=3, latest=0.9)
    first = made.oracle.inner._ledger.sigma
    validation_losses(monkeypatch, [1.0, 0.9, math.nan, 0.8, 0.9, 0.8])  # at steps 3, 6, ... 18
    run(made, 18)
    assert releases(made) == 0
    run(made, 1)
    assert made.oracle.statement()["public_data"]["switched_at_step"] == 18
    assert made.oracle.inner._ledger.sigma < first  # found for 22 releases, not 40
    run(made, 21)
    said = made.oracle.statement()["privacy"]
    assert said["steps"] == 22
    assert 1.95 < said["epsilon_if_secret"] <= 2.0


def test_the_switch_comes_at_the_latest_while_the_loss_still_falls():
    made = run(program(patience=20, evaluate_every=1, latest=0.7), 20)
    assert made.oracle.statement()["public_data"]["switched_at_step"] == 14
    assert releases(made) == 6


@pytest.mark.parametrize("algorithm", [AllReduce, DSGD])
def test_the_validation_loss_is_that_of_all_ranks_held_out_examples(algorithm):
    made = program(4, algorithm=algorithm(optimizer=SGD(lr=0.5)), validation=0.5)
    run(made, 3)
    split, task = made.oracle._split, made.problem
    losses, sizes = [], []
    for row, places in zip(made.state.x, split.validation, strict=True):
        made.layout.bind(task.module, row)
        losses.append(task.loss(task.module, task.train[torch.from_numpy(places)]).item())
        sizes.append(len(places))
    whole = np.average(losses, weights=sizes)
    found = mean_loss(made.comm, task, made.oracle._base, made.state.x, split.validation)
    assert found == pytest.approx(whole, rel=1e-6)


def test_the_switch_resets_the_first_moment_alone(monkeypatch):
    seen = []
    whole = AdamW.rule

    def rule(self, state, x, grad, comm, origin):
        before = (state.m.clone(), state.v.clone(), state.t, grad.clone())
        found = whole(self, state, x, grad, comm, origin)
        seen.append((*before, origin, state.m.clone(), state.v.clone(), state.t))
        return found

    monkeypatch.setattr(AdamW, "rule", rule)
    algorithm = AllReduce(optimizer=AdamW(lr=0.01))
    run(program(switch=0.5, algorithm=algorithm), 20)
    assert [origin.restart for *_, origin, _, _, _ in seen] == [k == 10 for k in range(20)]
    m, v, t, grad, origin, new_m, new_v, new_t = seen[10]
    assert float(m.abs().max()) > 0
    torch.testing.assert_close(new_m, 0.1 * grad, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(new_v, 0.999 * v + 0.001 * grad**2, rtol=1e-6, atol=1e-12)
    assert (t, new_t) == (10, 11)
    assert origin.noise_var == pytest.approx((1 / 10) ** 2)


@pytest.mark.parametrize("switch", [0.5, "patience"])
def test_inner_filters_start_anew_at_the_switch(switch):
    made = program(switch=switch, between=[Filter])
    made.oracle.inner.seen.append("old")
    run(made, 20)
    assert made.oracle.inner.restarts == [10]
    assert made.oracle.inner.seen == list(range(10, 20))


@pytest.mark.parametrize("algorithm", [AllReduce, DSGD])
def test_all_ranks_switch_at_the_same_step(algorithm):
    made = program(4, algorithm=algorithm(optimizer=SGD(lr=5.0)), steps=60, evaluate_every=2)
    restarts = []
    for _ in range(60):
        estimate = made.oracle(made.state.x, made._batches()[0])
        restarts.append(estimate.origin.restart or estimate.mean_origin.restart)
        made.comm.step += 1
    assert sum(restarts) == 1
    assert restarts.index(True) == made.oracle._switched


def test_local_steps_draw_public_batches_of_their_own_and_releases_are_counted_one_by_one():
    algorithm = LocalSGD(optimizer=SGD(lr=0.1), local_steps=2)
    made = program(2, switch=0.5, steps=8, algorithm=algorithm, dp={"epsilon": 2.0})
    assert made.oracle.inner._ledger.planned == 8
    made.step()
    first, second = made.oracle._drawn[1]
    assert not torch.equal(first[0].inputs[0], second[0].inputs[0])
    made.comm.step += 1
    run(made, 7)
    assert releases(made) == 8


def test_points_are_combined_in_the_public_phase_too():
    made = program(switch=0.5)
    x, batch = made.state.x, made._batches()[0]
    ahead = x + 0.1
    wanted = ([(1.0, ahead)], [(1.0, x)], [(2.5, ahead), (-1.5, x)])
    grads = [made.oracle(x, batch, combine=points).grad.clone() for points in wanted]
    torch.testing.assert_close(grads[2], 2.5 * grads[0] - 1.5 * grads[1], rtol=1e-5, atol=1e-6)


# --- mixes ------------------------------------------------------------------------------------


def test_weights_of_the_mixes():
    given = {"steps": 100, "public": 72, "private": 1365}
    assert public_weight("only-public", 3, **given) == 1
    assert public_weight("only-private", 3, **given) == 0
    assert public_weight("sample", 3, **given) == pytest.approx(72 / 1437)
    found = [public_weight("dpmd", t, **given) for t in (0, 50, 100)]
    assert found == pytest.approx([0, 1 - math.sqrt(0.5), 1])


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("mix", ["dpmd", "sample"])
def test_a_mix_is_the_weighted_sum_of_both_gradients(mix, n):
    task = problem(n)
    full = {"dp": {"noise_multiplier": 0.0, "clip_norm": 1e6}, "backprop": {"sampling": "full"}}
    made = program(n, mix=mix, sampling="full", task=task, **full)
    made.comm.step = 7
    estimate = made.oracle(made.state.x, made._batches()[0])
    grads = {}
    for part in ("training", "private"):
        places = np.concatenate(getattr(made.oracle._split, part))
        made.layout.bind(task.module, made.state.x[0], torch.zeros_like(made.state.x[0]))
        task.loss(task.module, task.train[torch.from_numpy(places)]).backward()
        grads[part] = torch.cat([p.grad.flatten() for p in task.module.parameters()])
    private, public, _ = made.oracle._split.sizes
    weight = public_weight(mix, 7, 20, public, private)
    mean = made.layout.values(estimate.grad.mean(0))
    expected = weight * grads["training"] + (1 - weight) * grads["private"]
    # Means over unequal shards, added in another order than over the whole set.
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-7)


def test_the_noise_of_a_mix_is_told_as_large_as_it_is():
    made = program(mix="sample")
    private, public, _ = made.oracle._split.sizes
    estimate = made.oracle(made.state.x, made._batches()[0])
    share = private / (private + public)
    assert estimate.origin.noise_var == pytest.approx((share / 10) ** 2)
    assert estimate.mean_origin.noise_var == pytest.approx((share / 10) ** 2)


def test_public_examples_alone_release_nothing_and_private_ones_alone_the_same_as_dp():
    only = run(program(mix="only-public"), 20)
    assert releases(only) == 0
    assert run(program(mix="only-private"), 20).oracle.statement()["privacy"]["steps"] == 20


def test_public_gradients_are_scaled():
    rows = []
    for scale in (1.0, 4.0):
        made = program(mix="only-public", scale=scale)
        rows.append(made.oracle(made.state.x, made._batches()[0]).grad.clone())
    assert torch.equal(4 * rows[0], rows[1])


# --- resumes and ranks ------------------------------------------------------------------------


@pytest.mark.parametrize("at", [4, 10, 13])
@pytest.mark.parametrize(
    ("n", "options"),
    [
        (1, {"switch": 0.5}),
        (4, {"switch": 0.5}),
        (4, {"evaluate_every": 2, "patience": 1}),
        (1, {"evaluate_every": 2, "dp": {"epsilon": 2.0}}),
        (4, {"mix": "dpmd"}),
    ],
)
def test_a_resumed_run_repeats_the_undisturbed_one(n, options, at):
    options = {**options, "algorithm": AllReduce(optimizer=AdamW(lr=0.05))}
    whole = run(program(n, **options), 16)
    half = run(program(n, **options), at)
    tensors, scalars = half.snapshot()
    resumed = program(n, **options)
    resumed.restore({k: v.clone() for k, v in tensors.items()}, scalars)
    resumed.comm.step = at
    run(resumed, 16 - at)
    assert torch.equal(resumed.state.x, whole.state.x)
    assert resumed.oracle.statement() == whole.oracle.statement()


def test_ranks_rows_do_not_depend_on_each_other():
    made = program(4, algorithm=DSGD(optimizer=SGD(lr=0.5)), switch=0.5)
    batches = made._batches()[0]
    rows = made.oracle(made.state.x, batches).grad.clone()
    moved = made.state.x.clone()
    moved[1:] += 1.0
    made.oracle._drawn = (-1, [])
    made.oracle._call = (-1, 0)
    assert torch.equal(made.oracle(moved, batches).grad[0], rows[0])


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": None}, "write it, or a file of indices"),
        ({"indices": "somewhere.txt"}, "not both"),
        ({"fraction": 0.002}, "leaves 0 of 203 examples for public training"),
        ({"fraction": 0.999}, "nothing private is left"),
        ({"fraction": 0.01}, "public validation"),
        ({"fraction": None, "indices": "missing.txt"}, "cannot read missing.txt"),
        ({"mix": "dpmd", "patience": 5}, "patience: has no effect"),
        ({"mix": "sample", "switch": 0.5}, "switch: has no effect with mix: sample"),
        ({"switch": 0.5, "validation": 0.5}, "validation: has no effect with switch: 0.5"),
        ({"sampling": "full", "batch_size": 3}, "batch_size: has no effect with sampling: full"),
        ({"mix": "only-private", "scale": 2.0}, "scale: has no effect"),
        ({"switch": 0.01}, "leaves 0 public and 20 private"),
        ({"switch": 0.99}, "leaves 20 public and 0 private"),
        ({"switch": 0.5, "steps": None}, "needs a number of steps"),
        ({"mix": "dpmd", "steps": None}, "needs a number of steps"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        run(program(**options), 1)


def test_dp_must_be_inside():
    with pytest.raises(ConfigError, match="public goes around dp"):
        validate(PublicData, {"fraction": 0.1, "inner": Backprop()}, "oracle")
    inside = stack()
    with pytest.raises(ConfigError, match="already"):
        validate(PublicData, {"fraction": 0.1, "inner": inside}, "oracle")
    with pytest.raises(ConfigError, match=r"public hands on none.*\[\.\.\., dp, public\]"):
        validate(DP, {"noise_multiplier": 1.0, "inner": inside}, "oracle")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3\n3\n", "names an example twice"),
        ("3\n900\n", "names 900"),
        ("3\nfour\n", "whole number"),
    ],
)
def test_a_wrong_file_of_indices_is_refused(tmp_path, text, message):
    path = tmp_path / "public.txt"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        split_public(problem().shards, seed=0, indices=str(path))
