"""Chunks, other points, dropout and half precision: what one call of the oracle is made of."""

import pytest
import torch
from contrastive_bench import Bench

from gossamer.algorithms.contrastive.emc2 import EMC2
from gossamer.runtime.native import chains

FRESH = {"name": "emc2", "beta": 6.0, "score": "fresh", "burn_in": 0.0}
LOSSES = [
    FRESH,
    {**FRESH, "score": "stale"},
    "simclr",
    "sogclr",
    "isogclr",
    {"name": "moco", "queue": 40},
    {"name": "negcache", "refresh": 0.2},
    "full",
]
NAMES = ["fresh", "stale", "simclr", "sogclr", "isogclr", "moco", "negcache", "full"]
DOUBLE = {"dtype": torch.float64}


def each_loss(test):
    return pytest.mark.parametrize("loss", LOSSES, ids=NAMES)(test)


def state_of(bench):
    return {k: v.clone() for k, v in bench.oracle.state_dict().items()}


def assert_same_state(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name, table in one.items():
        torch.testing.assert_close(
            table, other[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def wander(bench, step):
    """Move to another point, the same for all benches of one shape."""
    generator = torch.Generator().manual_seed(step)
    move = torch.randn(bench.x.shape[1], generator=generator, dtype=torch.float64)
    bench.x += 0.2 * move.to(bench.x.dtype)


@each_loss
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("mode", ["infinite", "pairs"])
def test_small_chunks_make_the_same_gradient(loss, n, mode):
    benches = [
        Bench(loss, n, of={"mode": mode, "count": 12, **DOUBLE}, micro_batch_size=size)
        for size in (None, 3)
    ]
    for step in range(4):
        found = []
        for bench in benches:
            bench.comm.step = step
            found.append(bench())
            wander(bench, step)
        torch.testing.assert_close(found[0].grad, found[1].grad, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found[0].loss, found[1].loss, rtol=1e-9, atol=1e-12)
    assert_same_state(state_of(benches[0]), state_of(benches[1]), rtol=1e-6, atol=1e-9)


@each_loss
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_combination_is_that_of_its_points_and_moves_states_once(loss, dropout):
    of = {"count": 12, "dropout": dropout, **DOUBLE}
    combined, here, there = (Bench(loss, 2, of=of) for _ in range(3))
    for step in range(4):
        for bench in (combined, here, there):
            bench.comm.step = step
        other = combined.x + 0.1 * torch.randn(
            combined.x.shape,
            generator=torch.Generator().manual_seed(99 + step),
            dtype=torch.float64,
        )
        batch, before = combined.batches(), state_of(here)
        both = combined(batch, combine=[(1.0, combined.x), (-0.7, other)])
        expected = here(batch).grad
        # At the other point from the same states, which do not move: those of the run at x do.
        there.oracle.load_state_dict(before)
        apart = there(batch, combine=[(1.0, other)]).grad
        torch.testing.assert_close(both.grad, expected - 0.7 * apart, rtol=1e-9, atol=1e-11)
        assert_same_state(state_of(combined), state_of(here), rtol=0, atol=0)
        assert_same_state(state_of(there), state_of(here), rtol=0, atol=0)
        for bench in (combined, here, there):
            wander(bench, step)


def test_states_move_once_where_the_point_stands_twice_in_a_combination():
    one, other = (Bench("sogclr", of={"count": 8, **DOUBLE}) for _ in range(2))
    for step in range(3):
        one.comm.step = other.comm.step = step
        batch = one.batches()
        twice = one(batch, combine=[(0.25, one.x), (0.75, one.x)])
        torch.testing.assert_close(twice.grad, other(batch).grad, rtol=1e-9, atol=1e-12)
    assert_same_state(state_of(one), state_of(other), rtol=0, atol=0)


@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize("n", [1, 2])
def test_dropout_repeats_its_masks_on_the_way_back(n, micro_batch_size):
    # A gradient of other masks than the embeddings' would not be that of any function: compare
    # with differences of the loss, whose weights stand still where the state is a constant.
    of = {"count": 12, "dropout": 0.5, "mode": "finite", **DOUBLE}
    fields = {"micro_batch_size": micro_batch_size, "batch_size": 4}
    bench = Bench("dcl", n, of=of, **fields)
    batch = bench.batches()
    grad = bench(batch).grad
    again = Bench("dcl", n, of=of, **fields)
    torch.testing.assert_close(again(batch).grad, grad, rtol=0, atol=0)
    way = torch.randn(
        bench.x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    values = []
    for side in (1, -1):
        moved = Bench("dcl", n, of=of, **fields)
        moved.x = moved.x + side * 1e-5 * way.sum(0)
        # The loss (1) of the batch itself, with the masks of call 0: dcl is its gradient.
        passes = moved.oracle._passes(moved.x, moved.oracle._grad, 0)
        z, _ = moved.oracle._embedded(passes, batch, 0)
        total = 0.0
        for rows in moved.oracle._compared(batch, z):
            scores = (14.28 * rows.cosines).masked_fill(~rows.valid, -torch.inf)
            own = 14.28 * rows.cosines.gather(1, rows.positives[:, None])[:, 0]
            total += float((torch.logsumexp(scores, 1) - own).mean())
        values.append(total / n)
    slope = (values[0] - values[1]) / 2e-5
    assert float(grad.mean(0) @ way.sum(0)) == pytest.approx(slope, rel=1e-5)


def test_two_calls_of_a_step_draw_other_numbers():
    bench = Bench(FRESH, of={"mode": "infinite", "count": 12})
    batch = bench.batches()
    first, second = bench(batch).grad, bench(batch).grad
    assert not torch.equal(first, second)
    bench.comm.step = 1
    assert not torch.equal(bench(batch).grad, first)


def test_scores_stay_in_single_precision_under_autocast(monkeypatch):
    seen = []
    moves = chains.chain_moves

    def spy(scores, *args, **options):
        seen.append(scores.clone())
        return moves(scores, *args, **options)

    monkeypatch.setattr("gossamer.algorithms.contrastive.emc2.chain_moves", spy)
    bench = Bench(FRESH, of={"count": 12}, autocast="bfloat16")
    exact = Bench(FRESH, of={"count": 12})
    for step in range(3):
        bench.comm.step = exact.comm.step = step
        batch = bench.batches()
        found, wanted = bench(batch), exact(batch)
        assert found.grad.dtype == torch.float32
        assert found.grad.isfinite().all()
    coarse, fine = seen[0], seen[1]
    assert coarse.dtype == torch.float32
    assert not torch.equal(coarse, coarse.bfloat16().float())  # the products were not rounded
    torch.testing.assert_close(coarse, fine, rtol=0, atol=0.15)  # embeddings were: 8 bits
    assert wanted.grad.isfinite().all()


@each_loss
@pytest.mark.parametrize("beta", [200.0, 1e4])
def test_a_beta_whose_exponential_overflows_does_no_harm(loss, beta):
    section = {"name": loss} if isinstance(loss, str) else dict(loss)
    if section["name"] == "isogclr":
        section["tau_min"] = 1 / beta
    bench = Bench({**section, "beta": beta}, 2, of={"count": 12})
    for bench.comm.step in range(4):
        estimate = bench()
        assert estimate.grad.isfinite().all()
        assert estimate.loss.isfinite().all()
        assert bench.oracle.loss(bench.x, bench.batches()).isfinite().all()
        wander(bench, bench.comm.step)
    for name, table in state_of(bench).items():
        assert not table.isnan().any(), name


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_embeddings_that_are_no_numbers_show_in_the_loss(loss):
    bench = Bench(loss, 2, of={"count": 12})
    bench()
    bench.comm.step = 1
    bench.x[:, 0] = torch.nan
    assert bench().loss.isnan().all()


def test_uniforms_are_counted_by_step_example_view_and_column():
    drawn = []
    uniforms = EMC2.uniforms

    def spy(self, visit, rows):
        found = uniforms(self, visit, rows)
        drawn.append((rows.ids, found.clone()))
        return found

    bench = Bench(FRESH, 2, of={"count": 12})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EMC2, "uniforms", spy)
        bench(bench.batch_of([0, 2, 4, 6], [1, 3, 5, 7]))
        bench.oracle._calls = (-1, 0)
        bench(bench.batch_of([6, 4, 2, 0], [1, 3, 5, 7]))
    (ids, first), (_, elsewhere), (turned, second), _ = drawn
    assert ids.tolist() == turned.tolist()[::-1]
    torch.testing.assert_close(first.view(2, 4, -1), second.view(2, 4, -1).flip(1), rtol=0, atol=0)
    both = torch.cat([first, elsewhere])
    assert both.min() > 0
    assert both.max() < 1
    assert len(both.unique()) == both.numel()
