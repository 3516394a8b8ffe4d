"""Batches that weigh differently: ranks count by their tokens, not alike."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from gossamer.algorithms.decentralized.all_reduce import AllReduce
from gossamer.algorithms.decentralized.dsgd import DSGD
from gossamer.algorithms.optimizers.sgd import SGD
from gossamer.algorithms.oracles.backprop import Backprop
from gossamer.algorithms.privacy.clipping import make_clip
from gossamer.algorithms.privacy.dp import DP
from gossamer.algorithms.privacy.public import PublicData
from gossamer.algorithms.problems import Batch, Problem
from gossamer.algorithms.program import TrainingProgram
from gossamer.algorithms.tasks.arrays import TensorDataset
from gossamer.algorithms.zeroth_order.zeroth_order import ZerothOrder
from gossamer.runtime import Communicator, ConfigError, StackedTransport
from gossamer.topologies import build

N, B, T, V = 4, 3, 5, 7
TOTAL = N * B


class Next(nn.Module):
    """Token by token: an embedding and a layer."""

    def __init__(self):
        super().__init__()
        self.tokens, self.output = nn.Embedding(V, 6), nn.Linear(6, V)

    def forward(self, tokens):
        return self.output(torch.tanh(self.tokens(tokens)))


def loss(module, inputs):
    tokens, targets = inputs
    return F.cross_entropy(module(tokens).flatten(0, -2), targets.flatten(), ignore_index=-100)


def weigh(inputs):
    return float((inputs[1] != -100).sum())


def documents(lengths, n=N, dtype=torch.float32, **options):
    """Documents of ``lengths`` tokens, padded to T, dealt to n ranks in order."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(V, (len(lengths), T), generator=generator)
    targets = torch.randint(V, (len(lengths), T), generator=generator)
    targets[torch.arange(T) >= torch.tensor(lengths)[:, None]] = -100
    torch.manual_seed(0)
    shards = tuple(np.array_split(np.arange(len(lengths)), n))
    options = {"weigh": weigh, "uneven": True, "objective": "examples"} | options
    data = TensorDataset((tokens, targets))
    return Problem(Next().to(dtype), data, shards, loss, **options)


def prepared(problem, n=N, make=Backprop, **options):
    comm = Communicator(build("complete", n), StackedTransport())
    oracle = make(batch_size=B, **options)
    oracle.setup(comm, problem)
    x = comm.alloc(oracle.layout.d, oracle.layout.dtype)
    x[:] = oracle.layout.gather(problem.module, torch.empty_like(x[0]))
    return comm, oracle, x, [Batch(problem.train[torch.from_numpy(s)]) for s in problem.shards]


def mean(comm, estimate):
    return comm.all_reduce(estimate.grad, "mean")


def relative(a, b):
    return float((a - b).norm() / b.norm())


LENGTHS = [5, 5, 5, 1, 0, 0, 2, 3, 1, 0, 0, 0]
"""Of three documents on each of four ranks; the last has no token at all."""

masks = st.lists(st.integers(0, T), min_size=TOTAL, max_size=TOTAL)


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 2}, {"vectorize": True}])
@given(lengths=masks)
@settings(max_examples=30, deadline=None)
def test_n_ranks_give_the_gradient_of_one_with_all_their_documents(options, lengths):
    assume(sum(lengths) > 0)
    comm, oracle, x, batches = prepared(documents(lengths), **options)
    one, alone, y, whole = prepared(documents(lengths, n=1), n=1)
    found, expected = mean(comm, oracle(x, batches)), mean(one, alone(y, whole))
    assert relative(found, expected) <= 1e-5


def test_ranks_that_counted_alike_would_give_another_gradient():
    uneven, even = documents(LENGTHS[:9], 3), documents(LENGTHS[:9], 3, uneven=False)
    one, alone, y, whole = prepared(documents(LENGTHS[:9], n=1), n=1)
    expected = mean(one, alone(y, whole))
    for problem, bound in ((uneven, 1e-6), (even, None)):
        comm, oracle, x, batches = prepared(problem, 3)
        apart = relative(mean(comm, oracle(x, batches)), expected)
        assert apart <= bound if bound else apart > 0.1


@pytest.mark.parametrize("options", [{}, {"vectorize": True}, {"micro_batch_size": 1}])
def test_no_token_anywhere_gives_zeros(options):
    _, oracle, x, batches = prepared(documents([0] * TOTAL), **options)
    estimate = oracle(x, batches)
    assert not estimate.grad.any()
    assert estimate.loss.tolist() == [0.0] * N
    assert oracle.loss(x, batches).tolist() == [0.0] * N


def test_the_loss_stays_each_ranks_own_mean():
    problem = documents(LENGTHS)
    _, oracle, x, batches = prepared(problem)
    losses = oracle(x, batches).loss
    for batch, found in zip(batches[:3], losses, strict=False):
        assert float(found) == pytest.approx(loss(problem.module, batch.inputs).item(), rel=1e-6)
    assert float(losses[3]) == 0.0


def test_a_combination_is_weighed_as_its_points_are():
    comm, oracle, x, batches = prepared(documents(LENGTHS, dtype=torch.float64))
    other = x + 0.5
    terms = [(1.0, x), (-0.5, other)]
    parts = [c * mean(comm, oracle(point, batches)).clone() for c, point in terms]
    found = mean(comm, oracle(x, batches, combine=terms))
    torch.testing.assert_close(found, sum(parts), rtol=0, atol=1e-14)


def test_a_sink_gets_weighed_gradients():
    _, oracle, x, batches = prepared(documents(LENGTHS))
    row = oracle(x, batches).grad.clone()
    got = torch.zeros_like(row)
    oracle(x, batches, sink=lambda where, grad: got[:, where].copy_(grad))
    assert torch.equal(got, row)


def test_documents_of_unequal_shards_stand_for_more_on_longer_ones():
    lengths, sizes = [5, 3, 1, 4, 2, 2, 5, 1, 3, 2], (2, 8)
    problem = documents(lengths, dtype=torch.float64)
    problem = replace(problem, shards=(np.arange(2), np.arange(2, 10)))
    comm, oracle, x, _ = prepared(problem, 2)
    batches = [Batch(problem.train[torch.tensor(places)]) for places in ([0, 1], [4, 6])]
    found = mean(comm, oracle(x, batches))
    # Each document of a batch stands for N_i / 2 of its shard.
    stands = [size / 2 for size in sizes]
    tokens = [weigh(batch.inputs) for batch in batches]
    gradients = []
    for batch in batches:
        problem.module.zero_grad()
        loss(problem.module, batch.inputs).backward()
        row = torch.zeros(oracle.layout.d, dtype=torch.float64)
        for s, p in zip(oracle.layout.slices, problem.module.parameters(), strict=True):
            row[s.begin : s.end] = p.grad.flatten()
        gradients.append(row)
    terms = [c * w * g for c, w, g in zip(stands, tokens, gradients, strict=True)]
    weights = [c * w for c, w in zip(stands, tokens, strict=True)]
    torch.testing.assert_close(found[0], sum(terms) / sum(weights), rtol=0, atol=1e-14)


def test_whole_unequal_shards_give_the_mean_over_all_tokens():
    lengths = [5, 3, 1, 4, 2, 2, 5, 1, 3, 2]
    problem = replace(
        documents(lengths, dtype=torch.float64), shards=(np.arange(2), np.arange(2, 10))
    )
    comm, oracle, x, batches = prepared(problem, 2, sampling="full")
    one, alone, y, whole = prepared(documents(lengths, n=1, dtype=torch.float64), n=1)
    found, expected = mean(comm, oracle(x, batches)), mean(one, alone(y, whole))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


# --- runs -----------------------------------------------------------------------------------------


def trained(problem, n, per_layer=False, algorithm=None, steps=4, **options):
    comm = Communicator(build("complete", n), StackedTransport(), steps=steps)
    algorithm = algorithm or AllReduce(optimizer=SGD(lr=0.5), per_layer=per_layer)
    oracle = Backprop(sampling="full", **options)
    program = TrainingProgram(comm, problem, oracle, algorithm).start()
    for comm.step in range(steps):
        program.step()
    return program


@pytest.mark.parametrize("per_layer", [False, True])
def test_training_on_four_ranks_is_training_on_one(per_layer):
    four = trained(documents(LENGTHS), 4, per_layer).state.x[:1]
    one = trained(documents(LENGTHS, 1), 1).state.x
    assert relative(four, one) <= 1e-5
    # What it is not, where ranks count alike (all but the last, which has no token to count).
    three, whole = (trained(documents(LENGTHS[:9], n, uneven=False), n).state.x[:1] for n in (3, 1))
    assert relative(three, whole) > 0.05


@pytest.mark.parametrize("objective", ["examples", "ranks"])
def test_figures_are_means_over_tokens_though_a_rank_has_none(objective):
    n, lengths = 4, LENGTHS
    program = trained(documents(lengths, n), n, steps=0, objective=objective)
    found, batch_loss = program.evaluate(), program.step()["batch_loss"]
    problem = documents(lengths, n)
    whole = loss(problem.module, problem.train[torch.arange(len(lengths))]).item()
    own = [
        loss(problem.module, problem.train[torch.from_numpy(shard)]).item()
        for shard in problem.shards[:3]
    ]
    expected = whole if objective == "examples" else sum(own) / 3
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
    assert found["rank_loss"] == pytest.approx(sum(own) / 3, rel=1e-6)
    assert found["worst_rank_loss"] == pytest.approx(max(own), rel=1e-6)
    assert 0 < found["grad_norm"] < 10
    if objective == "examples":
        assert batch_loss.mean().item() == pytest.approx(whole, rel=1e-6)


def test_texts_are_evaluated_in_parts_of_a_batch_or_of_two_thousand_tokens():
    assert prepared(documents(LENGTHS))[1].examples_at_once == 2048 // T
    assert prepared(documents(LENGTHS), micro_batch_size=2)[1].examples_at_once == 2


def test_weights_cost_a_number_per_rank_and_gradient():
    gradient = trained(documents([T] * TOTAL, uneven=False), 4).comm.traffic.bytes_sent
    weighed = trained(documents([T] * TOTAL), 4).comm.traffic.bytes_sent
    assert (weighed - gradient).tolist() == [4 * 2 * 8 * 3 // 4] * 4
    # The same tokens everywhere: the same bits as if ranks counted alike.
    even = trained(documents([T] * TOTAL, uneven=False), 4)
    assert trained(documents([T] * TOTAL), 4).parameters_sha256() == even.parameters_sha256()


def test_a_mean_over_ranks_weighs_no_tokens():
    problem = documents(LENGTHS[:9], 3)
    comm, oracle, x, batches = prepared(problem, 3, objective="ranks")
    before = comm.traffic.bytes_sent.copy()
    estimate = oracle(x, batches)
    assert (comm.traffic.bytes_sent == before).all()
    for i, batch in enumerate(batches):
        problem.module.zero_grad()
        oracle.layout.bind(problem.module, x[i])
        loss(problem.module, batch.inputs).backward()
        for s, p in zip(oracle.layout.slices, problem.module.parameters(), strict=True):
            assert torch.equal(estimate.grad[i, s.begin : s.end], p.grad.flatten())


def test_gossip_weighs_tokens_too():
    # On a complete graph one gradient step and one average is all-reduce's step.
    gossip = trained(documents(LENGTHS), 4, algorithm=DSGD(optimizer=SGD(lr=0.5)), steps=1)
    reduced = trained(documents(LENGTHS), 4, steps=1)
    apart = relative(gossip.state.x.mean(0), reduced.state.x.mean(0))
    assert apart <= 1e-6


@pytest.mark.parametrize("estimate", ["two-sided", "one-sided", "forward"])
def test_zeroth_order_weighs_tokens_as_well(estimate):
    options = {"make": ZerothOrder, "estimate": estimate, "queries": 2, "eps": 1e-4}
    kind = {"dtype": torch.float64}
    comm, oracle, x, batches = prepared(documents(LENGTHS, **kind), **options)
    one, alone, y, whole = prepared(documents(LENGTHS, n=1, **kind), n=1, **options)
    found, expected = mean(comm, oracle(x, batches)), mean(one, alone(y, whole))
    assert expected.any()
    assert relative(found, expected) <= 1e-6  # losses' differences, over 2 eps


def test_privacy_counts_documents_alike_and_those_of_no_token_not_at_all():
    lengths = [5, 1, 0, 3]
    problem = documents(lengths, n=1, dtype=torch.float64)
    comm, _, x, batches = prepared(problem, n=1)
    inner = Backprop(batch_size=4)
    inner.setup(comm, problem)
    clip = make_clip("flat", 1e6, 0.0, len(inner.layout.slices))
    total = inner.clipped(x, batches, clip).grad[0]
    expected = torch.zeros_like(total)
    for k in (0, 1, 3):
        problem.module.zero_grad()
        loss(problem.module, problem.train[torch.tensor([k])]).backward()
        for s, p in zip(inner.layout.slices, problem.module.parameters(), strict=True):
            expected[s.begin : s.end] += p.grad.flatten()
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)


def test_public_examples_of_unequal_length_are_refused():
    dp = DP(inner=Backprop(batch_size=2), noise_multiplier=1.0, noise_seed=1, accountant="rdp")
    comm = Communicator(build("complete", 1), StackedTransport(), steps=4)
    with pytest.raises(ConfigError, match="public weighs shards by their examples"):
        PublicData(inner=dp, fraction=0.5).setup(comm, documents(LENGTHS, n=1))
