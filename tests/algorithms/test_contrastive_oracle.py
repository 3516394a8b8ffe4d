"""Contrastive gradients against autograd of formulas written out, in float64."""

import math

import pytest
import torch
from contrastive_bench import Bench, negatives_of

DOUBLE = {"dtype": torch.float64}
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
MODES = ["infinite", "finite", "pairs"]


def scores_of(bench, batch, beta, row):
    """Return z (2B, D) with a graph to ``row``, beta <z_r, z_k>, and which are negatives."""
    z = bench.embeddings(batch, row).flatten(0, 1)
    ids = torch.cat([b.indices for b in batch])
    return z, beta * z @ z.T, negatives_of(ids, bench.problem.contrast.mode == "pairs")


def positives_of(scores):
    half = len(scores) // 2
    places = torch.arange(2 * half)
    return scores[places, places.roll(half)]


def simclr(scores, valid):
    half = len(scores) // 2
    places = torch.arange(2 * half)
    columns = valid.clone()
    columns[places, places.roll(half)] = True
    return torch.nn.functional.cross_entropy(
        scores.masked_fill(~columns, -torch.inf), places.roll(half)
    )


def dcl(scores, valid):
    each = torch.logsumexp(scores.masked_fill(~valid, -torch.inf), dim=1) - positives_of(scores)
    return each.mean()


def gradient(value, row):
    (found,) = torch.autograd.grad(value, row)
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("written", [simclr, dcl], ids=lambda f: f.__name__)
def test_losses_of_the_batch_are_their_formulas(written, n, mode):
    bench = Bench({"name": written.__name__, "beta": 4.0}, n, of={"mode": mode, **DOUBLE})
    batch, row = bench.batches(), bench.leaf()
    _, scores, valid = scores_of(bench, batch, 4.0, row)
    expected = gradient(written(scores, valid), row)
    torch.testing.assert_close(bench(batch).grad.mean(0), expected, **CLOSE)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [1, 3])
def test_full_is_the_gradient_of_the_loss_over_all_examples(n, mode):
    bench = Bench({"name": "full", "beta": 4.0}, n, of={"mode": mode, **DOUBLE})
    batch, row = bench.batches(), bench.leaf()
    rows = bench.embeddings(batch, row)
    ids, every = torch.cat([b.indices for b in batch]), torch.arange(24)
    sides = [bench.held(2 * every + v, row) for v in ((0,) if mode == "infinite" else (0, 1))]
    terms = []
    for view in (0, 1):
        for place, own in enumerate(ids):
            against = sides if mode != "pairs" else [sides[1 - view]]
            others = torch.cat([side[every != own] for side in against])
            anchor, positive = rows[view, place], rows[1 - view, place]
            terms.append(torch.logsumexp(4.0 * others @ anchor, 0) - 4.0 * positive @ anchor)
    expected = gradient(torch.stack(terms).mean(), row)
    torch.testing.assert_close(bench(batch).grad.mean(0), expected, **CLOSE)


def surrogate(scores, weights, scale, beta):
    """Equation (3), with s instead of beta and weights that are no functions of the rows."""
    terms = (weights.detach() * scores).sum(dim=1) - positives_of(scores)
    return (scale / beta) * terms.mean()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("beta", [5.0, 200.0])
@pytest.mark.parametrize("official", [False, True])
def test_sogclr_divides_by_a_running_mean(mode, beta, official):
    loss = {"name": "sogclr", "beta": beta, "gamma": 0.3}
    loss |= {"compat": "official"} if official else {}
    bench = Bench(loss, 2, of={"mode": mode, "count": 8, **DOUBLE})
    log_u = {}
    for bench.comm.step in range(5):
        batch, row = bench.batches(), bench.leaf()
        _, scores, valid = scores_of(bench, batch, beta, row)
        ids = torch.cat([b.indices for b in batch]).tolist()
        masked, news = scores.masked_fill(~valid, -torch.inf), []
        for r in range(len(scores)):
            key = ids[r % len(ids)], 0 if mode == "infinite" else r // len(ids)
            mean = torch.logsumexp(masked[r], 0) - math.log(valid[r].sum())
            if key not in log_u:
                new = mean
            else:
                both = torch.stack([math.log(0.7) + log_u[key], math.log(0.3) + mean])
                new = torch.logsumexp(both, 0)
            news.append(new.detach())
        log_counts = valid.sum(dim=1).double().log()
        weights = (masked - (torch.stack(news) + log_counts)[:, None]).exp()
        scale = 2.0 if official else beta
        expected = gradient(surrogate(scores, weights, scale, beta), row)
        found = bench(batch).grad.mean(0)
        assert found.isfinite().all()
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5 * scale)  # u is float32
        for r, new in enumerate(news):
            key = ids[r % len(ids)], 0 if mode == "infinite" else r // len(ids)
            if mode == "infinite":
                both = torch.stack([news[r % len(ids)], news[r % len(ids) + len(ids)]])
                new = torch.logsumexp(both, 0) - math.log(2)
            log_u[key] = new


@pytest.mark.parametrize("mode", ["infinite", "pairs"])
def test_moco_is_cross_entropy_against_a_queue_of_a_slow_encoder(mode):
    beta = 4.0
    loss = {"name": "moco", "beta": beta, "queue": 20, "momentum": 0.9}
    bench = Bench(loss, 2, of={"mode": mode, **DOUBLE})
    slow, queue = bench.x[0].clone(), []
    generator = torch.Generator().manual_seed(0)
    for bench.comm.step in range(4):
        slow = 0.9 * slow + 0.1 * bench.x[0]
        batch, row = bench.batches(), bench.leaf()
        z, keys = bench.embeddings(batch, row), bench.embeddings(batch, slow).detach()
        losses = []
        for view in (0, 1):
            kept = [key for side, key in queue[-20:] if mode != "pairs" or side != view]
            negatives = torch.stack(kept) if kept else keys.new_zeros(0, 5)
            own = (z[view] * keys[1 - view]).sum(dim=1, keepdim=True)
            logits = beta * torch.cat([own, z[view] @ negatives.T], dim=1)
            losses.append(torch.nn.functional.cross_entropy(logits, torch.zeros(8).long()))
        expected = gradient(torch.stack(losses).mean(), row)
        torch.testing.assert_close(bench(batch).grad.mean(0), expected, **CLOSE)
        queue += [(side, key) for side in (0, 1) for key in keys[side]]
        bench.x += 0.05 * torch.randn(bench.x.shape[1], generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("mode", MODES)
def test_isogclr_learns_a_temperature_for_each_anchor(mode):
    loss = {"name": "isogclr", "beta": 5.0, "gamma": 0.6, "tau_lr": 0.05, "rho": 0.1}
    bench = Bench(loss, 2, of={"mode": mode, "count": 8, **DOUBLE})
    log_u, tau, velocity = {}, {}, {}
    for bench.comm.step in range(5):
        batch, row = bench.batches(), bench.leaf()
        _, cosines, valid = scores_of(bench, batch, 1.0, row)
        ids = torch.cat([b.indices for b in batch]).tolist()
        keys = [(ids[r % 8], 0 if mode == "infinite" else r // 8) for r in range(16)]
        taus = torch.tensor([tau.get(k, 0.2) for k in keys], dtype=torch.float64)
        masked = (cosines / taus[:, None]).masked_fill(~valid, -torch.inf)
        mean = torch.logsumexp(masked, 1) - valid.sum(1).double().log()
        old = torch.tensor([log_u.get(k, -torch.inf) for k in keys], dtype=torch.float64)
        mixed = torch.logaddexp(math.log(0.4) + old, math.log(0.6) + mean)
        new = torch.where(old.isinf(), mean, mixed).detach()
        weights = (masked - new[:, None]).exp().detach() / valid.sum(1)[:, None]
        expected = gradient(((weights * cosines).sum(1) - positives_of(cosines)).mean(), row)
        torch.testing.assert_close(bench(batch).grad.mean(0), expected, **CLOSE)
        slope = new + 0.1 - (weights * cosines.detach()).sum(1) / taus
        for key in set(keys):
            rows = [r for r, k in enumerate(keys) if k == key]
            log_u[key] = float(torch.logsumexp(new[rows], 0)) - math.log(len(rows))
            velocity[key] = 0.1 * velocity.get(key, 0.0) + 0.9 * float(slope[rows].mean())
            tau[key] = min(max(float(taus[rows[0]]) - 0.05 * velocity[key], 0.05), 0.7)
    assert len(set(tau.values())) > 1
    kept = bench.oracle.criterion._tau
    torch.testing.assert_close(kept.sum(), torch.tensor(sum(tau.values())).double())


@pytest.mark.parametrize("mode", MODES)
def test_negcache_draws_by_the_softmax_of_what_it_keeps(mode):
    beta, draws = 3.0, 100
    of = {"mode": mode, "count": 8, **DOUBLE}
    bench = Bench({"name": "negcache", "beta": beta, "refresh": 0.0}, 2, of=of, batch_size=2)
    batch, row = bench.batch_of([0, 4], [1, 5]), bench.leaf()
    total = torch.zeros_like(bench.x[0])
    views = mode == "infinite"
    for bench.comm.step in range(draws):
        for rank, ids in enumerate(bench.oracle.criterion._setting.owners.ids):
            keys = 2 * torch.from_numpy(ids)
            if not views:
                keys = torch.stack([keys, keys + 1], 1).flatten()
            bench.oracle.criterion._embeddings[rank] = bench.held(keys).flatten()
            bench.oracle.criterion._made[rank] = 0
        if views:  # the same views at each visit: what is averaged is the draw
            bench.problem.contrast.spread = 0.0
        total += bench(batch).grad.mean(0)
    # All draws: w_k = (1 - p) softmax_k against the cache, and 1 - p for the positive.
    z, every = bench.embeddings(batch, row).flatten(0, 1), torch.arange(8)
    ids, terms = torch.cat([b.indices for b in batch]), []
    for r in range(8):
        others = []
        for side in (0,) if views else (0, 1):
            if mode != "pairs" or side != r // 4:
                others += (2 * every[every != ids[r % 4]] + side).tolist()
        against = bench.held(torch.tensor(others), row)
        scores = beta * against.detach() @ z[r].detach()
        positive = beta * (z[r] @ z[(r + 4) % 8]).detach()
        share = 1 - torch.sigmoid(positive - torch.logsumexp(scores, 0))
        repelled = torch.softmax(scores, 0) @ (against @ z[r])
        terms.append(beta * share * (repelled - z[r] @ z[(r + 4) % 8]))
    expected = gradient(torch.stack(terms).mean(), row)
    # 8 draws a step: what is left is their noise, about 1 / sqrt(800).
    assert (total / draws - expected).norm() < 0.12 * expected.norm()


def weights_of(bench):
    """Return gamma of every row of the next visit, from what u becomes of a known value."""
    loss, seen = bench.oracle.criterion, []
    weight = loss._weight

    def spy(visit, log_u):
        seen.append(weight(visit, log_u))
        return seen[-1]

    object.__setattr__(loss, "_weight", spy)
    bench()
    object.__delattr__(loss, "_weight")
    return sorted(set(torch.cat(seen).tolist()))


def test_the_first_visit_of_an_anchor_or_the_first_epoch_counts_whole():
    found = {}
    for first in ("example", "epoch"):
        loss = {"name": "sogclr", "gamma": 0.25, "first_visit": first}
        bench = Bench(loss, of={"count": 8, **DOUBLE})  # 2 steps an epoch
        found[first] = []
        for bench.comm.step in range(4):
            found[first].append(weights_of(bench))
    assert found["example"] == found["epoch"] == [[1.0], [1.0], [0.25], [0.25]]
    late = Bench({"name": "sogclr", "gamma": 0.25, "first_visit": "epoch"}, of={"count": 8})
    late.comm.step = 5
    assert weights_of(late) == [0.25]
    assert late().grad.isfinite().all()


def test_gamma_falls_by_half_a_cosine():
    loss = {"name": "sogclr", "gamma": 0.2, "gamma_decay_steps": 4}
    bench = Bench(loss, of={"count": 8, **DOUBLE})
    found = []
    for bench.comm.step in range(6):
        found.append(weights_of(bench))
    cosine = [0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * t / 4)) for t in (2, 3)]
    assert found[:2] == [[1.0], [1.0]]  # first visits
    assert [w for (w,) in found[2:]] == pytest.approx([*cosine, 0.2, 0.2])
