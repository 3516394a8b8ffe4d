"""The private oracle over a run: its batches, what epsilon counts, secrets on a resume."""

from functools import partial

import numpy as np
import pytest
import torch
from private_for_tests import EXAMPLES, FEATURES, problem, program, run
from torch import nn

from gossamer.algorithms.decentralized.all_reduce import AllReduce
from gossamer.algorithms.optimizers.sgd import SGD
from gossamer.algorithms.privacy import clipping
from gossamer.algorithms.privacy.adaptive import shared_noise
from gossamer.algorithms.privacy.disk import Disk
from gossamer.algorithms.privacy.doppler import Doppler
from gossamer.algorithms.problems import Batch
from gossamer.runtime import ConfigError
from gossamer.runtime.perturb import perturb_


def test_empty_batches_get_noise_and_count():
    task = problem(4, examples=200)
    made = program(4, noise_multiplier=1.0, task=task, backprop={"batch_size": 1})
    before, empty = made.state.x.clone(), 0
    for _ in range(200):
        empty += sum(len(batch) == 0 for batch in made._batches()[0])
        made.step()
        assert not torch.equal(made.state.x, before)
        before = made.state.x.clone()
        made.comm.step += 1
    assert empty > 200  # q = .02 of 50: a rank's batch is empty in a third of the steps
    said = made.oracle.statement()["privacy"]
    assert said["steps"] == 200
    assert said["rate"] == pytest.approx(0.02)


def test_the_rate_is_one_for_all_ranks_where_shards_differ():
    task = problem(4, examples=203)
    made = program(4, noise_multiplier=1.0, task=task, backprop={"batch_size": 10})
    sizes = torch.zeros(4)
    for _ in range(400):
        sizes += torch.tensor([len(b) for b in made._batches()[0]])
        made.comm.step += 1
    share = sizes / torch.tensor([len(s) for s in task.shards]) / 400
    assert (share - 40 / 203).abs().max() < 0.01


def test_epsilon_reaches_its_target_at_the_last_step():
    made = run(program(epsilon=3.0, delta=1e-4, steps=20), 20)
    said = made.oracle.statement()["privacy"]
    assert 2.9 < said["epsilon_if_secret"] <= 3.0
    with pytest.raises(ConfigError, match="more gradients than the 20"):
        made.step()


def test_two_gradients_of_one_batch_are_refused():
    made = program(noise_multiplier=1.0)
    made.oracle(made.state.x, made._batches()[0])
    with pytest.raises(ConfigError, match=r"two gradients of one batch.*draw 0 of step 0 after"):
        made.oracle(made.state.x, made._batches()[0])  # drawn again: other objects, same examples
    made.comm.step += 1
    made.oracle(made.state.x, made._batches()[0])


class Eager(AllReduce):
    """Takes its first gradient in init, of the batch that step 0 is given again."""

    def init(self, comm, oracle, x, batches):
        oracle(x, batches[0])
        return super().init(comm, oracle, x, batches)


def test_the_batch_of_init_is_not_taken_again_by_the_first_step():
    made = program(noise_multiplier=1.0, algorithm=Eager(optimizer=SGD(lr=0.5)))
    with pytest.raises(ConfigError, match="two gradients of one batch"):
        made.step()


def test_a_gradient_before_the_state_is_loaded_is_not_left_uncounted():
    full = {"noise_multiplier": 1.0, "delta": 1e-4, "backprop": {"sampling": "full"}}
    tensors, scalars = run(program(**full), 2).snapshot()
    resumed = program(algorithm=Eager(optimizer=SGD(lr=0.5)), **full)
    with pytest.raises(ConfigError, match="1 private gradients were released before the state"):
        resumed.restore(tensors, scalars)


def test_a_batch_put_together_by_hand_is_refused():
    made = program(noise_multiplier=1.0)
    by_hand = [Batch(made.problem.train[torch.arange(5)])]
    with pytest.raises(ConfigError, match="counts batches by the coins that drew them"):
        made.oracle(made.state.x, by_hand)


@pytest.mark.parametrize("clip", ["flat", "adaptive"])
def test_a_resumed_run_repeats_the_undisturbed_one_and_its_epsilon(clip):
    options = {"noise_multiplier": 1.0, "clip": clip, "delta": 1e-4}
    whole = run(program(2, **options), 6)
    half = run(program(2, **options), 3)
    tensors, scalars = half.snapshot()
    resumed = program(2, **options, seed=0)
    resumed.restore({k: v.clone() for k, v in tensors.items()}, scalars)
    resumed.comm.step = 3
    run(resumed, 3)
    assert torch.equal(resumed.state.x, whole.state.x)
    assert resumed.oracle.spent() == whole.oracle.spent()


def test_a_target_is_for_the_steps_it_was_found_for():
    tensors, scalars = program(epsilon=3.0, delta=1e-4, accountant="rdp", steps=5).snapshot()
    longer = program(epsilon=3.0, delta=1e-4, accountant="rdp", steps=9)
    with pytest.raises(ConfigError, match="found for 5 gradients, this run asks for 9"):
        longer.restore(tensors, scalars)


def saved(steps=2, **options):
    """The oracle's part of a checkpoint after some steps."""
    made = run(program(delta=1e-4, **{"noise_multiplier": 1.0, **options}), steps)
    return made.oracle.state_dict()


def test_a_run_that_goes_on_otherwise_takes_other_secrets():
    state = saved(noise_seed=None)
    same, other = (program(delta=1e-4, noise_multiplier=1.0, noise_seed=None) for _ in range(2))
    for made in (same, other):
        made.oracle.load_state_dict(state)
    assert torch.equal(same.oracle._noise.keys, state["dp.keys"])
    other.oracle.branch()
    assert not (other.oracle._noise.keys == state["dp.keys"]).any()
    coins = [made._sampler._plan.seed_of(0) for made in (same, other)]
    assert coins[0] != coins[1]  # the sampler follows


def test_a_seeded_run_stays_not_private_when_it_is_resumed_without_its_seed():
    resumed = program(delta=1e-4, noise_multiplier=1.0, noise_seed=None)
    resumed.oracle.load_state_dict(saved(noise_seed=5))
    resumed.oracle.branch()
    said = resumed.oracle.statement()["privacy"]
    assert not said["private"]
    assert "NOT PRIVATE" in said["reservations"][0]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"backprop": {"batch_size": 30}}, r"others: rate \(0.25 -> 0.125\)"),
        ({"delta": 1e-5}, r"others: delta \(0.0001 -> 1e-05\)"),
        ({"task": problem(examples=EXAMPLES - 40)}, r"examples \(240.0 -> 200.0\)"),
        ({"correlation": {"name": "sqrt-toeplitz", "bands": 3}}, r"bands \(1.0 -> 3.0\)"),
    ],
    ids=["rate", "delta", "examples", "bands"],
)
def test_what_epsilon_is_counted_with_may_not_change_on_a_resume(changed, named):
    state = saved()
    other = program(**{"delta": 1e-4, "noise_multiplier": 1.0, **changed})
    with pytest.raises(ConfigError, match=named):
        other.oracle.load_state_dict(state)


def test_sigma_may_change_more_than_once_and_each_part_counts():
    state = saved()
    for sigma in (2.0, 3.0):
        made = program(delta=1e-4, noise_multiplier=sigma)
        made.oracle.load_state_dict(state)
        state = run(made, 1).oracle.state_dict()
    assert made.oracle._ledger.history == [(1.0, 2), (2.0, 1), (3.0, 1)]


def test_noise_goes_beyond_where_one_counted_normal_ends():
    """One never passes 5.77 (24-bit uniforms); the sum of four independent ones reaches 11.5."""
    made, parts = program(noise_multiplier=1.0, task=problem(hidden=200)), []
    layout, noise = made.layout, made.oracle._noise
    for part in range(4):
        one = torch.zeros(1, layout.d)
        perturb_(one[0], layout, noise._seed(0), 3, part, 0.5)
        parts.append(one)
    whole = torch.zeros(1, layout.d)
    noise.add_(whole, layout, 3, [1.0])
    torch.testing.assert_close(whole, sum(parts))
    weights = slice(layout.slices[0].begin, layout.slices[0].end)  # 2,400 of them
    apart = torch.corrcoef(torch.cat(parts)[:, weights]) - torch.eye(4)
    assert apart.abs().max() < 0.1  # independent of each other


def test_dropout_masks_are_secret():
    task = problem()
    task.module = nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    sums = []
    for noise_seed in (1, 1, 2):
        made = program(task=task, noise_multiplier=0, noise_seed=noise_seed)
        batch = [Batch(task.train[torch.arange(40)])]
        secret_of = made.oracle._noise.coin_seed
        clipped = made.oracle.inner.clipped(
            made.state.x, batch, made.oracle._clip, secret_of=secret_of
        )
        sums.append(clipped.grad.clone())
    assert torch.equal(sums[0], sums[1])
    assert not torch.equal(sums[0], sums[2])


def test_inputs_made_from_several_examples_are_refused():
    task = problem()
    task.mixes_examples = True
    with pytest.raises(ConfigError, match=r"task.standardize: .*public constants"):
        program(task=task, noise_multiplier=1.0)


def test_bounds_hold_where_squares_underflow_or_round_below_zero():
    tiny = torch.full((1, 3), 1e-46, dtype=torch.float64)
    assert clipping.AutoClip(1.0, 0.0).factors(tiny) == 0
    rounded = clipping.LayerClip((1.0, 1.0)).factors(torch.tensor([[-1e-9, 1.0]]))
    assert torch.isfinite(rounded).all()


def test_a_checkpoint_without_history_is_refused():
    made = program(noise_multiplier=1.0)
    tensors, scalars = made.snapshot()
    bare = {k: v for k, v in tensors.items() if "history" not in k}
    with pytest.raises(ConfigError, match="no history of private releases"):
        made.restore(bare, scalars)


@pytest.mark.parametrize("around", [partial(Doppler, beta=0.8), partial(Disk, kappa=0.4)])
def test_behind_a_filter_the_noise_of_every_former_clip_norm_is_known(around):
    made = program(noise_multiplier=1.0, clip="adaptive", clip_norm=20.0,
                   around=lambda oracle: around(inner=oracle))  # fmt: skip
    dp, whites, outputs = made.oracle.inner, [], []
    sigma, _ = shared_noise(1.0, 60)
    for _ in range(12):
        whites.append((sigma * dp._clip.norm / 60) ** 2)
        outputs.append(made.oracle(made.state.x, made._batches()[0]).mean_origin.noise_var)
        made.comm.step += 1
    assert whites[-1] < whites[0] / 4  # C moves by a tenth a step
    keep = 0.8 if "beta" in around.keywords else 0.6
    weights = np.tril((1 - keep) * keep ** (np.arange(12)[:, None] - np.arange(12)).clip(0))
    if "beta" in around.keywords:
        weights /= weights.sum(1, keepdims=True)  # bias correction
    else:
        weights[:, 0] /= 1 - keep  # g_0 is the plain gradient
    np.testing.assert_allclose(outputs, weights**2 @ whites, rtol=1e-9)


def test_adaptive_clipping_finds_the_quantile():
    made = program(noise_multiplier=1.0, clip="adaptive", clip_norm=20.0)
    run(made, 60)
    norm = made.oracle._clip.norm
    keep = clipping.AdaptiveClip(norm)
    made.oracle.inner.clipped(made.state.x, [Batch(made.problem.train[torch.arange(240)])], keep)
    assert abs(keep.unclipped / 240) < 0.2
