"""Contrastive learning on 1, 2 and 4 ranks: the same batches, chains, losses and gradients."""

import numpy as np
import pytest
import torch
from contrastive_bench import Bench

LOSSES = [
    {"name": "emc2", "beta": 6.0},
    {"name": "emc2", "beta": 6.0, "score": "fresh", "held": "drop"},
    {"name": "emc2", "beta": 6.0, "score": "fresh", "burn_in": 0.0},
    "simclr",
    "dcl",
    "sogclr",
    "isogclr",
    {"name": "moco", "queue": 40},
    {"name": "negcache", "refresh": 0.0},
    {"name": "negcache", "refresh": 0.25},
    "full",
]


def by_example(bench):
    """Return {table: {example: its states}}, whoever owns them."""
    setting, found = bench.oracle.criterion._setting, {}
    for name, table in bench.oracle.criterion.state_dict().items():
        if name in ("encoder", "queue", "seen"):
            found[name] = {0: table[0].double()}
            continue
        rows = [row.reshape(setting.owners.most, -1) for row in table]
        found[name] = {
            int(example): rows[rank][place].double()
            for rank, ids in enumerate(setting.owners.ids)
            for place, example in enumerate(ids)
        }
    return found


def trained(loss, n, mode, count, **fields):
    """Return what five steps of all-reduce SGD look like on n ranks."""
    of = {"mode": mode, "count": count, "dtype": torch.float64}
    bench = Bench(loss, n, of=of, batch_size=8 // n, shards=4, **fields)
    steps = []
    for bench.comm.step in range(5):
        batch = bench.batches()
        found = bench(batch)
        grad = found.grad.mean(0)
        bench.x -= 0.3 * grad
        drawn = torch.cat([b.indices for b in batch])
        steps.append((drawn, float(found.loss.mean()), grad, by_example(bench)))
    return steps


@pytest.mark.parametrize(
    "loss", LOSSES, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values()))
)
@pytest.mark.parametrize("mode", ["infinite", "finite", "pairs"])
def test_steps_do_not_depend_on_the_number_of_ranks(loss, mode):
    alone = trained(loss, 1, mode, count=16)
    for n in (2, 4):
        for step, (one, other) in enumerate(
            zip(alone, trained(loss, n, mode, count=16), strict=True)
        ):
            where = f"{n} ranks, step {step}"
            assert torch.equal(one[0], other[0]), where
            assert one[1] == pytest.approx(other[1], abs=1e-6), where
            torch.testing.assert_close(one[2], other[2], rtol=0, atol=1e-6)
            assert one[3].keys() == other[3].keys()
            for name, states in one[3].items():
                for example, state in states.items():
                    assert torch.allclose(state, other[3][name][example], atol=1e-5, rtol=1e-6), (
                        where,
                        name,
                    )


@pytest.mark.parametrize("objective", ["ranks", "examples"])
def test_unequal_shards_count_by_their_examples_if_asked(objective):
    found = [trained("dcl", n, "finite", 18, objective=objective) for n in (1, 2, 4)]
    for other in found[1:]:
        for (_, _, one, _), (_, _, two, _) in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


def test_examples_weigh_rows_by_the_shards_they_stand_for():
    shards = [np.arange(4), np.arange(4, 24)]
    of = {"shards": shards, "dtype": torch.float64}
    grads = {}
    for objective in ("ranks", "examples"):
        bench = Bench("dcl", 2, of=of, objective=objective)
        batch = bench.batch_of([0, 1, 2, 3], [4, 5, 6, 7])
        grads[objective] = bench(batch).grad
    row = bench.leaf()
    z = bench.embeddings(batch, row).flatten(0, 1)
    scores = 14.28 * z @ z.T
    own = torch.eye(8, dtype=torch.bool).repeat(2, 2)
    terms = torch.logsumexp(scores.masked_fill(own, -torch.inf), 1) - (scores.diagonal(8).repeat(2))
    weights = torch.tensor(2 * ([4 / 24] * 4 + [20 / 24] * 4), dtype=torch.float64)
    (expected,) = torch.autograd.grad((weights * terms).sum() / 8, row)
    torch.testing.assert_close(grads["examples"].mean(0), expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(grads["examples"], grads["ranks"])
