"""Messages of a length of their own between all ranks, and the way back of gathered ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from messages_worker import GRAPHS, every_pair, there_and_back
from thread_ranks import on_processes

from gossamer.runtime import Communicator, StackedTransport
from gossamer.topologies import build


def stacked(graph, n):
    return Communicator(build(graph, n), StackedTransport())


def integers(shape, seed):
    """Whole numbers, so that sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, shape, generator=generator).double()


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_every_rank_gets_the_message_meant_for_it_and_pays_for_its_own(processes):
    on_processes(processes, every_pair)


def test_one_rank_talks_to_itself_for_nothing():
    comm = stacked("ring", 1)
    ((received,),) = comm.all_to_all_ragged([[torch.arange(5)]])
    assert torch.equal(received, torch.arange(5))
    assert comm.traffic.bytes_sent.tolist() == comm.traffic.messages_sent.tolist() == [0]


def test_a_received_message_is_the_receivers_to_write_to():
    comm = stacked("ring", 2)
    sent = [[torch.ones(2) for _ in range(2)] for _ in range(2)]
    for row in comm.all_to_all_ragged(sent, count=False):
        for message in row:
            message.zero_()
    assert all(message.tolist() == [1, 1] for row in sent for message in row)
    assert not comm.traffic.bytes_sent.any()


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([[ONE, ONE]], r"a message to each of 2 ranks from each of 2 hosted ones, got \[2\]"),
        ([[ONE, ONE], [ONE]], r"got \[2, 1\]"),
        ([[ONE, ONE], [ONE, ONE.double()]], "of one dtype, got .*float32.*float64"),
        ([[ONE, ONE], [ONE, torch.ones(1, 1)]], r"must be \(m,\), contiguous"),
        ([[ONE, ONE], [ONE, torch.ones(4)[::2]]], "contiguous"),
        ([[ONE, ONE], [ONE, ONE.to("meta")]], "on cpu"),
    ],
)
def test_messages_that_do_not_fit_are_refused_before_any_is_sent(messages, complaint):
    comm = stacked("ring", 2)
    with pytest.raises(ValueError, match=f"all_to_all_ragged: .*{complaint}"):
        comm.all_to_all_ragged(messages)
    assert not comm.traffic.bytes_sent.any()


@settings(max_examples=60, deadline=None)
@given(
    graph=st.sampled_from([*GRAPHS, "exponential"]),
    n=st.integers(1, 9),
    m=st.integers(1, 5),
    t=st.integers(0, 3),
)
def test_the_way_back_is_the_adjoint_of_the_way_there(graph, n, m, t):
    comm = stacked(graph, n)
    comm.round = t
    x = integers((n, m), 1)
    values = comm.neighbor_gather(x).values
    y = integers(values.shape, 2)
    assert (values * y).sum() == (x * comm.neighbor_gather_adjoint(y)).sum()
    out_degree = [len(comm.topology.round(t).send(rank)[0]) for rank in range(n)]
    expected = torch.tensor(out_degree, dtype=torch.float64)[:, None].expand(n, m)
    assert torch.equal(comm.neighbor_gather_adjoint(torch.ones_like(values)), expected)


def test_what_comes_back_is_added_in_ascending_rank():
    comm = stacked("star", 4)
    values = torch.zeros(6, 1)  # into rank 0 from 1, 2, 3, then into each of these from 0
    values[3:, 0] = torch.tensor([1e8, 1.0, -1e8])
    assert comm.neighbor_gather(torch.arange(4.0)[:, None]).source.tolist() == [1, 2, 3, 0, 0, 0]
    assert comm.neighbor_gather_adjoint(values).flatten().tolist() == [0, 0, 0, 0]
    values[3:, 0] = torch.tensor([1e8, -1e8, 1.0])
    assert comm.neighbor_gather_adjoint(values).flatten().tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("processes", [2, 4, 6])
def test_the_way_back_has_the_same_bits_however_ranks_share_processes(processes, graph, dtype):
    on_processes(processes, lambda transport: there_and_back(transport, graph, dtype))


def test_a_directed_message_returns_against_its_edge_and_is_paid_for_there():
    comm = stacked("directed_ring", 3)
    gathered = comm.neighbor_gather(torch.zeros(3, 2))
    before = comm.traffic.bytes_sent.copy()
    returned = comm.neighbor_gather_adjoint(gathered.target[:, None].float().expand(3, 2))
    heard_by = torch.empty(3).scatter_(0, gathered.source, gathered.target.float())
    assert torch.equal(returned, heard_by[:, None].expand(3, 2))
    assert (comm.traffic.bytes_sent - before).tolist() == [8, 8, 8]


@pytest.mark.parametrize(
    "values",
    [torch.ones(5, 2), torch.ones(6), torch.ones(6, 2).long(), torch.ones(6, 2).to("meta")],
)
def test_messages_that_were_not_heard_are_not_returned(values):
    comm = stacked("ring", 3)
    with pytest.raises(ValueError, match=r"values must be \(6, m\) floating on cpu"):
        comm.neighbor_gather_adjoint(values)
    assert not comm.traffic.bytes_sent.any()
