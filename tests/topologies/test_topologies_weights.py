"""Weight rules: their formulas, their classes, the table of optimised weights."""

import importlib.util
from math import cos, pi

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.topologies import (
    RULES,
    Round,
    TopologyConnectivityError,
    TopologyParameterError,
    TopologyStochasticError,
    build,
    spectrum,
)
from gossamer.topologies.weights import weigh

# graph: metropolis, best_constant, fmmc, fdla
TABLE = {
    ("path", 8): (0.949253, 0.923880, 0.92388, 0.92388),
    ("ring", 8): (0.804738, 0.744521, 0.74452, 0.74452),
    ("star", 8): (0.875000, 0.777778, 0.85714, 0.77778),
    ("grid", 16): (0.868641, 0.841983, 0.82439, 0.82439),
    ("torus", 24): (0.800000, 0.777778, 0.71429, 0.71429),
    ("barbell", 10): (0.950260, 0.914732, 0.91774, 0.89443),
    ("tree", 15): (0.975803, 0.962020, 0.96270, 0.95862),
}
TOLERANCES = {"metropolis": 5e-7, "best_constant": 5e-7, "fmmc": 2e-3, "fdla": 4e-3}


def graph(name, n, **options):
    if name == "barbell":
        return build("custom", n, edges=nx.barbell_graph(5, 0), **options)
    return build(name, n, **options)


@pytest.mark.parametrize("rule", TOLERANCES)
@pytest.mark.parametrize(("name", "n"), TABLE)
def test_rho_of_weighted_graphs_is_as_in_the_table(name, n, rule):
    expected = TABLE[name, n][list(TOLERANCES).index(rule)]
    topology = graph(name, n, weights=rule)
    assert topology.is_symmetric
    assert spectrum(topology).rho == pytest.approx(expected, abs=TOLERANCES[rule])


@pytest.mark.parametrize(("name", "n"), TABLE)
def test_fmmc_keeps_weights_non_negative_and_beats_metropolis(name, n):
    matrix = graph(name, n, weights="fmmc").round(0).matrix()
    assert matrix.min() >= -1e-12
    assert np.linalg.norm(matrix - 1 / n, 2) <= TABLE[name, n][0] + 1e-6


def test_the_optimum_comes_from_cvxpy_where_it_is_installed_and_is_refused_otherwise():
    if importlib.util.find_spec("cvxpy") is None:
        with pytest.raises(TopologyParameterError, match="need cvxpy, which is not installed"):
            build("path", 8, weights="fmmc_sdp")
    else:
        for rule, expected in (("fmmc_sdp", 0.85714), ("fdla_sdp", 0.77778)):
            rho = spectrum(build("star", 8, weights=rule)).rho
            assert rho == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("n", [4, 8, 9, 15])
def test_best_constant_of_a_ring_has_a_closed_form(n):
    if n % 2 == 0:
        c = cos(2 * pi / n)
        rho = (1 + c) / (3 - c)
    else:
        l_n, l_2 = 2 + 2 * cos(pi / n), 2 - 2 * cos(2 * pi / n)
        rho = (l_n - l_2) / (l_n + l_2)
    found = spectrum(build("ring", n, weights="best_constant"))
    assert found.rho == pytest.approx(rho, abs=1e-9)


def test_best_constant_of_a_star_says_that_its_center_has_a_negative_weight(caplog):
    topology = build("star", 8, weights="best_constant")
    assert topology.round(0).self_weight[0] < 0
    assert "gives rank 0 the self weight" in caplog.text
    assert spectrum(topology).rho == pytest.approx(7 / 9, abs=1e-9)


def test_metropolis_weighs_an_edge_by_its_busier_end():
    matrix = build("star", 5, weights="metropolis").round(0).matrix()
    np.testing.assert_allclose(matrix[0], 1 / 5)
    np.testing.assert_allclose(np.diag(matrix)[1:], 4 / 5)


def test_max_degree_is_one_weight_for_all():
    matrix = build("path", 4, weights="max_degree").round(0).matrix()
    assert {*matrix[matrix != np.diag(np.diag(matrix))]} <= {1 / 3, 2 / 3, 0.0}


@st.composite
def digraphs(draw):
    n = draw(st.integers(1, 9))
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    edges = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    cycle = [(i, (i + 1) % n) for i in range(n) if n > 1]  # strongly connected
    sources, targets = zip(*{*edges, *cycle}, strict=True) if n > 1 else ((), ())
    return Round.from_edges(n, targets, sources, 1.0, 0.0)


@settings(deadline=None)
@given(digraphs())
def test_directed_rules_make_the_sums_they_promise(edges):
    pattern = edges.matrix() + np.eye(edges.n) > 0
    sums = {"row_stochastic": (1,), "push_sum": (0,), "sinkhorn": (0, 1)}
    for rule, axes in sums.items():
        matrix = weigh(edges, rule).matrix()
        for axis in axes:
            np.testing.assert_allclose(matrix.sum(axis=axis), 1, rtol=0, atol=1e-11)
        np.testing.assert_array_equal(matrix > 0, pattern)  # every edge keeps a positive weight


@settings(deadline=None)
@given(st.integers(2, 10), st.floats(0.1, 1), st.integers(0, 10**6))
def test_undirected_rules_are_symmetric_and_doubly_stochastic(n, p, seed):
    drawn = nx.gnp_random_graph(n, p, seed=seed)
    drawn.add_edges_from(nx.path_graph(n).edges)
    for rule in ("metropolis", "max_degree", "best_constant"):
        topology = build("custom", n, edges=drawn, weights=rule)
        matrix = topology.round(0).matrix()
        assert topology.kind == "SDS"
        np.testing.assert_array_equal(matrix, matrix.T)
        np.testing.assert_allclose(matrix.sum(axis=0), 1, rtol=0, atol=1e-12)
        assert spectrum(topology).rho < 1


def test_push_sum_keeps_the_total_weight_and_reaches_the_average():
    edges = [[0, 1], [1, 2], [2, 0], [0, 2], [3, 0], [2, 3]]
    topology = build("custom", 4, edges=edges, weights="push_sum")
    assert topology.kind == "CS"
    x, w = np.arange(4.0), np.ones(4)
    for t in range(200):
        x, w = topology.round(t).apply(x), topology.round(t).apply(w)
        assert w.sum() == pytest.approx(4, rel=1e-12)
    np.testing.assert_allclose(x / w, 1.5, rtol=0, atol=1e-12)
    assert spectrum(topology).rounds_to(1e-6) < 100


def test_row_stochastic_weights_can_be_corrected_by_the_perron_vector():
    edges = [[0, 1], [1, 2], [2, 0], [0, 2]]
    round_ = build("custom", 3, edges=edges, weights="row_stochastic").round(0)
    y = np.eye(3)
    for _ in range(200):
        y = round_.apply(y)
    perron = np.diag(y)
    np.testing.assert_allclose(perron @ round_.matrix(), perron, rtol=0, atol=1e-12)
    assert perron.sum() == pytest.approx(1, rel=1e-12)
    assert np.ptp(perron) > 0.01


def test_uniform_weights_on_an_irregular_graph_are_refused_for_their_bias():
    with pytest.raises(TopologyStochasticError, match=r"'metropolis' .*allow_biased: true"):
        build("star", 6, weights="uniform")
    topology = build("star", 6, weights="uniform", allow_biased=True)
    assert topology.kind == "RS"
    x = np.arange(6.0)
    for _ in range(300):
        x = topology.round(0).apply(x)
    np.testing.assert_allclose(x, 1.875, rtol=0, atol=1e-12)  # instead of 2.5


def test_uniform_weights_on_a_regular_graph_are_doubly_stochastic():
    assert build("torus", 12, weights="uniform").kind == "SDS"
    assert build("exponential", 12, weights="uniform").kind == "DS"


def test_symmetric_rules_refuse_one_way_edges():
    with pytest.raises(TopologyParameterError, match="edge 0 -> 1 has no way back"):
        build("directed_ring", 4, weights="metropolis")


def test_sinkhorn_names_the_parts_that_cannot_hear_each_other():
    with pytest.raises(TopologyConnectivityError, match=r"components are \{0, 1\}, \{2\}"):
        build("custom", 3, edges=[[0, 1], [1, 0], [1, 2]], weights="sinkhorn")


def test_optimised_weights_are_refused_where_they_would_take_for_ever():
    with pytest.raises(TopologyParameterError, match="too many for 300 ranks"):
        build("ring", 300, weights="fmmc")


def test_an_unknown_rule_is_answered_with_the_nearest():
    with pytest.raises(TopologyParameterError, match="did you mean 'metropolis'"):
        build("ring", 4, weights="metropolitan")


def test_hyphens_and_underscores_are_alike_in_rules_too():
    assert build("ring", 4, weights="best-constant").params["weights"] == "best_constant"


@pytest.mark.parametrize("rule", ["metropolis", "max_degree", "uniform", "push_sum"])
def test_pairs_weigh_a_half_by_any_rule_so_a_matching_stays_as_it_is(rule):
    own, ruled = build("random_matching", 9), build("random_matching", 9, weights=rule)
    assert ruled.round(17).digest() == own.round(17).digest()


def test_replacing_the_weights_of_an_exact_schedule_takes_effect_and_is_said(caplog):
    ruled = build("base", 6, k=2, simple=True, weights="metropolis")
    assert ruled.is_symmetric
    own = build("base", 7, k=1)
    ruled = build("base", 7, k=1, weights="metropolis")
    assert "replaces the weights of 'base'" in caplog.text
    assert ruled.round(3).digest() != own.round(3).digest()
    assert spectrum(ruled).exact_after is None


def test_rules_for_whole_graphs_are_refused_on_schedules():
    with pytest.raises(TopologyParameterError, match="'best_constant' needs one connected graph"):
        build("base", 7, weights="best_constant")


def test_every_rule_is_documented():
    assert all(rule.__doc__ for rule in RULES.values())
