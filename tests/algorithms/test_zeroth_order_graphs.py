"""Zeroth order over graphs: numbers alone travel, and every rank can make the rest again."""

from collections import deque

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from zeroth_order_for_tests import Faults, problem, program, run

from gossamer.algorithms.decentralized.all_reduce import AllReduce
from gossamer.algorithms.decentralized.dsgd import DSGD
from gossamer.algorithms.optimizers.adam import Adam
from gossamer.algorithms.optimizers.sgd import SGD
from gossamer.algorithms.oracles.backprop import Backprop
from gossamer.algorithms.program import TrainingProgram
from gossamer.algorithms.protocols import Algorithm
from gossamer.algorithms.zeroth_order.coefficient_gossip import CoefficientGossip
from gossamer.algorithms.zeroth_order.conservative import Conservative
from gossamer.algorithms.zeroth_order.dissemination import dissemination
from gossamer.algorithms.zeroth_order.flood import Flood, FloodState
from gossamer.algorithms.zeroth_order.probes import Along, Probes
from gossamer.runtime import Communicator, ConfigError, RanksDiffer, StackedTransport
from gossamer.runtime.component import validate
from gossamer.topologies import Topology, build
from gossamer.topologies.round import Round

GRAPHS = {
    "ring": 8,
    "star": 5,
    "torus": 9,
    "erdos_renyi": 8,
    "directed_ring": 4,
    "one_peer_exponential": 8,
    "complete": 4,
}
ADAM, PLAIN = Adam(lr=0.01), SGD(lr=0.05)


class Delayed(Algorithm):
    """All-reduce whose means are applied so many steps late: what flood must equal."""

    delay: int

    def init(self, comm, oracle, x, batches):
        self._queue = deque()
        return FloodState(x, self.optimizer.init(x), torch.zeros(len(x), 1))

    def step(self, comm, oracle, state, batches):
        self._queue.append(oracle.deferred(state.x, batches[0]).mean(comm))
        if len(self._queue) > self.delay:
            mean = self._queue.popleft()
            if mean is not None:
                self.optimizer.apply_(state.optimizer, state.x, mean, comm)
        return {}

    _queue: deque


def undirected(n, rounds):
    """A schedule of edges, in turn; each rank keeps half of what it has where it has a neighbor."""

    def matrix(edges):
        w = np.eye(n)
        for i, j in edges:
            w[i, i] = w[j, j] = w[i, j] = w[j, i] = 0.5
        return Round.from_matrix(w)

    made = [matrix(edges) for edges in rounds]
    return Topology("by hand", n, lambda t: made[t], kind="SDS", period=len(made))


# --- flood ------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", GRAPHS)
def test_rows_are_equal_to_the_bit_at_every_step_on_every_graph(graph):
    made = program(Flood(optimizer=ADAM), graph, GRAPHS[graph], queries=2)
    delay = made.algorithm.mean_delay(made.comm.topology)
    begin = made.state.x.clone()
    for step in range(delay + 4):
        run(made)
        assert torch.equal(made.state.x, made.state.x[:1].expand_as(made.state.x))
        assert torch.equal(made.state.x, begin) == (step < delay), step


@pytest.mark.parametrize(
    ("graph", "n", "delay"), [("ring", 8, 3), ("star", 5, 1), ("complete", 4, 0), ("ring", 1, 0)]
)
def test_flood_is_all_reduce_with_gradients_of_the_diameter_less_one_ago(graph, n, delay):
    faults = Faults(), Faults()
    flood = program(Flood(optimizer=ADAM), graph, n, faults=faults[0])
    reference = program(Delayed(optimizer=ADAM, delay=delay), graph, n, faults=faults[1])
    for step in range(8):
        for fault in faults:
            fault.ranks = (n - 1,) if step == 2 else ()  # one rank's NaN: all skip its set
        run(flood)
        run(reference)
        assert torch.equal(flood.state.x, reference.state.x)
    assert flood.state.optimizer.t == 8 - delay - 1
    assert torch.equal(flood.state.optimizer.v, reference.state.optimizer.v)


@pytest.mark.parametrize(
    ("graph", "n", "records"),
    [
        ("ring", 8, 8 * 8),  # the last rank hears from both sides
        ("ring", 7, 7 * 6),
        ("star", 6, 6 * 5),  # on a tree each record crosses each edge once
        ("directed_ring", 5, 5 * 4),
        ("complete", 4, 4 * 3),
    ],
)
def test_a_record_is_sent_to_each_neighbor_once_in_16_bytes(graph, n, records):
    made = run(program(Flood(optimizer=PLAIN), graph, n, queries=2), steps=5)
    before = made.comm.traffic.bytes_sent.sum()
    run(made, steps=3)
    assert made.comm.traffic.bytes_sent.sum() - before == 3 * 16 * 2 * records


@given(st.integers(2, 7), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_after_the_diameter_all_know_all_and_nothing_was_said_twice(n, random):
    graph = nx.Graph([(random.randrange(i), i) for i in range(1, n)])
    graph.add_edges_from(random.sample(list(nx.complete_graph(n).edges), random.randrange(n)))
    w = nx.to_numpy_array(graph, nodelist=range(n)) / n
    found = dissemination(Topology.static("random", Round.from_matrix(w + np.eye(n))))
    assert found.exchanges == nx.diameter(graph)
    knows, said = np.eye(n, dtype=bool), set()
    for exchange in range(found.exchanges):
        sent = [(e, k) for e, owners in found.senders(0, exchange).items() for k in owners]
        for (source, target), owner in sent:
            assert knows[source, owner]
            assert not said & {(source, target, owner), (target, source, owner)}
        said |= {(*edge, owner) for edge, owner in sent}
        for (_, target), owner in sent:
            knows[target, owner] = True
    assert knows.all()


def test_on_a_schedule_the_lag_is_the_longest_from_any_round():
    path = undirected(3, [[(0, 1)], [(1, 2)]])
    # From round 0 rank 0's item goes to 1, then to 2, whose own comes back with round 2. From
    # round 1 rank 2's goes to 1, then to 0, whose own reaches 2 in round 3.
    assert dissemination(path).exchanges == 3
    made = program(Flood(optimizer=PLAIN), path, 3)
    for _ in range(6):
        run(made)
        assert torch.equal(made.state.x, made.state.x[:1].expand_as(made.state.x))


def test_a_schedule_that_leaves_ranks_apart_or_never_repeats_is_refused():
    with pytest.raises(ConfigError, match=r"not connected over its period of 2.*add edges"):
        Flood(optimizer=PLAIN).adapt(undirected(4, [[(0, 1)], [(2, 3)]]))
    with pytest.raises(ConfigError, match=r"never repeats.*use a static graph"):
        Flood(optimizer=PLAIN).adapt(build("random_matching", 8))


def test_acting_on_neighbors_numbers_without_relay_drives_ranks_apart():
    class OneHop(Flood):
        def step(self, comm, oracle, state, batches):
            probes = oracle.deferred(state.x, batches[0]).grad
            w = torch.from_numpy(comm.topology.round(0).sparse().toarray())
            heard = Probes(
                comm,
                probes.layout,
                probes.seed,
                [[Along(comm.step, k) for k in range(comm.n)]] * comm.n,
                w * probes.coefficients.T,
            )
            self.optimizer.apply_(None, state.x, heard, comm)
            return {}

    made = program(OneHop(optimizer=PLAIN), "ring", 8)
    apart = []
    for _ in range(3):
        run(made, steps=20)
        apart.append((made.state.x - made.state.x.mean(dim=0)).norm().item())
    assert 0 < 1.2 * apart[0] < apart[1]
    assert 1.2 * apart[1] < apart[2]


# --- all-reduce -------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [PLAIN, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("n", [3, 4])
def test_own_directions_on_equal_data_are_those_of_one_rank_with_n_queries(n, optimizer):
    def trained(ranks, queries):
        options = {"queries": queries, "sampling": "full", "same_data": True}
        return run(program(AllReduce(optimizer=optimizer), "ring", ranks, **options), steps=5)

    ranks, alone = trained(n, 1), trained(1, n)
    assert torch.equal(ranks.state.x, alone.state.x.expand_as(ranks.state.x))
    assert not torch.equal(alone.state.x[0], program(alone.algorithm, "ring", 1).state.x[0])


@pytest.mark.parametrize("directions", ["own", "shared"])
def test_all_reduce_sends_8_bytes_for_each_query_to_each_rank(directions):
    options = {"queries": 3, "directions": directions}
    made = run(program(AllReduce(optimizer=PLAIN), "ring", 5, **options), steps=2)
    assert made.comm.traffic.bytes_sent.tolist() == [2 * 3 * 8 * 4] * 5


# --- coefficient gossip -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("graph", "n", "steps"),
    [
        ("ring", 8, 6),
        ("torus", 9, 6),
        ("erdos_renyi", 8, 6),
        ("exponential", 5, 6),
        ("one_peer_hypercube", 8, 9),  # exact after 3 rounds: older numbers are set to their mean
    ],
)
def test_averaged_numbers_make_the_models_of_decentralized_sgd(graph, n, steps):
    options = {"dtype": torch.float64, "queries": 2}
    numbers = run(program(CoefficientGossip(optimizer=PLAIN), graph, n, **options), steps)
    dense = run(program(DSGD(optimizer=PLAIN), graph, n, **options), steps)
    assert (dense.state.x - dense.state.x[0]).abs().max() > 1e-3
    # Rounding of sums of a few hundred terms below 1, in float64.
    torch.testing.assert_close(numbers.state.x, dense.state.x, rtol=0, atol=2e-12)


def test_a_number_older_than_the_window_is_the_mean_on_all_ranks():
    faults = Faults()
    options = {"dtype": torch.float64, "queries": 2, "faults": faults}
    algorithm = CoefficientGossip(optimizer=PLAIN, tolerance=0.3)
    made = run(program(algorithm, "ring", 6, **options))
    expected = run(program(AllReduce(optimizer=PLAIN), "ring", 6, **options)).state.x
    faults.ranks = tuple(range(6))  # no rank makes a step of its own any more
    window = made.state.coefficients.shape[1] // 12
    run(made, window - 1)
    assert (made.state.x - expected).abs().max() > 1e-4
    run(made)
    torch.testing.assert_close(made.state.x, expected, rtol=0, atol=1e-14)


def test_the_window_is_the_least_that_the_tolerance_allows():
    # The specification's example: a ring of 8 with weights 1/3.
    made = program(CoefficientGossip(optimizer=PLAIN), "ring", 8)
    assert made.state.coefficients.shape[1] == 67 * 8
    run(made)
    assert made.comm.traffic.bytes_sent.tolist() == [2 * 67 * 8 * 4] * 8  # float32
    with pytest.raises(ConfigError, match=r"algorithm.window: after 66 rounds.*at least 67"):
        CoefficientGossip(optimizer=PLAIN, window=66).adapt(build("ring", 8))


def test_only_plain_sgd_and_a_schedule_that_repeats_will_do():
    for optimizer in (ADAM, SGD(lr=0.1, weight_decay=0.1)):
        with pytest.raises(ConfigError, match=r"use optimizer: \{name: sgd\}"):
            validate(CoefficientGossip, {"optimizer": optimizer}, "algorithm")
    with pytest.raises(ConfigError, match="never repeats"):
        CoefficientGossip(optimizer=PLAIN).adapt(build("random_matching", 8))


# --- both -------------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize("algorithm", [Flood, CoefficientGossip])


@BOTH
def test_a_snapshot_in_the_middle_goes_on_as_the_undisturbed_run(algorithm):
    whole = run(program(algorithm(optimizer=PLAIN), "ring", 6), steps=4)
    tensors, scalars = whole.snapshot()
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    run(whole, steps=4)
    resumed = program(algorithm(optimizer=PLAIN), "ring", 6)
    resumed.comm.step = resumed.comm.round = 4
    resumed.restore(kept, scalars)
    run(resumed, steps=4)
    assert torch.equal(resumed.state.x, whole.state.x)


@BOTH
def test_an_oracle_without_directions_of_its_own_is_refused(algorithm):
    made = algorithm(optimizer=PLAIN)
    with pytest.raises(ConfigError, match=r"oracle.directions: .* got shared; use own"):
        program(made, "ring", 4, directions="shared")
    comm = Communicator(build("ring", 4), StackedTransport())
    with pytest.raises(ConfigError, match=r"backprop does not give.*directions: own"):
        TrainingProgram(comm, problem(4), Backprop(), made)


@pytest.mark.parametrize("kind", [AllReduce, Flood, Conservative])
def test_ranks_that_came_apart_are_noticed_at_the_next_evaluation(kind):
    made = run(program(kind(optimizer=PLAIN), "ring", 4), steps=2)
    made.evaluate()
    made.state.x[2, 0] += 1e-6
    with pytest.raises(RanksDiffer, match=r"step 2\): .* ranks \[2\] hold others than rank 0"):
        made.evaluate()
