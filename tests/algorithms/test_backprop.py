"""The backprop oracle: gradients of modules as rows, one hosted rank after the other."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from gossamer.algorithms.oracles.backprop import Backprop
from gossamer.algorithms.problems import Batch, Problem
from gossamer.runtime import Communicator, ConfigError, StackedTransport
from gossamer.topologies import build

N, CLASSES = 4, 3


class Examples:
    """Random inputs and labels."""

    def __init__(self, count, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(count, 6, generator=generator, dtype=dtype)
        self.y = torch.randint(CLASSES, (count,), generator=generator)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, indices):
        return self.x[indices], self.y[indices]


def cross_entropy(module, inputs):
    return nn.functional.cross_entropy(module(inputs[0]), inputs[1])


def problem(module=None, sizes=(8,) * N, dtype=torch.float32, **options):
    torch.manual_seed(0)
    module = module or nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    train = Examples(sum(sizes), dtype)
    cuts = np.cumsum((0, *sizes))
    shards = tuple(np.arange(a, b) for a, b in itertools.pairwise(cuts))
    return Problem(module.to(dtype), train, shards, cross_entropy, **options)


def prepared(prob, n=N, device="cpu", **options):
    comm = Communicator(build("ring", n), StackedTransport(device))
    oracle = Backprop(**options)
    oracle.setup(comm, prob)
    x = comm.alloc(oracle.layout.d, oracle.layout.dtype)
    x[:] = oracle.layout.gather(prob.module, torch.empty_like(x[0]))
    x += 0.1 * comm.random("apart").normal_(torch.empty_like(x))
    batches = [Batch(prob.train[torch.from_numpy(s)]) for s in prob.shards[:n]]
    return comm, oracle, x, batches


def reference(prob, layout, row, inputs):
    """The gradient by torch.autograd.grad over a functional call."""
    given = {
        s.name: v.clone().requires_grad_()
        for s, v in zip(layout.slices, layout.views(row), strict=True)
    }
    out = torch.func.functional_call(prob.module, given, (inputs[0],))
    loss = nn.functional.cross_entropy(out, inputs[1])
    grads = torch.autograd.grad(loss, list(given.values()))
    return loss.detach(), torch.cat([g.reshape(-1) for g in grads])


def test_each_row_holds_the_gradient_of_its_own_rank():
    prob = problem(dtype=torch.float64)
    _, oracle, x, batches = prepared(prob)
    estimate = oracle(x, batches)
    for i, batch in enumerate(batches):
        loss, grad = reference(prob, oracle.layout, x[i], batch.inputs)
        torch.testing.assert_close(estimate.loss[i], loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(
            oracle.layout.values(estimate.grad[i]), grad, rtol=1e-10, atol=1e-12
        )
    torch.testing.assert_close(oracle.loss(x, batches), estimate.loss, rtol=0, atol=0)
    assert estimate.weight.tolist() == [8.0] * N


def test_padding_between_parameters_stays_zero():
    prob = problem()
    _, oracle, x, batches = prepared(prob)
    grad = oracle(x, batches).grad
    assert oracle.layout.d > oracle.layout.size
    outside = torch.ones(oracle.layout.d, dtype=torch.bool)
    for s in oracle.layout.slices:
        outside[s.begin : s.end] = False
        assert s.begin * 4 % 64 == 0
    assert not grad[:, outside].any()


def test_a_ranks_bits_do_not_depend_on_how_many_stand_together():
    prob = problem()
    _, oracle, x, batches = prepared(prob)
    together = oracle(x, batches).grad.clone()
    _, alone, _, _ = prepared(problem(), n=1)
    for i in range(N):
        assert torch.equal(alone(x[i : i + 1].clone(), [batches[i]]).grad[0], together[i])


def test_micro_batches_add_up_to_the_batch():
    prob = problem(dtype=torch.float64)
    _, whole, x, batches = prepared(prob)
    _, pieces, _, _ = prepared(prob, micro_batch_size=3)
    expected, got = whole(x, batches), pieces(x, batches)
    torch.testing.assert_close(got.grad, expected.grad, rtol=0, atol=1e-14)
    torch.testing.assert_close(got.loss, expected.loss, rtol=0, atol=1e-14)


def test_vectorized_gradients_agree_to_rounding():
    prob = problem(dtype=torch.float64)
    _, looped, x, batches = prepared(prob)
    _, vectorized, _, _ = prepared(prob, vectorize=True)
    expected, got = looped(x, batches), vectorized(x, batches)
    torch.testing.assert_close(got.grad, expected.grad, rtol=0, atol=1e-13)
    torch.testing.assert_close(got.loss, expected.loss, rtol=0, atol=1e-13)


def test_vectorized_gradients_refuse_batches_of_different_size():
    prob = problem(sizes=(8, 8, 7, 8))
    _, oracle, x, batches = prepared(prob, vectorize=True)
    with pytest.raises(ConfigError, match="differ in shape"):
        oracle(x, batches)


def test_a_combination_uses_the_same_examples_at_every_point():
    prob = problem(dtype=torch.float64)
    _, oracle, x, batches = prepared(prob)
    y = x + 0.5
    at_x, at_y = oracle(x, batches).grad.clone(), oracle(y, batches).grad.clone()
    combined = oracle(x, batches, combine=[(2.0, x), (-0.5, y)])
    torch.testing.assert_close(combined.grad, 2.0 * at_x - 0.5 * at_y, rtol=0, atol=1e-14)
    torch.testing.assert_close(combined.loss, oracle.loss(x, batches), rtol=0, atol=0)


def test_a_sink_sees_every_slice_once():
    prob = problem()
    _, oracle, x, batches = prepared(prob)
    expected = oracle(x, batches).grad.clone()
    seen = torch.zeros_like(expected)
    oracle(x, batches, sink=lambda where, grad: seen[:, where].copy_(grad))
    assert torch.equal(seen, expected)


def test_a_mean_over_examples_weighs_ranks_by_their_shards():
    sizes = (2, 10, 5, 7)
    prob = problem(sizes=sizes, dtype=torch.float64)
    _, oracle, x, batches = prepared(prob, objective="examples", sampling="full")
    x[:] = x[0].clone()
    _, expected = reference(prob, oracle.layout, x[0], prob.train[torch.arange(sum(sizes))])
    mean = oracle(x, batches).grad.mean(dim=0)
    torch.testing.assert_close(oracle.layout.values(mean), expected, rtol=0, atol=1e-14)


def test_a_mean_over_ranks_weighs_them_alike():
    prob = problem(sizes=(2, 10, 5, 7), dtype=torch.float64)
    _, oracle, x, batches = prepared(prob, sampling="full")
    grad = oracle(x, batches).grad
    for i, batch in enumerate(batches):
        _, expected = reference(prob, oracle.layout, x[i], batch.inputs)
        torch.testing.assert_close(oracle.layout.values(grad[i]), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("vectorize", [False, True])
def test_dropout_masks_are_counted_by_rank_and_step(vectorize):
    net = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Linear(64, CLASSES))
    comm, oracle, x, batches = prepared(problem(net), vectorize=vectorize)
    x[:] = x[0].clone()
    same = [batches[0]] * N
    first = oracle(x, same).grad.clone()
    assert not torch.equal(first[0], first[1])  # each rank its own mask
    comm.step = 1
    assert not torch.equal(oracle(x, same).grad, first)
    comm.step = 0
    torch.manual_seed(12345)  # nothing depends on the global generator
    assert torch.equal(oracle(x, same).grad, first)
    # Every point of a combination sees the same masks.
    assert not oracle(x, same, combine=[(1.0, x), (-1.0, x.clone())]).grad.any()


def test_every_rank_keeps_its_own_running_statistics():
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES))
    _, oracle, x, batches = prepared(problem(net))
    oracle(x, batches)
    state = oracle.state_dict()
    means = state["buffers.1.running_mean"]
    assert means.shape == (N, 5)
    assert len({tuple(row.tolist()) for row in means}) == N
    assert state["buffers.1.num_batches_tracked"].tolist() == [1] * N
    saved = {name: rows.clone() for name, rows in state.items()}
    oracle(x, batches)
    oracle.load_state_dict(saved)
    assert torch.equal(
        oracle.state_dict()["buffers.1.running_mean"], saved["buffers.1.running_mean"]
    )


def test_tied_parameters_appear_once_and_frozen_ones_not_at_all():
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES))
    net[1].weight = net[0].weight
    net[2].bias.requires_grad_(False)
    _, oracle, x, batches = prepared(problem(net, dtype=torch.float64))
    names = [s.name for s in oracle.layout.slices]
    assert names == ["0.weight", "0.bias", "1.bias", "2.weight"]
    estimate = oracle(x, batches)
    assert estimate.grad[0, :36].abs().sum() > 0


def test_autocast_computes_in_bfloat16_and_keeps_float32_rows():
    _, plain, x, batches = prepared(problem())
    _, cast, _, _ = prepared(problem(), autocast="bfloat16")
    expected, got = plain(x, batches).grad.clone(), cast(x, batches).grad
    assert got.dtype == torch.float32
    assert not torch.equal(got, expected)
    # bfloat16 has 8 bits: about 1 % of gradients of size 0.1 to 1
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.02)


def test_an_empty_batch_gives_a_zero_gradient():
    prob = problem()
    _, oracle, x, batches = prepared(prob)
    empty = Batch(prob.train[torch.empty(0, dtype=torch.int64)])
    estimate = oracle(x, [empty, *batches[1:]])
    assert not estimate.grad[0].any()
    assert estimate.weight[0] == 0
    assert estimate.grad[1].any()


@pytest.mark.cuda
@pytest.mark.parametrize("vectorize", [False, True])
def test_a_gpu_gives_the_gradients_of_the_cpu(vectorize):
    _, here, x, batches = prepared(problem(dtype=torch.float64))
    _, there, y, _ = prepared(problem(dtype=torch.float64), device="cuda", vectorize=vectorize)
    expected, got = here(x, batches), there(y, batches)  # examples come from the CPU
    torch.testing.assert_close(got.grad.cpu(), expected.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(there.loss(y, batches), expected.loss, rtol=0, atol=1e-12)


def test_a_combination_goes_once_over_each_point():
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES))
    _, oracle, x, batches = prepared(problem(net))
    oracle(x, batches, combine=[(1.0, x), (-0.5, x + 1)])
    assert oracle.state_dict()["buffers.1.num_batches_tracked"].tolist() == [2] * N


def test_running_statistics_with_vectorize_are_refused():
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES))
    with pytest.raises(ConfigError, match="running statistics"):
        prepared(problem(net), vectorize=True)


def test_micro_batches_with_vectorize_are_refused():
    with pytest.raises(ConfigError, match="no effect with vectorize"):
        prepared(problem(), vectorize=True, micro_batch_size=2)
