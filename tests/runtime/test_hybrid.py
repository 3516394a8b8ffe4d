"""Several hosts: what each process gets, and what crosses between hosts."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_ranks import on_hosts

from gossamer.runtime import Communicator, StackedTransport
from gossamer.runtime.collectives import RankGroup
from gossamer.runtime.hierarchical import ShardedPlan
from gossamer.runtime.relay import relay_steps
from gossamer.topologies import build

TWO_BY_TWO = [[0, 1], [2, 3]]
UNEVEN = [[0, 1, 2], [3], [4, 5]]
INTERLEAVED = [[0, 2], [1, 3]]


def hierarchical(name="ring", n=8, local=4, **params):
    return build(name, n, hierarchical={"local": local}, **params)


def rows_of(n, d, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)


def averages(topology, hosts, x, *, y=None, rounds=1, in_place=False, t=0):
    """Return (all rows of a*y + W^rounds x, kind of plan per process, wire)."""

    def work(transport):
        comm = Communicator(topology, transport, timeout_s=20)
        comm.round = t
        mine = comm.alloc(x.shape[1], x.dtype).copy_(x[comm.ranks.start : comm.ranks.stop])
        axpy = None if y is None else (-0.5, y[comm.ranks.start : comm.ranks.stop])
        out = comm.neighbor_average(mine, out=mine if in_place else None, axpy=axpy, rounds=rounds)
        return out.clone(), isinstance(comm._plan_now(), ShardedPlan)

    results, wire = on_hosts(hosts, work)
    return torch.cat([out for out, _ in results]), {sharded for _, sharded in results}, wire


# --- sharded averages -----------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("d", [1, 63, 1000, 40_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sharded_average_is_the_product_with_the_mixing_matrix(dtype, d, rounds, in_place):
    topology, x, y = hierarchical(), rows_of(8, d, dtype), rows_of(8, d, dtype).flip(0)
    found, sharded, _ = averages(topology, TWO_BY_TWO, x, y=y, rounds=rounds, in_place=in_place)
    assert sharded == {True}
    matrix = torch.from_numpy(np.linalg.matrix_power(topology.round(0).matrix(), rounds))
    expected = matrix @ x.double() - 0.5 * y.double()
    # a handful of roundings of sums of 8 terms of size about 1
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("t", [0, 1, 2])
@pytest.mark.parametrize("name", ["one_peer_exponential", "directed_ring", "star"])
def test_schedules_and_directed_graphs_among_three_machines(name, t):
    topology, x = hierarchical(name, 12, 4), rows_of(12, 300)
    found, sharded, _ = averages(topology, [[0, 1], [2, 3], [4, 5]], x, t=t)
    assert sharded == {True}
    expected = torch.from_numpy(topology.round(t).matrix()) @ x.double()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def test_the_bits_do_not_depend_on_how_a_machine_splits_its_ranks():
    topology, x = hierarchical(), rows_of(8, 5000)
    by_two, _, _ = averages(topology, TWO_BY_TWO, x)
    by_four, _, _ = averages(topology, [[0, 1, 2, 3], [4, 5, 6, 7]], x)
    assert torch.equal(by_two, by_four)
    assert torch.equal(by_two[:4], by_two[:1].expand(4, -1))  # exact agreement inside a machine


def test_between_hosts_each_process_sends_its_slice_and_only_to_its_counterpart():
    d = 64 * 100
    topology, x = hierarchical(), rows_of(8, d)
    _, _, once = averages(topology, TWO_BY_TWO, x)
    _, _, twice = averages(topology, TWO_BY_TWO, x, rounds=2)
    sent = {pair: twice.bytes[pair] - once.bytes[pair] for pair in twice.bytes}
    counterparts = [(0, 2), (2, 0), (1, 3), (3, 1)]
    assert {p: c for p, c in sent.items() if c} == dict.fromkeys(counterparts, d // 2 * 4)


@pytest.mark.parametrize(
    ("hosts", "n", "local"),
    [(UNEVEN, 6, 3), (INTERLEAVED, 8, 4), (TWO_BY_TWO, 8, 2), ([[0, 1], [2], [3]], 8, 4)],
    ids=["uneven", "interleaved", "two machines a host", "two hosts a machine"],
)
def test_where_machines_are_not_hosts_the_average_is_flat_with_the_stacked_bits(hosts, n, local):
    topology, x = hierarchical(n=n, local=local), rows_of(n, 777)
    found, sharded, _ = averages(topology, hosts, x)
    assert sharded == {False}
    assert torch.equal(found, Communicator(topology, StackedTransport()).neighbor_average(x))


def test_bytes_count_as_those_of_the_edges_and_messages_stay_apart():
    topology, x = hierarchical(), rows_of(8, 100)
    stacked = Communicator(topology, StackedTransport())
    stacked.neighbor_average(x)
    expected = stacked.neighbor_gather(x)

    def work(transport):
        comm = Communicator(topology, transport, timeout_s=20)
        mine = x[comm.ranks.start : comm.ranks.stop]
        comm.neighbor_average(mine)
        values = comm.neighbor_gather(mine).values
        return comm.traffic.bytes_sent.tolist(), values

    results, _ = on_hosts(TWO_BY_TWO, work)
    assert [count for counts, _ in results for count in counts] == (
        stacked.traffic.bytes_sent.tolist()
    )
    assert torch.equal(torch.cat([values for _, values in results]), expected.values)


def test_integers_are_refused_by_every_process_before_anything_is_sent():
    topology = hierarchical()

    def work(transport):
        comm = Communicator(topology, transport, timeout_s=20)
        with pytest.raises(ValueError, match="dtype"):
            comm.neighbor_average(torch.zeros(comm.local, 5, dtype=torch.int64))

    on_hosts(TWO_BY_TWO, work)


# --- everything else ------------------------------------------------------------------------------


@pytest.mark.parametrize("hosts", [TWO_BY_TWO, INTERLEAVED, UNEVEN], ids=str)
@pytest.mark.parametrize("d", [1, 37, 60_000])
def test_flat_averages_and_collectives_have_the_stacked_bits(hosts, d):
    n = 7
    x = rows_of(n, d)
    stacked = Communicator(build("exponential", n), StackedTransport())
    expected = {
        "average": stacked.neighbor_average(x, rounds=2, axpy=(0.5, x)),
        "sum": stacked.all_reduce(x),
        "mean": stacked.all_reduce(x, "mean"),
        "max": stacked.all_reduce(x, "max"),
    }

    def work(transport):
        comm = Communicator(build("exponential", n), transport, timeout_s=20)
        here = slice(comm.ranks.start, comm.ranks.stop)
        mine = comm.alloc(d).copy_(x[here])
        work = comm.neighbor_average_async(mine, rounds=2, axpy=(0.5, mine))
        assert torch.equal(work.wait(), expected["average"][here])
        for op in ("sum", "mean", "max"):
            assert torch.equal(comm.all_reduce(mine, op), expected[op])
        assert torch.equal(comm.all_gather(mine), x)
        for root in (0, n - 1):
            assert torch.equal(comm.broadcast(mine, root), x[root : root + 1])
        cube = torch.arange(n * n * 3).view(n, n, 3)
        assert torch.equal(comm.all_to_all(cube[here]), cube.transpose(0, 1)[here])
        comm.barrier()

    on_hosts(hosts, work)


def test_gathers_and_broadcasts_cross_to_a_host_once():
    n, d = 6, 1000
    x = rows_of(n, d)

    def gather(transport):
        RankGroup(n, transport, timeout_s=20).all_gather(x[transport.process][None])

    def broadcast(transport):
        RankGroup(n, transport, timeout_s=20).broadcast(x[transport.process][None], 1)

    for work, copies in ((gather, 2 * n), (broadcast, 2)):
        _, wire = on_hosts(UNEVEN, work)
        assert sum(wire.bytes.values()) == copies * d * 4


@settings(max_examples=100, deadline=None)
@given(places=st.lists(st.integers(0, 3), min_size=1, max_size=9))
def test_relays_bring_every_block_everywhere_and_to_a_host_once(places):
    hosts = [[p for p, place in enumerate(places) if place == h] for h in sorted(set(places))]
    hosts.sort()
    host_of = {p: k for k, host in enumerate(hosts) for p in host}
    steps = [relay_steps(hosts, p) for p in range(len(places))]
    has = [{p} for p in range(len(places))]
    crossings = {}
    for k in range(2):
        now = [s[k] if k < len(s) else ([], []) for s in steps]
        sent = [(p, peer, block) for p, (sends, _) in enumerate(now) for peer, block in sends]
        taken = [
            (peer, p, block) for p, (_, receives) in enumerate(now) for peer, block in receives
        ]
        assert all(block in has[p] for p, _, block in sent)
        for pair in {(a, b) for a, b, _ in sent + taken}:  # matched by order within a pair
            assert [s[2] for s in sent if s[:2] == pair] == [r[2] for r in taken if r[:2] == pair]
        for p, peer, block in sent:
            has[peer].add(block)
            if host_of[p] != host_of[peer]:
                crossings[block, host_of[peer]] = crossings.get((block, host_of[peer]), 0) + 1
    assert all(blocks == set(range(len(places))) for blocks in has)
    assert set(crossings.values()) <= {1}
