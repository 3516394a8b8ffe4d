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


# --- bytes ------------------------------------------------------------------------------------


def bytes_of(bench, batch):
    """Return what each rank sends in a step, counted as the run counts it."""
    before = bench.comm.traffic.bytes_sent.copy()
    bench(batch)
    return (bench.comm.traffic.bytes_sent - before).tolist()


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("loss", ["simclr", "sogclr"])
def test_bytes_are_those_of_a_gather_of_embeddings_and_ids_and_a_scatter_back(n, loss):
    bench = Bench(loss, n, batch_size=3)
    b, dim = 3, 5
    gathered, scattered = (n - 1) * 2 * b * dim * 4, (n - 1) * 2 * b * dim * 4
    assert bytes_of(bench, bench.batches()) == [gathered + (n - 1) * b * 8 + scattered] * n


def test_bytes_of_held_states_are_keys_there_and_rows_back_and_gradients_there():
    n, dim = 3, 5
    bench = Bench({"name": "emc2", "burn_in": 0.0}, n, of={"count": 12}, batch_size=2)
    columns = bytes_of(bench, bench.batch_of([0, 3], [1, 4], [2, 5]))
    table, scores = bench.oracle.criterion._keys, bench.oracle.criterion._scores
    scores.fill_(1e6)  # never left
    # Rank 0 holds three states of rank 1 (one of them twice), rank 1 one of rank 2, rank 2 its own.
    table[0] = torch.tensor([2 * 7, 2 * 10, 2 * 7 + 1, 2 * 7, -1, -1, -1, -1])
    table[1] = torch.tensor([2 * 8] * 8)
    table[2] = torch.tensor([2 * 11] * 8)
    bench.comm.step = 1
    found = bytes_of(bench, bench.batch_of([0, 3], [1, 4], [2, 5]))
    exchanges = 3 * (n - 1) * 8  # the lengths of the messages, thrice
    keys = [3 * 8, 1 * 8, 0]
    rows = [0, 3 * dim * 4, 1 * dim * 4]
    gradients = [3 * dim * 4, 1 * dim * 4, 0]
    plain = (n - 1) * (2 * 2 * 2 * dim * 4 + 2 * 8)
    assert columns == [plain + exchanges] * n  # nobody held anything
    assert found == [
        plain + exchanges + k + r + g for k, r, g in zip(keys, rows, gradients, strict=True)
    ]


def test_neighbors_send_along_the_edges_alone():
    bench = Bench("simclr", 4, topology="ring", batch_size=3, negatives="neighbors")
    b, dim = 3, 5
    assert bytes_of(bench, bench.batches()) == [2 * (2 * 2 * b * dim * 4 + b * 8)] * 4


# --- neighbours -------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", ["complete", "ring", "star", "one_peer_exponential"])
def test_gradients_of_neighbours_come_back_to_who_made_the_embeddings(topology):
    bench = Bench("dcl", 4, topology=topology, of={"dtype": torch.float64}, negatives="neighbors")
    generator = torch.Generator().manual_seed(0)
    bench.x += 0.2 * torch.randn(bench.x.shape, generator=generator, dtype=torch.float64)
    for bench.comm.round in range(2):
        batch = bench.batches()
        leaf = bench.x.clone().requires_grad_()
        z = [bench.embeddings([own], row) for own, row in zip(batch, leaf, strict=True)]
        W = bench.comm.topology.round(bench.comm.round).matrix()
        terms = []
        for i in range(4):
            near = [j for j in range(4) if j == i or W[i, j] != 0]
            for view in (0, 1):
                for k in range(4):
                    others = [
                        z[j][side, m]
                        for j in near
                        for side in (0, 1)
                        for m in range(4)
                        if (j, m) != (i, k)
                    ]
                    anchor, positive = z[i][view, k], z[i][1 - view, k]
                    scores = 14.28 * torch.stack(others) @ anchor
                    terms.append((torch.logsumexp(scores, 0) - 14.28 * positive @ anchor) / 8)
        (expected,) = torch.autograd.grad(torch.stack(terms).sum(), leaf)
        found = bench.oracle(bench.x, batch).grad
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_negatives_of_all_are_those_of_neighbours_on_a_complete_graph():
    grads = []
    for negatives in ("all", "neighbors"):
        bench = Bench({"name": "emc2", "score": "fresh"}, 3, negatives=negatives)
        for bench.comm.step in range(3):
            found = bench()
        grads.append(found.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_neighbours_that_stay_are_warned_of(caplog):
    Bench("simclr", 4, topology="ring", negatives="neighbors")
    assert "negatives of neighbours in ring, which never changes" in caplog.text
    caplog.clear()
    for topology in ("one_peer_exponential", "complete"):
        Bench("simclr", 4, topology=topology, negatives="neighbors")
    assert not caplog.text


def test_a_rank_alone_is_its_own_neighbourhood():
    grads = [Bench("dcl", 1, negatives=negatives)().grad for negatives in ("all", "neighbors")]
    assert torch.equal(*grads)


@pytest.mark.parametrize("loss", ["dcl", "sogclr", "emc2", "isogclr"])
def test_a_rank_with_one_example_that_hears_nobody_does_no_harm(loss):
    bench = Bench(loss, 3, topology="random_edge", batch_size=1, negatives="neighbors")
    heard = 0
    for bench.comm.step in range(6):
        bench.comm.round = bench.comm.step
        estimate = bench()
        alone = [not bench.comm.topology.round(bench.comm.round).recv(r)[0].size for r in range(3)]
        heard += sum(alone)
        assert estimate.grad.isfinite().all()
        assert estimate.loss.isfinite().all()
        assert bench.oracle.loss(bench.x, bench.batches()).isfinite().all()
        for name, table in bench.oracle.state_dict().items():
            assert not table.isnan().any(), name
        for name, figure in estimate.metrics.items():
            assert torch.as_tensor(figure).isfinite().all(), name
    assert heard
