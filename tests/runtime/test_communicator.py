"""The communicator with all ranks in one process: averages, messages, collectives, bytes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_ranks import on_processes

from gossamer.runtime import Communicator, StackedTransport
from gossamer.runtime.exchange import plan_exchange
from gossamer.runtime.placement import Placement
from gossamer.topologies import build

GRAPHS = ["ring", "exponential", "one_peer_exponential", "star", "complete", "directed_ring"]


def stacked(graph="ring", n=8, **options):
    return Communicator(build(graph, n), StackedTransport(), **options)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_average_is_the_product_with_the_mixing_matrix(graph, dtype):
    comm = stacked(graph)
    x = comm.random("x").normal_(comm.alloc(33, dtype))
    for t in range(4):
        comm.round = t
        expected = torch.from_numpy(comm.topology.round(t).matrix()) @ x.double()
        # float32 weights and sums of at most 8 terms of size about 1
        tolerance = 1e-6 if dtype == torch.float32 else 1e-14
        torch.testing.assert_close(
            comm.neighbor_average(x).double(), expected, rtol=0, atol=tolerance
        )


@pytest.mark.parametrize("graph", GRAPHS)
def test_averaging_in_place_gives_the_same_bits(graph):
    comm = stacked(graph)
    x = comm.random("x").normal_(comm.alloc(1000))
    y = comm.random("y").normal_(comm.alloc(1000))
    expected = comm.neighbor_average(x, axpy=(-0.3, y), rounds=2)
    assert comm.neighbor_average(x, out=x, axpy=(-0.3, y), rounds=2) is x
    assert torch.equal(x, expected)


def test_averaging_keeps_its_input():
    comm = stacked()
    x = comm.random("x").normal_(comm.alloc(10))
    kept = x.clone()
    comm.neighbor_average(x)
    assert torch.equal(x, kept)


def test_two_averages_of_one_step_use_the_same_round():
    comm = stacked("one_peer_exponential")
    x = comm.random("x").normal_(comm.alloc(10))
    assert torch.equal(comm.neighbor_average(x), comm.neighbor_average(x))


def test_an_asynchronous_average_gives_the_same_bits_and_waits_twice():
    comm = stacked()
    x = comm.random("x").normal_(comm.alloc(5000))
    work = comm.neighbor_average_async(x)
    assert torch.equal(work.wait(), comm.neighbor_average(x))
    assert work.wait() is work.wait()
    assert work.done()


def test_an_error_of_an_asynchronous_average_is_raised_by_its_wait():
    comm = stacked()
    x = comm.alloc(10)
    work = comm.neighbor_average_async(x, axpy=(1.0, torch.zeros(3, 3)))
    comm.neighbor_average(x)  # another operation is not bothered by it
    with pytest.raises(ValueError, match="axpy"):
        work.wait()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 4), "one row per hosted rank"),
        (torch.zeros(8), "one row per hosted rank"),
        (torch.zeros(8, 4, dtype=torch.int64), "dtype"),
        (torch.zeros(4, 8).t(), "contiguous"),
    ],
)
def test_rows_that_do_not_fit_are_refused(x, message):
    with pytest.raises(ValueError, match=message):
        stacked().neighbor_average(x)


def test_gathered_messages_sum_to_the_average_without_self():
    comm = stacked("star")
    x = comm.random("x").normal_(comm.alloc(16, torch.float64))
    messages = comm.neighbor_gather(x)
    total = messages.weighted_sum(messages.values, comm.alloc(16, torch.float64))
    diagonal = torch.from_numpy(comm.topology.round(0).self_weight.copy())[:, None]
    torch.testing.assert_close(total + diagonal * x, comm.neighbor_average(x), rtol=0, atol=1e-14)


def test_push_sum_keeps_its_sums_and_finds_the_mean_of_a_directed_graph():
    edges = [[i, (i + 1) % 6] for i in range(6)] + [[0, 3], [2, 5]]
    topology = build("custom", 6, edges=edges, directed=True, weights="push_sum")
    comm = Communicator(topology, StackedTransport())
    row = comm.alloc(3, torch.float64)
    row[:, :2] = comm.random("x").normal_(comm.alloc(2, torch.float64))
    row[:, 2] = 1.0
    mean = row[:, :2].mean(dim=0)
    sums = row.sum(dim=0)
    for _ in range(200):
        comm.neighbor_average(row, out=row)
    torch.testing.assert_close(row.sum(dim=0), sums, rtol=0, atol=1e-12)
    torch.testing.assert_close(row[:, :2] / row[:, 2:], mean.expand(6, 2), rtol=0, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 9), m=st.integers(0, 9))
def test_collectives_are_what_their_names_say(n, m):
    comm = stacked("ring", n)
    x = torch.arange(n * m, dtype=torch.float64).view(n, m)  # integers: sums are exact
    assert torch.equal(comm.all_reduce(x), x.sum(dim=0, keepdim=True))
    assert torch.equal(comm.all_reduce(x, "mean"), x.sum(dim=0, keepdim=True) / n)
    assert torch.equal(comm.all_gather(x), x)
    assert torch.equal(comm.broadcast(x, root=n - 1), x[n - 1 :])
    wide = torch.arange(n * n * m, dtype=torch.float64).view(n, n * m)
    assert torch.equal(comm.reduce_scatter(wide), wide.sum(dim=0).view(n, m))
    cube = wide.view(n, n, m)
    assert torch.equal(comm.all_to_all(cube), cube.transpose(0, 1))


def test_collectives_write_where_they_are_told():
    comm = stacked()
    x = comm.random("x").normal_(comm.alloc(5))
    rows, row = torch.empty(8, 5), torch.empty(1, 5)
    assert comm.all_gather(x, out=rows) is rows
    assert torch.equal(rows, x)
    assert comm.broadcast(x, root=3, out=row) is row
    assert torch.equal(row, x[3:4])


@pytest.mark.parametrize(
    "out", [torch.empty(3, 5), torch.empty(8, 5).double(), torch.empty(5, 8).T]
)
def test_an_output_that_does_not_fit_a_collective_is_refused(out):
    comm = stacked()
    with pytest.raises(ValueError, match="all_gather: out must be"):
        comm.all_gather(comm.alloc(5), out=out)
    with pytest.raises(ValueError, match="broadcast: out must be"):
        comm.broadcast(comm.alloc(5), out=out)


@pytest.mark.parametrize(
    "x", [torch.ones(0, 4), torch.ones(3, 4), torch.ones(2), torch.ones(2, 4, device="meta")]
)
@pytest.mark.parametrize("operation", ["all_reduce", "all_gather", "broadcast", "reduce_scatter"])
def test_rows_that_are_not_the_hosted_ranks_are_refused_by_collectives(operation, x):
    comm = Communicator(build("ring", 2), StackedTransport())
    with pytest.raises(ValueError, match=rf"{operation}: x must be \(2, m\), one row per hosted"):
        getattr(comm, operation)(x)


@pytest.mark.parametrize("root", [-1, 2, 99])
def test_a_root_that_is_no_rank_is_refused(root):
    comm = Communicator(build("ring", 2), StackedTransport())
    with pytest.raises(ValueError, match=rf"root must be a rank, 0..1, got {root}"):
        comm.broadcast(torch.ones(2, 3), root)


@pytest.mark.parametrize("rounds", [0, -1])
def test_an_average_needs_a_round(rounds):
    comm = Communicator(build("ring", 2), StackedTransport())
    with pytest.raises(ValueError, match=f"rounds must be at least 1, got {rounds}"):
        comm.neighbor_average(torch.ones(2, 3), rounds=rounds)


def test_several_rounds_do_not_write_over_what_the_last_one_adds():
    comm = Communicator(build("ring", 4), StackedTransport())
    x, y = comm.alloc(3) + 1, comm.alloc(3) + 2
    assert (comm.neighbor_average(x, out=y, axpy=(0.5, y)) == 2).all()  # one round may
    with pytest.raises(ValueError, match="out must not be axpy's y"):
        comm.neighbor_average(x, out=y, axpy=(0.5, y), rounds=2)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([torch.ones(3)], "a row for each of 2 hosted ranks"),
        ([torch.ones(3), torch.ones(3).double()], "of one dtype"),
        ([torch.ones(3), torch.ones(6)[::2]], "contiguous"),
        ([torch.ones(3), torch.ones(1, 3)], r"must be \(m,\)"),
    ],
)
def test_ragged_rows_are_checked_before_their_lengths_travel(rows, message):
    comm = Communicator(build("ring", 2), StackedTransport())
    with pytest.raises(ValueError, match=message):
        comm.neighbor_gather_ragged(rows)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("graph", ["ring", "directed_ring", "one_peer_exponential"])
def test_each_edge_carries_a_message_of_its_own(graph, processes):
    def message(source, target):
        return torch.full((source + 2 * target + 1,), 10 * source + target, dtype=torch.int32)

    def work(transport):
        comm = Communicator(build(graph, 5), transport, timeout_s=30)
        for comm.round in range(3):
            round_ = comm.topology.round(comm.round)
            edges = zip(round_.sources.tolist(), round_.targets.tolist(), strict=True)
            edges = [e for e in edges if sum(e) % 3]  # the others have nothing to say
            sent = {e: message(*e) for e in edges if e[0] in comm.ranks}
            received = {e: torch.zeros_like(message(*e)) for e in edges if e[1] in comm.ranks}
            before = comm.traffic.bytes_sent.sum(), comm.traffic.messages_sent.sum()
            comm.neighbor_all_to_all(sent, received)
            assert all(torch.equal(values, message(*e)) for e, values in received.items())
            counted = sum(m.nbytes for m in sent.values()), len(sent)
            assert comm.traffic.bytes_sent.sum() - before[0] == counted[0]
            assert comm.traffic.messages_sent.sum() - before[1] == counted[1]

    on_processes(processes, work)


def test_messages_past_the_edges_or_known_to_one_end_are_refused():
    comm, one = stacked("ring", 5), torch.ones(1)
    with pytest.raises(ValueError, match=r"no edge \(0, 2\)"):
        comm.neighbor_all_to_all({(0, 2): one}, {(0, 2): one})
    for sent, received in (({(0, 1): one}, {}), ({}, {(0, 1): one})):
        with pytest.raises(ValueError, match=r"one end of \(0, 1\) has no message"):
            comm.neighbor_all_to_all(sent, received)
    assert not comm.traffic.bytes_sent.any()


def test_metrics_do_not_count_as_the_runs_bytes():
    comm = stacked()
    comm.all_reduce(comm.alloc(10), count=False)
    assert comm.traffic.bytes_sent.sum() == 0
    comm.all_reduce(comm.alloc(8))
    assert comm.traffic.bytes_sent.tolist() == [2 * 7 * 8 * 4 // 8] * 8


def test_one_rank_and_two_ranks_work():
    assert stacked("ring", 1).neighbor_average(torch.ones(1, 3)).tolist() == [[1, 1, 1]]
    two = stacked("ring", 2).neighbor_average(torch.tensor([[0.0], [4.0]]))
    assert two.tolist() == [[2.0], [2.0]]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 12),
    processes=st.integers(1, 12),
    graph=st.sampled_from(["ring", "exponential", "star", "one_peer_exponential", "complete"]),
    t=st.integers(0, 3),
)
def test_what_one_process_sends_is_what_another_expects(n, processes, graph, t):
    if processes > n:
        return
    round_, placement = build(graph, n).round(t), Placement(n, processes)
    plans = [plan_exchange(round_, placement, p) for p in range(processes)]
    for p, plan in enumerate(plans):
        for peer, rows in plan.sends:
            wanted = dict(plans[peer].receives)
            assert wanted[p] == len(rows)
    matrix = np.zeros((n, n))
    for p, plan in enumerate(plans):
        first = placement.ranks(p).start
        remote = sorted({int(s) for s in plan.sources if int(s) not in placement.ranks(p)})
        table = [*placement.ranks(p), *remote]
        for row in range(len(placement.ranks(p))):
            for k in range(plan.terms.indptr[row], plan.terms.indptr[row + 1]):
                matrix[first + row, table[plan.terms.columns[k]]] += plan.terms.weights[k]
    np.testing.assert_array_equal(matrix, round_.matrix())
