"""The communicator under mpirun, over MPI, shared memory and both, against the stacked one.

And over device memory, which is threads' here.
"""

import pytest
import torch
from device_worker import InStep
from messages_worker import every_pair, there_and_back

from gossamer.runtime import Communicator, StackedTransport, open_transport
from gossamer.runtime.collectives import RankGroup
from gossamer.runtime.transports.native import NativeTransport, meet_on_host
from gossamer.runtime.transports.select import world_size
from gossamer.topologies import build

pytestmark = pytest.mark.mpi

N = 6
GRAPHS = ["ring", "exponential", "one_peer_exponential", "star", "complete", "directed_ring"]


def halves(group):
    """As if each half of the processes were a host."""
    processes = list(range(group.transport.processes))
    return [processes[: len(processes) // 2], processes[len(processes) // 2 :]]


@pytest.fixture(scope="module", params=["mpi", "native", "hybrid", "device"])
def transport(request):
    """One transport for all tests."""
    if request.param == "device":
        meeting = open_transport("mpi", timeout_s=60)
        group = RankGroup(meeting.processes, meeting, timeout_s=60)
        memory = InStep(meet_on_host(group, range(meeting.processes)))
        meeting.close()
        opened = NativeTransport(memory, meeting.abort)
        yield opened
        opened.close()
        return
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "hybrid":
            if world_size() < 3:
                pytest.skip("two processes on two hosts share no memory")
            patch.setattr("gossamer.runtime.transports.native.hosts_of", halves)
        opened = open_transport(request.param, timeout_s=60)
    assert opened.name == request.param
    yield opened
    opened.close()


def pair(graph, transport):
    """The communicator under test and the stacked reference, with the same rows."""
    topology = build(graph, N)
    comm, stacked = Communicator(topology, transport), Communicator(topology, StackedTransport())
    full = stacked.random("x").normal_(stacked.alloc(37))
    return comm, stacked, full[comm.ranks.start : comm.ranks.stop].clone(), full


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("rounds", [1, 3])
def test_averages_match_the_stacked_bits(graph, rounds, transport):
    comm, stacked, x, full = pair(graph, transport)
    for _ in range(3):
        x = comm.neighbor_average(x, rounds=rounds, axpy=(0.5, x))
        full = stacked.neighbor_average(full, rounds=rounds, axpy=(0.5, full))
        comm.round += 1
        stacked.round += 1
    assert torch.equal(x, full[comm.ranks.start : comm.ranks.stop])


@pytest.mark.parametrize("graph", GRAPHS)
def test_an_asynchronous_average_in_place_matches(graph, transport):
    comm, stacked, x, full = pair(graph, transport)
    work = comm.neighbor_average_async(x, out=x)
    assert work.wait() is x
    assert torch.equal(x, stacked.neighbor_average(full)[comm.ranks.start : comm.ranks.stop])


@pytest.mark.parametrize("elements", [1, 37, 10_000])
@pytest.mark.parametrize("op", ["sum", "mean", "min", "max"])
def test_all_reduce_matches_the_stacked_bits(elements, op, transport):
    comm, stacked, _, _ = pair("ring", transport)
    full = stacked.random("y").normal_(torch.empty(N, elements))
    mine = full[comm.ranks.start : comm.ranks.stop]
    assert torch.equal(comm.all_reduce(mine, op), stacked.all_reduce(full, op))


def test_the_other_collectives_match(transport):
    comm, stacked, _, _ = pair("ring", transport)
    full = stacked.random("z").normal_(torch.empty(N, N * 5))
    here = slice(comm.ranks.start, comm.ranks.stop)
    mine = full[here].contiguous()
    assert torch.equal(comm.all_gather(mine), full)
    assert torch.equal(comm.broadcast(mine, root=4), full[4:5])
    rows, row = torch.empty_like(full), torch.empty_like(full[:1])
    assert comm.all_gather(mine, out=rows) is rows
    assert comm.broadcast(mine, root=4, out=row) is row
    assert torch.equal(rows, full)
    assert torch.equal(row, full[4:5])
    assert torch.equal(comm.reduce_scatter(mine), stacked.reduce_scatter(full)[here])
    parts = comm.all_to_all(mine.view(-1, N, 5))
    assert torch.equal(parts, full.view(N, N, 5).transpose(0, 1)[here])
    comm.barrier()


@pytest.mark.parametrize("graph", GRAPHS)
def test_messages_of_different_lengths_arrive_whole(graph, transport):
    comm, stacked, _, _ = pair(graph, transport)
    full = [torch.arange(rank * rank * 1000.0) + rank for rank in range(N)]  # rank 0's is empty
    expected = stacked.neighbor_gather_ragged(full)
    for _ in range(3):
        messages = comm.neighbor_gather_ragged([full[rank] for rank in comm.ranks])
        assert len(messages.values) == len(messages.source)
        for value, source in zip(messages.values, messages.source.tolist(), strict=True):
            assert torch.equal(value, full[source])
    mine = (expected.target >= comm.ranks.start) & (expected.target < comm.ranks.stop)
    assert torch.equal(messages.source, expected.source[mine])
    here = slice(comm.ranks.start, comm.ranks.stop)
    assert comm.traffic.bytes_sent.tolist() == (3 * stacked.traffic.bytes_sent[here]).tolist()


def test_every_rank_gets_the_message_meant_for_it(transport):
    every_pair(transport)


@pytest.mark.parametrize("graph", GRAPHS)
def test_gathered_messages_find_their_way_back(graph, transport):
    there_and_back(transport, graph)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("elements", [1, 53, 40_000, 300_001])
def test_rows_of_every_size_and_dtype_match_the_stacked_bits(elements, dtype, transport):
    comm, stacked, _, _ = pair("exponential", transport)
    full = stacked.random("w").normal_(torch.empty(N, elements)).to(dtype)
    here = slice(comm.ranks.start, comm.ranks.stop)
    x, out = comm.alloc(elements, dtype), comm.alloc(elements, dtype)
    x.copy_(full[here])
    expected = stacked.neighbor_average(full, rounds=2, axpy=(0.25, full))
    for source in (x, x.clone()):  # in the transport's memory, and not
        kept = source.clone()
        for target in (out, None):
            got = comm.neighbor_average(source, out=target, rounds=2, axpy=(0.25, source))
            assert torch.equal(got, expected[here])
            assert torch.equal(source, kept)
        total = comm.all_reduce(source, "mean", out=out[:1])
        assert torch.equal(total, stacked.all_reduce(full, "mean"))
    comm.neighbor_average(x, out=x)
    assert torch.equal(x, stacked.neighbor_average(full)[here])


def test_gathered_messages_carry_source_target_and_weight(transport):
    comm, stacked, x, full = pair("star", transport)
    messages, expected = comm.neighbor_gather(x), stacked.neighbor_gather(full)
    mine = (expected.target >= comm.ranks.start) & (expected.target < comm.ranks.stop)
    assert torch.equal(messages.values, expected.values[mine])
    assert torch.equal(messages.source, expected.source[mine])
    assert torch.equal(messages.target, expected.target[mine] - comm.ranks.start)
    assert torch.equal(messages.weight, expected.weight[mine])


def test_bytes_are_those_of_the_edges_whoever_shares_a_process(transport):
    comm, stacked, x, full = pair("star", transport)
    comm.neighbor_average(x)
    stacked.neighbor_average(full)
    here = slice(comm.ranks.start, comm.ranks.stop)
    assert comm.traffic.bytes_sent.tolist() == stacked.traffic.bytes_sent[here].tolist()
    assert stacked.traffic.bytes_sent.tolist() == [37 * 4 * (N - 1)] + [37 * 4] * (N - 1)


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_hierarchical_average_is_that_of_the_flat_graph_to_rounding(rounds, transport):
    topology = build("ring", 8, hierarchical={"local": 4})
    comm, stacked = Communicator(topology, transport), Communicator(topology, StackedTransport())
    full = stacked.random("x").normal_(stacked.alloc(100_000))
    x = comm.alloc(100_000).copy_(full[comm.ranks.start : comm.ranks.stop])
    comm.neighbor_average(x, out=x, rounds=rounds, axpy=(0.5, x.clone()))
    expected = stacked.neighbor_average(full, rounds=rounds, axpy=(0.5, full))
    # Sharded, an element is a sum of other partial sums; the other transports keep the bits.
    tolerance = 1e-6 if transport.name == "hybrid" else 0
    mine = expected[comm.ranks.start : comm.ranks.stop]
    torch.testing.assert_close(x, mine, rtol=0, atol=tolerance)
