"""The private oracle: sums, noise, what is shown and what it refuses."""

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
from gossamer.algorithms.privacy.disk import Disk
from gossamer.algorithms.privacy.doppler import Doppler
from gossamer.algorithms.privacy.dp import DP
from gossamer.algorithms.privacy.noise import SecretNoise
from gossamer.algorithms.problems import Batch
from gossamer.algorithms.program import TrainingProgram
from gossamer.algorithms.tasks.arrays import TensorDataset
from gossamer.runtime import Communicator, ConfigError, StackedTransport, row_norm
from gossamer.runtime.component import validate
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
