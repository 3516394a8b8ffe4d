"""gossamer.attach with a privacy block: loops of one's own, and Opacus' models and optimizers."""

import copy
import warnings

import pytest
import torch
from torch import nn

import gossamer
from gossamer.runtime import Communicator, ConfigError, StackedTransport
from gossamer.topologies import build

pytest.importorskip("opacus")
from opacus import PrivacyEngine
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import AdaClipDPOptimizer, DPOptimizer
from opacus.utils.batch_memory_manager import BatchMemoryManager

N, B, CLIP = 160, 16, 0.3
BLOCK = {"examples": N, "sample_rate": B / N, "sampler": "poisson", "clip_norm": CLIP}
PLAIN = {**BLOCK, "noise_multiplier": 0.0}

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook:UserWarning")


@pytest.fixture
def alone():
    return fresh()


def fresh():
    return Communicator(build("ring", 1), StackedTransport())


def pictures(count=B, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 8, 8, generator=generator)
    return x, (x.mean(dim=(1, 2, 3)) > 0).long()


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(4),
        nn.Flatten(), nn.Linear(32, 2),
    )  # fmt: skip


def wide(width=60_000):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2), nn.Linear(2, width, bias=False))


def backward(model, batch):
    x, y = batch
    nn.functional.cross_entropy(model(x)[:, :2], y).backward()


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def attached(block=PLAIN, model=None, comm=None, lr=1.0, algorithm="all-reduce", **options):
    model = cnn() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    comm = comm or fresh()
    gossamer.attach(model, optimizer, algorithm, comm=comm, privacy=block, **options)
    return model, optimizer


def moved(model, optimizer, batch):
    """Return how far one step goes."""
    before = flat(model)
    optimizer.zero_grad()
    if batch is not None:
        backward(model, batch)
    optimizer.step()
    return flat(model) - before


def handed(kind, noise=0.0):
    """Return a model and an optimizer under attach, as one of three kinds of user has them."""
    model = cnn()
    if kind == "plain":
        return attached({**BLOCK, "noise_multiplier": noise}, model)
    model = GradSampleModule(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    block = {**BLOCK, "noise_multiplier": noise}
    if kind == "DPOptimizer":
        optimizer = DPOptimizer(
            optimizer, noise_multiplier=noise, max_grad_norm=CLIP, expected_batch_size=B
        )
        block = {k: v for k, v in block.items() if k not in ("noise_multiplier", "clip_norm")}
    return model, gossamer.attach(model, optimizer, "dsgd", comm=fresh(), privacy=block)


# --- sums and noise ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "GradSampleModule", "DPOptimizer"])
def test_without_noise_the_step_is_along_opacus_own_clipped_sum(kind):
    theirs = GradSampleModule(cnn())
    optimizer = DPOptimizer(
        torch.optim.SGD(theirs.parameters(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=CLIP,
        expected_batch_size=B,
    )
    backward(theirs, pictures())
    optimizer.clip_and_accumulate()
    summed = torch.cat([p.summed_grad.reshape(-1) for p in theirs.parameters()])
    unclipped = torch.cat([p.grad.reshape(-1) for p in theirs.parameters()]) * B
    assert (summed - unclipped).norm() > 0.1 * unclipped.norm()  # the bound is at work
    move = moved(*handed(kind), pictures())
    torch.testing.assert_close(-move * B, summed, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "GradSampleModule", "DPOptimizer"])
def test_the_noise_is_added_once(kind):
    stds = []
    for seed in range(12):
        model, optimizer = handed(kind, noise=2.0)
        quiet, silent = handed(kind)
        batch = pictures(seed=seed)
        noise = moved(model, optimizer, batch) - moved(quiet, silent, batch)
        stds.append((noise * B).std())
    # 12 x 274 draws: four standard errors are 5 %.
    assert torch.stack(stds).square().mean().sqrt().item() == pytest.approx(2 * CLIP, rel=0.05)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_an_example_that_is_not_finite_adds_nothing(poison):
    x, y = pictures()
    bad = x.clone()
    bad[3] = poison
    rest = [k for k in range(B) if k != 3]
    expected = moved(*attached(), (x[rest], y[rest]))
    torch.testing.assert_close(moved(*attached(), (bad, y)), expected, rtol=1e-5, atol=1e-7)


def test_an_empty_batch_is_noise_and_counts():
    x, y = pictures()
    for batch in (None, (x[:0], y[:0])):
        model, optimizer = attached({**BLOCK, "noise_multiplier": 1.0})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            move = moved(model, optimizer, batch)
        assert (move * B).std().item() == pytest.approx(CLIP, rel=0.2)
        assert optimizer.gossamer.statement()["steps"] == 1


def test_a_batch_in_parts_is_the_batch_with_the_noise_once():
    block = {**BLOCK, "noise_multiplier": 1.0, "noise_seed": 3}
    x, y = pictures()
    whole = moved(*attached(block), (x, y))
    model, optimizer = attached(block)
    before = flat(model)
    for k, part in enumerate((slice(0, 5), slice(5, 12), slice(12, B))):
        optimizer.gossamer.signal_skip_step(k < 2)
        optimizer.zero_grad()
        backward(model, (x[part], y[part]))
        optimizer.step()
        if k < 2:
            assert torch.equal(flat(model), before)
            with pytest.raises(ConfigError, match="a part of a batch waits"):
                optimizer.gossamer.state_dict()
    torch.testing.assert_close(flat(model) - before, whole, rtol=1e-5, atol=1e-6)
    assert optimizer.gossamer.statement()["steps"] == 1


def test_the_loss_may_be_a_sum():
    x, y = pictures()
    mean = moved(*attached(), (x, y))
    model, optimizer = attached({**PLAIN, "loss_reduction": "sum"}, lr=1 / B)
    before = flat(model)
    nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
    optimizer.step()
    torch.testing.assert_close(flat(model) - before, mean, rtol=1e-5, atol=1e-7)


def test_a_bfloat16_model_is_summed_in_float32():
    x, y = pictures()
    block = {**PLAIN, "clip": "auto-v"}
    expected = moved(*attached(block, cnn()), (x, y))
    model, optimizer = attached(block, cnn().bfloat16())
    before = flat(model)
    nn.functional.cross_entropy(model(x.bfloat16()).float(), y).backward()
    optimizer.step()
    move = (flat(model) - before).float()
    assert torch.cosine_similarity(move, expected, dim=0) > 0.99


@pytest.mark.parametrize("every", [1, 3])
def test_steps_between_rounds_are_private_too(every):
    block = {**BLOCK, "noise_multiplier": 1.0}
    model, optimizer = attached(block, every=every)
    for seed in range(3):
        move = moved(model, optimizer, pictures(seed=seed))
        assert (move * B).std() > 0.5 * CLIP
    said = optimizer.gossamer.statement()
    assert said["steps"] == 3
    assert said["noise_mode"] == ("split" if every == 1 else "local")
    assert optimizer.gossamer.comm.step == 3 // every


# --- what is said -----------------------------------------------------------------------------


def test_an_engines_run_keeps_its_accountant_and_agrees_with_it():
    data = torch.utils.data.TensorDataset(*pictures(N))
    engine = PrivacyEngine(accountant="rdp")
    model = cnn()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=B),
        noise_multiplier=1.1,
        max_grad_norm=CLIP,
    )
    block = {"examples": N, "sample_rate": 1 / len(loader), "sampler": "poisson"}
    gossamer.attach(model, optimizer, "dsgd", comm=fresh(), privacy={**block, "accountant": "rdp"})
    steps = 0
    for batch in loader:
        moved(model, optimizer, batch)
        steps += 1
    assert engine.accountant.history == [(1.1, B / N, steps)]
    said = optimizer.gossamer.statement()
    assert said["private"]
    assert said["epsilon"] == pytest.approx(engine.get_epsilon(said["delta"]), rel=1e-9)
    assert optimizer.gossamer.privacy_spent() == said["epsilon"]


def test_an_engines_memory_manager_cuts_batches_into_parts():
    data = torch.utils.data.TensorDataset(*pictures(N))
    loader = torch.utils.data.DataLoader(data, batch_size=B)
    model, optimizer = attached({**BLOCK, "noise_multiplier": 1.0})
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=5, optimizer=optimizer
    ) as parts:
        for batch in parts:
            moved(model, optimizer, batch)
    assert optimizer.gossamer.statement()["steps"] == N // B


def test_shuffled_batches_are_not_called_private():
    model, optimizer = attached({**BLOCK, "noise_multiplier": 1.0, "sampler": "shuffle"})
    moved(model, optimizer, pictures())
    said = optimizer.gossamer.statement()
    assert not said["private"]
    assert "epsilon" not in said
    assert said["epsilon_approx"] > 0
    with pytest.raises(ConfigError, match="shuffle has no epsilon"):
        optimizer.gossamer.privacy_spent()


def test_a_target_is_met_after_the_steps_it_was_for_and_ends_there():
    model, optimizer = attached({**BLOCK, "epsilon": 3.0, "steps": 4})
    for seed in range(4):
        moved(model, optimizer, pictures(seed=seed))
    assert 2.9 < optimizer.gossamer.privacy_spent() <= 3.0
    with pytest.raises(ConfigError, match="more gradients than the 4"):
        moved(model, optimizer, pictures())


def test_batches_drawn_by_secret_coins_have_the_rate_and_stay_until_the_step():
    model, optimizer = attached({**BLOCK, "noise_multiplier": 1.0})
    draw, sizes = optimizer.gossamer.privacy.draw, []
    x, y = pictures(N)
    for _ in range(20):
        places = draw()
        assert torch.equal(places, draw())
        assert len(places.unique()) == len(places)
        sizes.append(len(places))
        moved(model, optimizer, (x[places], y[places]))
    assert sum(sizes) / 20 == pytest.approx(B, abs=4 * (B / 20) ** 0.5)
    assert len(set(sizes)) > 1
    draw()
    with pytest.raises(ConfigError, match="161 examples in this step, draw\\(\\) gave"):
        moved(model, optimizer, pictures(161))


def test_a_loop_does_not_go_back_and_release_the_same_noise_over_other_batches():
    model, optimizer = attached({**BLOCK, "noise_multiplier": 1.0})
    saved = copy.deepcopy(optimizer.gossamer.state_dict())
    moved(model, optimizer, pictures(seed=0))
    with pytest.raises(ConfigError, match="1 private gradients were released before the state"):
        optimizer.gossamer.load_state_dict(saved, same_batches=True)


def test_a_resumed_run_has_the_same_history_and_the_same_noise_only_when_asked():
    block = {**BLOCK, "noise_multiplier": 1.0}
    model, optimizer = attached(block)
    for seed in range(3):
        moved(model, optimizer, pictures(seed=seed))
    saved = copy.deepcopy(optimizer.gossamer.state_dict())
    ends, statements = [], []
    for _ in range(2):
        for seed in (7, 8):
            moved(model, optimizer, pictures(seed=seed))
        ends.append(flat(model))
        statements.append(optimizer.gossamer.statement())
        model, optimizer = attached(block)
        optimizer.gossamer.load_state_dict(saved, same_batches=True)
    assert torch.equal(*ends)
    assert statements[0] == statements[1]
    assert statements[0]["steps"] == 5
    model, optimizer = attached(block)
    optimizer.gossamer.load_state_dict(saved)
    moved(model, optimizer, pictures(seed=7))
    moved(model, optimizer, pictures(seed=8))
    # Other batches under noise that was seen before would show their difference in the clear.
    assert not torch.equal(flat(model), ends[0])
    assert optimizer.gossamer.statement()["steps"] == 5


def test_a_state_without_history_is_refused_and_so_is_another_rate():
    block = {**BLOCK, "noise_multiplier": 1.0}
    saved = attached(block)[1].gossamer.state_dict()
    public = cnn()
    plain = gossamer.attach(
        public, torch.optim.SGD(public.parameters(), lr=1.0), "all-reduce", comm=fresh()
    )
    for state, optimizer in (
        (plain.gossamer.state_dict(), attached(block)[1]),
        (saved, plain),
    ):
        with pytest.raises(ConfigError, match="nobody would know the epsilon spent"):
            optimizer.gossamer.load_state_dict(state)
    other = attached({**block, "sample_rate": 0.2})[1]
    with pytest.raises(ConfigError, match="epsilon is counted with rate"):
        other.gossamer.load_state_dict(saved)


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_multiplier": None}, "write epsilon or noise_multiplier, one of them"),
        ({"epsilon": 1.0}, "write epsilon or noise_multiplier, one of them"),
        ({"epsilon": 1.0, "noise_multiplier": None}, "epsilon: needs steps"),
        ({"sample_rate": 1.5}, "sample_rate: must be less than or equal to 1, got 1.5"),
        ({"sample_rate": 1.0}, "full means sample_rate 1"),
        ({"sampler": "coins"}, "sampler: must be 'poisson', 'full' or 'shuffle', got 'coins'"),
        ({"examples": 1}, "examples: must be greater than or equal to 2, got 1"),
        ({"delta": 0.01}, "delta: 0.01 must be below 1 / examples"),
        ({"accountant": "gdp"}, "accountant"),
        ({"clip": "adaptive"}, "clip"),
        ({"clip_nrom": 1.0}, "unknown field.*clip_norm"),
    ],
)
def test_a_block_that_makes_no_sense_is_refused(change, message):
    values = {**BLOCK, "noise_multiplier": 1.0, **change}
    values = {k: v for k, v in values.items() if v is not None}
    with pytest.raises(ConfigError, match=message):
        attached(values)


def test_noise_of_the_mean_is_refused_where_ranks_show_more():
    block = {**BLOCK, "noise_multiplier": 1.0, "noise_mode": "split"}
    with pytest.raises(ConfigError, match=r"split protects the mean.*with dsgd.*use local"):
        attached(block, algorithm="dsgd")
    with pytest.raises(ConfigError, match="with every=2"):
        attached(block, every=2)


def refused(message, model, optimizer, block=None):
    with pytest.raises(ConfigError, match=message):
        gossamer.attach(model, optimizer, "all-reduce", comm=fresh(), privacy=block)


def test_what_opacus_hands_over_must_be_complete_and_of_the_known_kinds():
    sgd = lambda m: torch.optim.SGD(m.parameters(), lr=1.0)  # noqa: E731
    wrapped = GradSampleModule(cnn())
    options = {"noise_multiplier": 1.0, "max_grad_norm": CLIP, "expected_batch_size": B}
    theirs = DPOptimizer(sgd(wrapped), **options)
    refused("DPOptimizer is for private training, of which nothing was said", wrapped, theirs)
    refused("GradSampleModule is for private training", wrapped, sgd(wrapped))
    refused("noise_multiplier: the DPOptimizer says 1.0 already", wrapped, theirs, PLAIN)
    rest = {"examples": N, "sample_rate": 0.2}
    refused("expected batch of 32, the DPOptimizer divides by 16", wrapped, theirs, rest)
    block = {**BLOCK, "noise_multiplier": 1.0}
    summed = {**block, "loss_reduction": "sum"}
    refused("loss_reduction: sum, but the model", wrapped, sgd(wrapped), summed)
    ghost = GradSampleModuleFastGradientClipping(cnn(), max_grad_norm=1.0)
    refused("grad_sample_mode='hooks'", ghost, sgd(ghost), block)
    adaptive = AdaClipDPOptimizer(
        sgd(wrapped), **options, target_unclipped_quantile=0.5, clipbound_learning_rate=0.2,
        max_clipbound=1.0, min_clipbound=0.1, unclipped_num_std=1.0,
    )  # fmt: skip
    refused("AdaClipDPOptimizer bounds gradients in a way of its own", wrapped, adaptive, rest)
    for affine in (True, False):
        normed = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, affine=affine))
        refused("'1' is a BatchNorm1d.*GroupNorm or LayerNorm", normed, sgd(normed), block)
    once = cnn()
    attached(block, once)
    refused("attach a model once", once, sgd(once), block)
    two = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2).double())
    refused("one dtype", two, sgd(two), block)


def test_gradients_without_those_of_single_examples_are_refused():
    model, optimizer = handed("GradSampleModule")
    model.disable_hooks()
    with pytest.raises(ConfigError, match=r"0.weight has a gradient, but none of single examples"):
        moved(model, optimizer, pictures())


def test_two_backward_passes_before_a_step_are_refused_with_the_way_to_say_parts():
    model, optimizer = attached()
    backward(model, pictures())
    backward(model, pictures(seed=2))
    with pytest.raises(ConfigError, match=r"2 backward passes before one step.*signal_skip_step"):
        optimizer.step()


def test_a_scaled_loss_is_refused():
    model, optimizer = attached()
    scaler = torch.amp.GradScaler("cpu")
    x, y = pictures()
    scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
    with pytest.raises(ConfigError, match="GradScaler scales gradients of single examples"):
        scaler.step(optimizer)


def test_a_scheduler_of_opacus_noise_is_noticed():
    model, optimizer = handed("DPOptimizer", noise=1.0)
    optimizer.noise_multiplier = 0.5
    with pytest.raises(ConfigError, match="leave Opacus' noise and clipping schedulers out"):
        moved(model, optimizer, pictures())
