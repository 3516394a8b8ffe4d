"""Collectives that take tensors: what they do by themselves, and what they leave to Python."""

import secrets

import pytest
import torch

from gossamer.runtime import Communicator, StackedTransport
from gossamer.runtime.exchange import plan_exchange
from gossamer.runtime.native import DTYPES
from gossamer.runtime.placement import Placement
from gossamer.runtime.shared_memory import SharedMemory
from gossamer.topologies import build

N, D, TIMEOUT_S = 4, 37, 10.0


@pytest.fixture
def shared():
    memory = SharedMemory(secrets.token_bytes(16), 0, 1, [0])
    yield memory
    memory.close()


@pytest.fixture
def calls(shared):
    return shared.calls([N])


def rows(dtype=torch.float32, n=N, d=D):
    comm = Communicator(build("ring", n), StackedTransport())
    return comm.random("x").normal_(torch.empty(n, d)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_those_of_the_stacked_collectives(shared, calls, dtype):
    topology = build("ring", N)
    stacked = Communicator(topology, StackedTransport())
    x, y, out = rows(dtype), rows(dtype), torch.empty(N, D, dtype=dtype)
    plan = shared.prepare(plan_exchange(topology.round(0), Placement(N, 1), 0))
    assert calls.average(plan, x, out, y, 0.5, 1, 1, TIMEOUT_S) == 0
    assert torch.equal(out, stacked.neighbor_average(x, axpy=(0.5, y)))
    row = torch.empty(1, D, dtype=dtype)
    assert calls.all_reduce(x, row, True, TIMEOUT_S) == 0
    assert torch.equal(row, stacked.all_reduce(x, "mean"))
    assert calls.broadcast(x, 2, row, TIMEOUT_S) == 0
    assert torch.equal(row, x[2:3])
    assert calls.all_gather(x, out, TIMEOUT_S) == 0
    assert torch.equal(out, x)


def test_rows_of_a_wider_block_and_parameters_are_taken_as_they_lie(calls):
    block = rows(d=100)
    x, row = block[:, 3:40], torch.nn.Parameter(torch.empty(1, D))
    assert calls.all_reduce(x, row, False, TIMEOUT_S) == 0
    torch.testing.assert_close(row.detach(), x.sum(0, keepdim=True))


def test_what_was_counted_is_handed_over_once(calls):
    out = torch.empty(1, D)
    calls.all_reduce(rows(), out, False, TIMEOUT_S)
    calls.broadcast(rows(), 1, out, TIMEOUT_S)
    seconds, sent, messages = calls.take()
    assert seconds > 0
    whole = 2 * D * 4 * (N - 1) // N
    assert sent == [whole, whole + (N - 1) * D * 4, whole, whole]
    assert messages == [2, 2 + N - 1, 2, 2]
    assert calls.take() == (0.0, [0] * N, [0] * N)


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(N + 1, D),
        torch.ones(0, D),
        torch.ones(N, D + 1),
        torch.ones(N * D),
        torch.ones(N, 2 * D)[:, ::2],
        torch.ones(D, N).T,
        torch.ones(1, D).expand(N, D),
        torch.ones(N, D, dtype=torch.float64),
        torch.ones(N, D, device="meta"),
        torch.ones(N, D).to_sparse(),
        [[1.0] * D] * N,
    ],
    ids=str,
)
def test_what_is_out_of_the_ordinary_is_left_to_python(calls, x):
    row = torch.zeros(1, D)
    assert calls.all_reduce(x, row, False, TIMEOUT_S) == -1
    assert calls.broadcast(x, 0, row, TIMEOUT_S) == -1
    assert calls.all_gather(x, torch.zeros(N, D), TIMEOUT_S) == -1
    assert calls.all_reduce(rows(), x, False, TIMEOUT_S) == -1
    assert not row.any()
    assert calls.take() == (0.0, [0] * N, [0] * N)


@pytest.mark.parametrize("root", [-1, N, 99])
def test_a_root_that_is_no_rank_is_left_to_python(calls, root):
    assert calls.broadcast(rows(), root, torch.zeros(1, D), TIMEOUT_S) == -1


def test_integers_are_summed_elsewhere(calls):
    x = torch.ones(N, D, dtype=torch.int64)
    assert calls.all_reduce(x, torch.zeros(1, D, dtype=torch.int64), False, TIMEOUT_S) == -1
    out = torch.zeros(N, D, dtype=torch.int64)
    assert calls.all_gather(x, out, TIMEOUT_S) == 0
    assert torch.equal(out, x)
