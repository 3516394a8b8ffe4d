"""EMC^2 in the oracle: every move, what is kept, and the gradient, against a scan in Python."""

import math

import numpy as np
import pytest
import torch
from contrastive_bench import Bench

from gossamer.algorithms.contrastive.emc2 import EMC2

BETA = 6.0
MODES = ["infinite", "finite", "pairs"]


def numbers(step, example, view, width):
    """Return U (width,) of a row, whoever hosts it."""
    generator = torch.Generator().manual_seed(1 + 2 * (997 * step + example) + view)
    return torch.rand(width, generator=generator).clamp(1e-6, 1 - 1e-6)


@pytest.fixture(autouse=True)
def _injected(monkeypatch):
    def uniforms(self, visit, rows):
        width = rows.cosines.shape[1]
        drawn = [numbers(visit.step, int(i), v, width) for v in (0, 1) for i in rows.ids]
        return torch.stack(drawn)

    monkeypatch.setattr(EMC2, "uniforms", uniforms)


class Scan:
    """The chains, test by test (2.3 and 2.4 of the method): dictionaries of states by anchor."""

    def __init__(self, bench):
        self.bench, self.loss = bench, bench.oracle.criterion
        self.mode = bench.problem.contrast.mode
        self.chains = {}  # (example, view or 0) -> (key, score)
        self.recorded = []

    def step(self, batch):
        """Return the gradient at the bench's parameters, and move on."""
        bench, loss, row = self.bench, self.loss, self.bench.leaf()
        z = bench.embeddings(batch, row)
        ids = torch.cat([b.indices for b in batch]).tolist()
        count = len(ids)
        flat = z.flatten(0, 1)
        scores = (BETA * flat.detach() @ flat.detach().T).float().numpy()
        terms, after, self.recorded = [], {}, []
        for k, example in enumerate(ids):
            at = None
            for view in (0, 1):
                r, own = view * count + k, view if self.mode != "infinite" else 0
                if self.mode != "infinite" or view == 0:
                    at = None  # this row's chain starts from the stored state
                    held, score = self.chains.get((example, own), (None, -math.inf))
                if loss.score == "fresh":
                    if at is not None:
                        score = scores[r, at]
                    elif held is not None:
                        seen = bench.held(torch.tensor([held]))[0].detach()
                        score = float(BETA * flat[r].detach() @ seen)
                drawn = numbers(bench.comm.step, example, view, 2 * count)
                columns = [
                    j
                    for j in range(2 * count)
                    if ids[j % count] != example
                    and not (self.mode == "pairs" and j // count == view)
                ]
                ended = loss.burn_in_until
                share = 0 if ended is not None and bench.comm.step >= ended else loss.burn_in
                burnt = math.floor(share * len(columns) + 1e-9)
                records, of_held = {}, 0
                for t, j in enumerate(columns, 1):
                    if math.log(drawn[j]) < scores[r, j] - score:
                        at, score = j, scores[r, j]
                    if t > burnt:
                        if at is None:
                            of_held += 1
                        else:
                            records[at] = records.get(at, 0) + 1
                total = len(columns) - burnt
                assert sum(records.values()) + of_held == total
                self.recorded.append((example, records, of_held))
                positive = flat[(r + count) % (2 * count)]
                terms.append(-(flat[r] @ positive))
                for j, times in records.items():
                    terms.append(times / total * (flat[r] @ flat[j]))
                if of_held and loss.held == "recompute":
                    again = bench.held(torch.tensor([held]), row)[0]
                    terms.append(of_held / total * (flat[r] @ again))
                key = held if at is None else 2 * ids[at % count]
                if at is not None and self.mode != "infinite":
                    key += at // count
                after[example, own] = (key, score)  # a later copy overwrites
        self.chains |= after
        value = BETA / (2 * count) * torch.stack(terms).sum()
        return torch.autograd.grad(value, row)[0]


def chains_of(bench):
    """Return {(example, view): (key, score)} of the oracle's tables, empty chains left out."""
    loss, found = bench.oracle.criterion, {}
    each = loss._setting.per_example
    for rank, ids in enumerate(loss._setting.owners.ids):
        for place, example in enumerate(ids.tolist()):
            for view in range(each):
                key = int(loss._keys[rank, place * each + view])
                if key >= 0:
                    score = float(loss._scores[rank, place * each + view])
                    found[example, view] = key, score
    return found


def drawn_twice(bench, step, each=3):
    """Return a batch of each rank's own examples, drawn with replacement."""
    generator = np.random.default_rng(step)
    return bench.batch_of(*[generator.choice(s, each) for s in bench.problem.shards])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("score", ["stale", "fresh"])
@pytest.mark.parametrize("held", ["recompute", "drop"])
@pytest.mark.parametrize(("n", "twice"), [(1, False), (2, True)])
def test_every_visit_is_that_of_a_scan(mode, score, held, n, twice):
    loss = {"name": "emc2", "beta": BETA, "score": score, "held": held, "burn_in": 0.3}
    of = {"mode": mode, "count": 10, "dtype": torch.float64}
    bench = Bench(loss, n, of=of, batch_size=4)
    scan, generator, stood = Scan(bench), torch.Generator().manual_seed(0), 0
    for bench.comm.step in range(6):
        batch = drawn_twice(bench, bench.comm.step) if twice else bench.batches()
        expected = scan.step(batch)
        found = bench(batch)
        torch.testing.assert_close(found.grad.mean(0), expected, rtol=1e-6, atol=1e-7)
        kept = chains_of(bench)
        assert {k: v[0] for k, v in kept.items()} == {k: v[0] for k, v in scan.chains.items()}
        for anchor, (_, value) in kept.items():
            assert value == pytest.approx(scan.chains[anchor][1], abs=1e-5)
            assert abs(value) <= BETA * (1 + 1e-6)
        stood += sum(times for _, _, times in scan.recorded)
        step = 0.2 * torch.randn(bench.x.shape[1], generator=generator, dtype=torch.float64)
        bench.x += step
    assert stood > 0  # else nothing about held states was tested


def test_burn_in_ends_at_the_step_it_says():
    loss = {"name": "emc2", "beta": BETA, "burn_in": 0.9, "burn_in_until": 2}
    bench = Bench(loss, of={"count": 12, "dtype": torch.float64})
    scan, records = Scan(bench), []
    for bench.comm.step in range(4):
        batch = bench.batches()
        expected = scan.step(batch)
        torch.testing.assert_close(bench(batch).grad.mean(0), expected, rtol=1e-6, atol=1e-7)
        records.append({sum(r.values()) + held for _, r, held in scan.recorded})
    assert records == [{1}, {1}, {6}, {6}]


def test_the_held_gradient_reaches_its_owner_alone_and_only_if_recomputed():
    grads = {}
    for held in ("recompute", "drop"):
        loss = {"name": "emc2", "beta": BETA, "held": held, "burn_in": 0.0}
        bench = Bench(loss, 3, of={"count": 12, "dtype": torch.float64}, batch_size=2)
        table, owners = bench.oracle.criterion._keys, bench.oracle.criterion._setting.owners
        stays = 4  # an example of rank 1, which is not in the batch
        assert int(owners.of(torch.tensor([stays]))) == 1
        table[0] = 2 * stays
        bench.oracle.criterion._scores[0] = 1e6  # never left
        batch = bench.batch_of([0, 3], [1, 7], [2, 5])
        grads[held] = bench(batch).grad
    apart = grads["recompute"] - grads["drop"]
    assert not apart[2].any()
    leaf = bench.leaf()
    z, again = bench.embeddings(batch), bench.held(torch.tensor([2 * stays]), leaf)
    rows = torch.cat([z[0, :2], z[1, :2]])
    (owner,) = torch.autograd.grad(BETA / 4 * (rows @ again[0]).sum(), leaf)
    torch.testing.assert_close(apart[1], owner, rtol=1e-9, atol=1e-12)
    leaf = bench.leaf()
    z = bench.embeddings(batch, leaf)
    anchors = torch.cat([z[0, :2], z[1, :2]])
    still = bench.held(torch.tensor([2 * stays]))[0]
    (asked,) = torch.autograd.grad(BETA / 4 * (anchors @ still).sum(), leaf)
    torch.testing.assert_close(apart[0], asked, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_rows_add_up_to_one_and_own_columns_weigh_nothing(mode, monkeypatch):
    seen = []
    weigh = EMC2.weigh
    monkeypatch.setattr(
        EMC2, "weigh", lambda self, visit: seen.append((visit, weigh(self, visit))) or seen[-1][1]
    )
    bench = Bench("emc2", 2, of={"mode": mode, "count": 9}, batch_size=3)
    for bench.comm.step in range(4):
        bench(drawn_twice(bench, bench.comm.step))
    for visit, weights in seen:
        for rows, found in zip(visit.rows, weights, strict=True):
            total = found.columns.sum(dim=1)
            for others in found.others:
                total = total + others.weights.sum(dim=1)
            any_column = rows.valid.any(dim=1)
            torch.testing.assert_close(total[any_column], torch.ones(int(any_column.sum())))
            assert not found.columns[~rows.valid].any()


@pytest.mark.parametrize("score", ["stale", "fresh"])
@pytest.mark.parametrize("mode", MODES)
def test_two_examples_have_two_proposals_and_record_one(mode, score):
    bench = Bench({"name": "emc2", "score": score}, of={"mode": mode, "count": 8}, batch_size=2)
    scan = Scan(bench)
    scan.loss = bench.oracle.criterion.model_copy(update={"beta": BETA})
    for bench.comm.step in range(3):
        batch = bench.batches()
        scan.step(batch)
        for _, records, held in scan.recorded:
            # Of pairs only the other side is proposed: 1 proposal, none burnt.
            assert sum(records.values()) + held == 1
        assert bench(batch).grad.isfinite().all()


@pytest.mark.parametrize("name", ["emc2", "simclr", "dcl", "sogclr", "moco", "negcache", "full"])
@pytest.mark.parametrize("mode", MODES)
def test_equal_embeddings_have_no_gradient_and_the_loss_log_m(name, mode):
    loss = {"name": name, "beta": BETA} | ({"queue": 16} if name == "moco" else {})
    bench = Bench(loss, 2, of={"mode": mode, "count": 12, "dtype": torch.float64})
    for tower in (bench.problem.module.image, bench.problem.module.text):
        torch.nn.init.zeros_(tower[-1].weight)
        torch.nn.init.ones_(tower[-1].bias)
    for row in bench.x:
        bench.oracle.layout.gather(bench.problem.module, row)
    for bench.comm.step in range(3):
        batch = bench.batches()
        estimate = bench(batch)
        assert estimate.grad.mean(0).abs().max() < 1e-7 * BETA
        if name == "emc2":
            assert estimate.metrics["acceptance"].tolist() == [1, 1]
    m = 7 if mode == "pairs" else 14  # 8 examples in the batches of both ranks
    torch.testing.assert_close(
        bench.oracle.loss(bench.x, batch), torch.full((2,), math.log(m), dtype=torch.float64)
    )


def test_pairs_have_two_chains_and_hold_the_other_side():
    bench = Bench("emc2", 2, of={"mode": "pairs", "count": 12})
    for bench.comm.step in range(4):
        bench()
    kept = chains_of(bench)
    assert len(kept) == 24
    assert all(
        key % 2 == 1 - view and key // 2 != example for (example, view), (key, _) in kept.items()
    )


def test_a_row_without_any_negative_keeps_its_chain():
    bench = Bench("emc2", of={"count": 6}, batch_size=2)
    bench()
    before = bench.oracle.criterion._keys.clone()
    bench.comm.step = 1
    estimate = bench(bench.batch_of([3, 3]))
    assert torch.equal(bench.oracle.criterion._keys, before)
    assert estimate.grad.isfinite().all()
