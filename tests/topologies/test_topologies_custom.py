"""A user's own graph, in every form it may come, and what is said when it is wrong."""

import logging
import sys

import networkx as nx
import numpy as np
import pytest
from scipy import sparse

from gossamer.topologies import (
    TopologyConnectivityError,
    TopologyParameterError,
    TopologyPeriodicError,
    TopologySizeError,
    TopologyStochasticError,
    TopologyWeightError,
    build,
    spectrum,
)
from gossamer.topologies.custom import num_nodes

SQUARE = [[0, 1], [1, 2], [2, 3], [3, 0]]


def matrix_of(edges, n=4, **options):
    return build("custom", n, edges=edges, **options).round(0).matrix()


RING = build("ring", 4).round(0).matrix()


def test_an_edge_list_is_directed_unless_said_otherwise():
    np.testing.assert_allclose(matrix_of(SQUARE), build("directed_ring", 4).round(0).matrix())
    np.testing.assert_allclose(matrix_of(SQUARE, directed=False), RING)


def test_a_weighted_edge_list_is_taken_as_it_is():
    edges = [[j, i, 1 / 3] for i, j in zip(*np.nonzero(RING), strict=True)]
    np.testing.assert_array_equal(matrix_of([[int(a), int(b), w] for a, b, w in edges]), RING)


def test_repeated_edges_add_their_weights():
    edges = [[0, 1, 0.25], [0, 1, 0.25], [1, 0, 0.5], [0, 0, 0.5], [1, 1, 0.5]]
    assert matrix_of(edges, 2).tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_matrices_dense_and_sparse_are_taken_as_they_are():
    np.testing.assert_array_equal(matrix_of(RING), RING)
    np.testing.assert_array_equal(matrix_of(sparse.csr_array(RING)), RING)


def test_networkx_weights_are_those_of_the_receiver():
    graph = build("directed_ring", 5).graph()
    np.testing.assert_array_equal(matrix_of(graph, 5), build("directed_ring", 5).round(0).matrix())
    assert graph.edges[1, 2]["weight"] == graph.edges[2, 2]["weight"] == 0.5


def test_a_topology_survives_the_way_through_networkx():
    for name in ("exponential", "star", "de_bruijn", "erdos_renyi"):
        topology = build(name, 9)
        again = build("custom", 9, edges=topology.graph())
        assert again.round(0).digest() == topology.round(0).digest()
        assert again.kind == topology.kind


def write_gml(graph, path):
    nx.write_gml(graph, path)


WRITERS = {
    ".gml": write_gml,
    ".graphml": nx.write_graphml,
    ".edgelist": nx.write_edgelist,
    ".adjlist": nx.write_adjlist,
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_files_of_undirected_graphs_give_both_directions(suffix, tmp_path):
    path = tmp_path / f"graph{suffix}"
    WRITERS[suffix](nx.cycle_graph(4), path)
    np.testing.assert_allclose(matrix_of(str(path)), RING)
    np.testing.assert_allclose(matrix_of(path), RING)
    assert num_nodes(str(path)) == 4


@pytest.mark.parametrize("suffix", [".gml", ".graphml"])
def test_files_of_weighted_directed_graphs_are_taken_as_they_are(suffix, tmp_path):
    path = tmp_path / f"graph{suffix}"
    topology = build("exponential", 5)
    WRITERS[suffix](topology.graph(), path)
    assert build("custom", 5, edges=str(path)).round(0).digest() == topology.round(0).digest()


def test_a_gml_file_without_labels_is_numbered_by_its_ids(tmp_path):
    path = tmp_path / "graph.gml"
    nodes = "".join(f"node [ id {i} ] " for i in range(3))
    path.write_text(f"graph [ {nodes} edge [ source 0 target 1 ] edge [ source 1 target 2 ] ]")
    np.testing.assert_allclose(matrix_of(str(path), 3), build("path", 3).round(0).matrix())


def test_edge_list_files_may_be_directed_and_may_hold_bare_weights(tmp_path):
    path = tmp_path / "graph.edgelist"
    path.write_text("0 1\n1 2\n2 3\n3 0\n")
    expected = build("directed_ring", 4).round(0).matrix()
    np.testing.assert_allclose(matrix_of(str(path), directed=True), expected)
    path.write_text("0 1 0.5\n1 0 0.5\n0 0 0.5\n1 1 0.5\n")
    assert matrix_of(str(path), 2, directed=True).tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_a_matrix_file_is_taken_as_it_is(tmp_path):
    path = tmp_path / "w.npy"
    np.save(path, RING)
    np.testing.assert_array_equal(matrix_of(str(path)), RING)
    assert num_nodes(str(path)) == 4


def test_labels_that_are_no_ranks_are_sorted_and_the_map_is_logged(caplog):
    graph = nx.Graph([("b", "a"), ("b", "c")])
    np.testing.assert_allclose(matrix_of(graph, 3), build("path", 3).round(0).matrix())
    assert "mapped {'a': 0, 'b': 1, 'c': 2}" in caplog.text or "'c': 2" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        matrix_of(nx.relabel_nodes(nx.path_graph(3), str), 3)
    assert caplog.text == ""


def test_unweighted_digraphs_get_doubly_stochastic_weights():
    topology = build("custom", 4, edges=[*SQUARE, [0, 2]])
    assert topology.kind == "DS"
    assert (topology.round(0).matrix() > 0).sum() == 9


def test_a_rule_replaces_the_weights_given():
    np.testing.assert_allclose(matrix_of(RING * 0 + (RING > 0), weights="metropolis"), RING)
    path = build("path", 4)
    reweighed = matrix_of(path.round(0).matrix(), weights="best_constant")
    np.testing.assert_array_equal(
        reweighed, build("path", 4, weights="best_constant").round(0).matrix()
    )


def swap(t):
    """Pair ranks 0-1 and 2-3 in even rounds, 1-2 in odd ones."""
    return [[0, 1], [1, 0], [2, 3], [3, 2]] if t % 2 == 0 else nx.Graph([(0, 3), (1, 2)])


def test_a_function_of_t_is_a_schedule():
    topology = build("custom", 4, edges=swap, period=2)
    assert (topology.period, topology.kind) == (2, "SDS")
    assert topology.round(1).recv(1)[0].tolist() == [2]
    assert topology.round(7).digest() == topology.round(1).digest()
    assert spectrum(topology).exact_after == 2


def test_a_function_is_found_by_its_name_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my_graphs.py").write_text("def swap(t):\n    return [[0, 1], [1, 0]]\n")
    monkeypatch.chdir(tmp_path)
    path_before = list(sys.path)
    topology = build("custom", 2, edges="my_graphs:swap", period=1)
    assert topology.round(0).matrix().tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert sys.path == path_before
    assert num_nodes("my_graphs:swap") == 2


def test_a_schedule_that_never_repeats_is_checked_round_by_round():
    def spoilt(t):
        return RING * (0.5 if t == 300 else 1)

    topology = build("custom", 4, edges=spoilt)
    assert topology.period is None
    assert topology.round(299).num_messages == 8
    with pytest.raises(TopologyStochasticError, match=r"row 0 of W\(300\) sums to 0.5"):
        topology.round(300)


FAULTS = [
    (TopologySizeError, "the graph has 4 nodes and the run 5 ranks", 5, {"edges": SQUARE}),
    (TopologySizeError, "square, got shape", 4, {"edges": RING[:3]}),
    (TopologySizeError, "has 4 nodes and the run 3 ranks", 3, {"edges": RING}),
    (TopologyWeightError, r"W\[1, 0\] is nan, must be finite", 2,
     {"edges": np.array([[0.5, 0.5], [np.nan, 0.5]])}),
    (TopologyWeightError, r"W\[0, 1\] is -0.5, must not be negative.*allow_negative", 2,
     {"edges": np.array([[1.5, -0.5], [-0.5, 1.5]])}),
    (TopologyWeightError, "2 of 3 edges have a weight, but 2 -> 0 has none", 3,
     {"edges": [[0, 1, 1.0], [1, 2, 1.0], [2, 0]]}),
    (TopologyWeightError, "weight of 0 -> 1 is 'heavy', must be a number", 2,
     {"edges": [[0, 1, "heavy"], [1, 0, 1.0]]}),
    (TopologyConnectivityError, r"components are \{0, 1\}, \{2, 3\}", 4,
     {"edges": [[0, 1], [2, 3]], "directed": False}),
    (TopologyConnectivityError, r"components are \{0\}, \{1\}", 2,
     {"edges": np.array([[1, 0], [0.5, 0.5]]), "kind": "RS"}),
    (TopologyConnectivityError, "the union of the rounds over a period is not connected", 4,
     {"edges": lambda t: [[0, 1], [1, 0], [2, 3], [3, 2]], "period": 3}),
    (TopologyConnectivityError, "the union of the first 256 rounds", 4,
     {"edges": lambda t: nx.Graph([(0, 1), (2, 3)])}),
    (TopologyStochasticError, r"row 1 of W sums to 0.97, must be 1 \(doubly stochastic\)", 2,
     {"edges": np.array([[0.5, 0.5], [0.5, 0.47]])}),
    (TopologyStochasticError, "column 0 of W sums to 1.25", 2,
     {"edges": np.array([[0.75, 0.25], [0.5, 0.5]])}),
    (TopologyStochasticError, r"row 1 of W sums to 0.75, must be 1 \(row-stochastic\)", 2,
     {"edges": np.array([[0.75, 0.25], [0.25, 0.5]]), "kind": "RS"}),
    (TopologyStochasticError, r"\(column-stochastic\)", 2,
     {"edges": np.array([[0.5, 0.5], [0.25, 0.75]]), "kind": "CS"}),
    (TopologyStochasticError, "differs from its transpose by 0.5", 3,
     {"edges": build("directed_ring", 3).round(0).matrix(), "kind": "SDS"}),
    (TopologyPeriodicError, "circulate with period 4", 4,
     {"edges": [[a, b, 1.0] for a, b in SQUARE]}),
    (TopologyPeriodicError, "circulate with period 2", 4,
     {"edges": nx.to_numpy_array(nx.cycle_graph(4)) / 2}),
    (TopologyPeriodicError, "second eigenvalue of W has modulus 1.5", 2,
     {"edges": np.array([[-0.25, 1.25], [1.25, -0.25]]), "allow_negative": True}),
    (TopologyParameterError, "there is no file 'gone.gml'", 4, {"edges": "gone.gml"}),
    (TopologyParameterError, "expected a list of", 4, {"edges": "nothing"}),
    (TopologyParameterError, "expected a list of", 4, {"edges": 3}),
    (TopologyParameterError, "cannot import 'no_such_module:f'", 4, {"edges": "no_such_module:f"}),
    (TopologyParameterError, "cannot import 'math:nothing'", 4, {"edges": "math:nothing"}),
    (TopologyParameterError, "'math:pi' is a float, not a function", 4, {"edges": "math:pi"}),
    (TopologyParameterError, "item 1 must be", 2, {"edges": [[0, 1], [1]]}),
    (TopologyParameterError, "item 0 must name ranks", 2, {"edges": [[0.5, 1], [1, 0]]}),
    (TopologyParameterError, "only a function of t has one, got 3", 4,
     {"edges": SQUARE, "period": 3}),
    (TopologyParameterError, "must be 1 or more, got 0", 4, {"edges": swap, "period": 0}),
    (TopologyParameterError, "round 3 differs from round 0", 4, {"edges": swap, "period": 3}),
    (TopologyParameterError, "the graph is undirected", 4,
     {"edges": nx.cycle_graph(4), "directed": True}),
    (TopologyParameterError, "a matrix says for itself", 4, {"edges": RING, "directed": False}),
    (TopologyParameterError, "'custom' needs a value here", 4, {}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "n", "params"), FAULTS)
def test_a_faulty_graph_is_refused_by_name(error, message, n, params):
    with pytest.raises(error, match=message) as caught:
        build("custom", n, **params)
    assert type(caught.value) is error
    assert str(caught.value).startswith("topology")


@pytest.mark.parametrize("suffix", [".npy", ".gml", ".graphml", ".edgelist"])
def test_a_truncated_file_is_refused_by_name(suffix, tmp_path):
    path = tmp_path / f"graph{suffix}"
    if suffix == ".npy":
        np.save(path, RING)
    else:
        WRITERS[suffix](build("exponential", 9).graph(), path)
    path.write_bytes(path.read_bytes()[:-45])
    with pytest.raises(TopologyParameterError, match=f"graph{suffix}.*cannot be read"):
        build("custom", 9, edges=str(path))


def test_a_pickled_array_is_not_opened(tmp_path):
    path = tmp_path / "w.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(TopologyParameterError, match="cannot be read"):
        build("custom", 2, edges=str(path))


def test_checks_come_in_order_and_can_be_turned_off():
    negative_and_cut = np.array([[1.5, -0.5, 0], [-0.5, 1.5, 0], [0, 0, 0.9]])
    with pytest.raises(TopologyWeightError):
        build("custom", 3, edges=negative_and_cut)
    with pytest.raises(TopologyConnectivityError):
        build("custom", 3, edges=negative_and_cut, allow_negative=True)
    for off in ("off", False):  # YAML reads a bare off as False
        topology = build("custom", 3, edges=negative_and_cut, check=off)
        np.testing.assert_array_equal(topology.round(0).matrix(), negative_and_cut)


def test_negative_weights_are_allowed_on_request():
    matrix = np.array([[0.8, 0.3, -0.1], [0.3, 0.4, 0.3], [-0.1, 0.3, 0.8]])
    topology = build("custom", 3, edges=matrix, allow_negative=True)
    assert topology.kind == "SDS"
    assert spectrum(topology).rho < 1


def test_lazy_weights_make_a_circulating_graph_agree():
    topology = build("custom", 4, edges=[[a, b, 1.0] for a, b in SQUARE], lazy=True)
    np.testing.assert_allclose(
        topology.round(0).matrix(), build("directed_ring", 4).round(0).matrix()
    )


def test_a_schedule_that_never_mixes_is_said(caplog):
    def shift(t):
        return np.roll(np.eye(4), t % 2 + 1, axis=0)

    build("custom", 4, edges=shift, period=2)
    assert "rate 1 >= 1 - 1e-12" in caplog.text
