"""The private oracle: sums, noise, sampling, accounting, and what it refuses."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from private_for_tests import EXAMPLES, FEATURES, problem, program, run
from torch import nn

from gossamer.algorithms.decentralized.all_reduce import AllReduce
from gossamer.algorithms.decentralized.dsgd import DSGD
from gossamer.algorithms.optimizers.sgd import SGD
from gossamer.algorithms.oracles.backprop import Backprop
from gossamer.algorithms.privacy import clipping
from gossamer.algorithms.privacy.adaptive import shared_noise
from gossamer.algorithms.privacy.disk import Disk
from gossamer.algorithms.privacy.doppler import Doppler
from gossamer.algorithms.privacy.dp import DP
from gossamer.algorithms.privacy.noise import SecretNoise
from gossamer.algorithms.problems import Batch
from gossamer.algorithms.program import TrainingProgram
from gossamer.algorithms.tasks.arrays import TensorDataset
from gossamer.runtime import Communicator, ConfigError, StackedTransport, row_norm
from gossamer.runtime.component import validate
from gossamer.runtime.perturb import perturb_
from gossamer.topologies import build

# --- sums -------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [None, 7, 3])
@pytest.mark.parametrize("n", [2, 4])
def test_the_sum_is_the_same_for_any_number_of_ranks_and_micro_batches(n, micro):
    means = []
    for ranks, size in [(1, None), (n, micro)]:
        made = program(
            ranks, noise_multiplier=0, backprop={"sampling": "full", "micro_batch_size": size}
        )
        estimate = made.oracle(made.state.x, made._batches()[0])
        means.append(estimate.grad.mean(0))
    torch.testing.assert_close(means[1], means[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("hidden", [0, 5])
def test_a_bfloat16_model_has_its_sum_and_noise_in_float32(hidden):
    task = problem(hidden=hidden)
    task.module.bfloat16()
    task.train = TensorDataset((task.train.tensors[0].bfloat16(), task.train.tensors[1]))
    made = program(noise_multiplier=1.0, task=task)
    x, batch = made.state.x, made._batches()[0]
    found = made.oracle.inner.clipped(x, batch, made.oracle._clip)
    assert (x.dtype, found.grad.dtype) == (torch.bfloat16, torch.float32)
    run(made, 3)
    assert made.state.x.dtype == torch.bfloat16
    assert torch.isfinite(made.state.x).all()
    assert made.oracle.statement()["privacy"]["steps"] == 3


KINDS = ["flat", "auto-s", "auto-v", "per-layer", "reparametrised", "global"]


def clipped_sum(oracle, inner, x, inputs, points):
    batch = [Batch(inputs)]
    return inner.clipped(x, batch, oracle._clip, combine=points).grad.clone()


@pytest.mark.parametrize("points", [1, 2], ids=["one point", "two points"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(1, 6),
    extra=st.sampled_from([1.0, 100.0, 1e30, float("inf"), float("nan")]),
)
def test_an_example_more_moves_the_sum_by_at_most_the_sensitivity(kind, points, seed, size, extra):
    made = program(noise_multiplier=0, clip=kind, clip_norm=0.7, task=problem(hidden=5))
    generator = torch.Generator().manual_seed(seed)
    inputs = (torch.randn(size + 1, FEATURES, generator=generator), torch.arange(size + 1) % 2)
    inputs[0][-1] *= extra
    x = made.state.x
    ahead = x + torch.randn(x.shape, generator=generator)
    places = [(1.0, x)] if points == 1 else [(2.5, ahead), (-1.5, x)]
    with_it = clipped_sum(made.oracle, made.oracle.inner, x, inputs, places)
    without = clipped_sum(made.oracle, made.oracle.inner, x, tuple(t[:-1] for t in inputs), places)
    bound = made.oracle._clip.sensitivity
    assert float(row_norm(with_it - without)) <= bound * (1 + 1e-5)
    assert bound == pytest.approx(1.0 if kind == "reparametrised" else 0.7)


# --- noise ------------------------------------------------------------------------------------


def noise_of(mode, n=4, calls=1, width=250_000, sigma=2.0):
    """Return the rows' noise, (calls, n, width), in units where the sum has ``sigma``."""
    wide = problem(n)
    wide.module = nn.Linear(FEATURES, width, bias=False)
    wide.loss = lambda model, inputs: model(inputs[0]).sum() * 0
    algorithm = DSGD(optimizer=SGD(lr=0.1)) if mode == "local" else None
    made = program(n, noise_multiplier=sigma, noise_mode=mode, task=wide, algorithm=algorithm)
    found = []
    for _ in range(calls):
        estimate = made.oracle(made.state.x, made._batches()[0])
        found.append(estimate.grad * 60 / n)  # times the expected batch of a rank
        made.comm.step += 1
    return torch.stack(found), estimate


@pytest.mark.parametrize("mode", ["split", "rank0", "replicated"])
def test_the_noise_of_the_sum_is_sigma_times_the_clip_norm_in_every_mode(mode):
    noise, estimate = noise_of(mode)
    total = noise[0].sum(0)
    assert total.std().item() == pytest.approx(2.0, rel=0.01)
    assert total.mean().item() == pytest.approx(0.0, abs=0.01)
    mean = (noise[0] / 15).mean(0)
    assert estimate.mean_origin.noise_var == pytest.approx(mean.var().item(), rel=0.02)


def test_split_noise_is_independent_between_ranks_and_calls():
    noise, _ = noise_of("split", calls=2)
    rows = torch.cat([noise[0], noise[1]])
    apart = torch.corrcoef(rows) - torch.eye(8)
    assert apart.abs().max() < 5e-3
    assert rows.std(dim=1).sub(2.0 / 2).abs().max() < 0.01


def test_replicated_noise_is_the_same_on_every_rank():
    noise, _ = noise_of("replicated", width=1000)
    assert torch.equal(noise[0], noise[0][:1].expand(4, -1))


def test_local_noise_is_whole_on_every_rank():
    noise, estimate = noise_of("local")
    assert noise[0].std(dim=1).sub(2.0).abs().max() < 0.02
    assert estimate.origin.noise_var == pytest.approx((2.0 / 15) ** 2)
    assert estimate.mean_origin.noise_var == pytest.approx((2.0 / 15) ** 2 / 4)


@pytest.mark.parametrize("mode", ["split", "local"])
def test_ranks_with_one_key_are_an_error(mode, monkeypatch):
    monkeypatch.setattr("gossamer.algorithms.privacy.noise.secret_key", lambda *_: 7)
    algorithm = DSGD(optimizer=SGD(lr=0.1))
    with pytest.raises(ConfigError, match="two ranks would draw the same"):
        program(4, noise_multiplier=1, noise_mode="local", algorithm=algorithm)


def test_replicated_noise_that_differs_between_ranks_is_an_error(monkeypatch):
    # Independent draws of sigma C / n each would leave sigma C / sqrt(n) in the sum.
    monkeypatch.setattr(SecretNoise, "_digest", lambda self, layout, i: i)
    with pytest.raises(ConfigError, match="replicated, but the ranks' noise differs"):
        program(4, noise_multiplier=1, noise_mode="replicated")


def test_without_a_seed_two_runs_draw_other_noise():
    rows = [run(program(noise_multiplier=1, noise_seed=None), 1).state.x.clone() for _ in range(2)]
    assert not torch.equal(*rows)
    same = [run(program(noise_multiplier=1), 1).state.x.clone() for _ in range(2)]
    assert torch.equal(*same)


# --- sampling and accounting ------------------------------------------------------------------


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


# --- what is shown and what is refused --------------------------------------------------------


def test_figures_of_the_training_examples_are_hidden_or_marked():
    hidden = program(noise_multiplier=1.0)
    assert set(hidden.step()) == set()
    assert not {"loss", "grad_norm"} & set(hidden.evaluate())
    assert "test_loss" in hidden.evaluate()
    shown = program(noise_multiplier=1.0, show_nonprivate=True)
    assert set(shown.step()) == {"nonprivate_batch_loss", "nonprivate_batch_size"}
    assert {"nonprivate_loss", "nonprivate_grad_norm"} <= set(shown.evaluate())


def test_the_statement_says_not_private_where_the_noise_is_repeatable():
    said = program(noise_multiplier=1.0).oracle.statement()["privacy"]
    assert not said["private"]
    assert "NOT PRIVATE" in said["reservations"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "epsilon or noise_multiplier"),
        ({"epsilon": 1.0, "noise_multiplier": 1.0}, "epsilon or noise_multiplier"),
        ({"noise_multiplier": 1.0, "accountant": "gdp"}, "use prv or rdp"),
        ({"noise_multiplier": 1.0, "delta": 1 / EXAMPLES}, "delta"),
        ({"noise_multiplier": 1.0, "backprop": {"sampling": "replacement"}}, "no Poisson account"),
        ({"noise_multiplier": 1.0, "backprop": {"batch_size": 1000}}, "full"),
        ({"noise_multiplier": 1.0, "backprop": {"vectorize": True}}, "vectorize"),
        ({"epsilon": 1.0}, "number of steps"),
    ],
)
def test_what_cannot_be_private_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        run(program(**options), 1)


@pytest.mark.parametrize("mode", ["split", "rank0", "replicated"])
def test_noise_of_the_mean_is_refused_where_ranks_show_their_own(mode):
    algorithm = DSGD(optimizer=SGD(lr=0.1))
    with pytest.raises(ConfigError, match=rf"noise_mode: {mode} protects the mean.*use local"):
        program(4, noise_multiplier=1.0, noise_mode=mode, algorithm=algorithm)


@pytest.mark.parametrize("wrapper", [Doppler, Disk])
def test_a_filter_inside_is_refused_with_the_order_to_write(wrapper):
    inner = wrapper(inner=Backprop())
    with pytest.raises(ConfigError, match=rf"oracle\.inner: .*\[\.\.\., dp, {inner.name}\]"):
        validate(DP, {"noise_multiplier": 1.0, "inner": inner}, "oracle")


class Branches(nn.Module):
    """Looks at a value, which torch.func does not allow, and owns its parameter itself."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(FEATURES, 2))

    def forward(self, x):
        return x @ self.weight if x.sum().item() > 0 else x @ -self.weight


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4)), "'1' is a BatchNorm1d"),
        (Branches(), r"task\.model: .* torch\.func .*use layers of torch\.nn"),
    ],
    ids=["batch norm", "branches"],
)
def test_a_model_without_gradients_of_single_examples_is_refused_before_the_first(module, message):
    task = problem()
    task.module = module
    comm = Communicator(build("ring", 1), StackedTransport())
    oracle = DP(noise_multiplier=1.0, inner=Backprop(batch_size=60))
    with pytest.raises(ConfigError, match=message):
        TrainingProgram(comm, task, oracle, AllReduce(optimizer=SGD(lr=0.5)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta": 1e-12}, "delta: 1e-12 is below what accountant prv computes"),
        ({"accountant": "gaussian"}, "gaussian is exact for full batches"),
        ({"noise_multiplier": 0.02}, "accountant: prv would need a grid"),
    ],
)
def test_what_no_accountant_can_count_is_refused_before_the_first_step(options, message):
    with pytest.raises(ConfigError, match=message):
        program(steps=2000, **{"noise_multiplier": 1.0, **options})
