"""Spectra: FFT and sparse solvers against dense algebra and closed forms; rounds to agreement."""

from math import cos, pi

import networkx as nx
import numpy as np
import pytest

from gossamer.topologies import Round, TopologyStochasticError, build, spectrum
from gossamer.topologies.eigen import (
    circulant_eigenvalues,
    distance_to_mean,
    second_eigenvalue,
    second_modulus,
    smallest_eigenvalue,
)

STATIC = [
    ("ring", 9), ("exponential", 11), ("complete", 7), ("directed_ring", 8), ("paley", 13),
    ("equi_static", 12), ("path", 10), ("star", 8), ("torus", 12), ("de_bruijn", 12),
    ("erdos_renyi", 20),
]  # fmt: skip


@pytest.mark.parametrize(("name", "n"), STATIC)
def test_rho_is_the_dense_norm(name, n):
    topology = build(name, n)
    matrix = topology.round(0).matrix()
    dense = np.linalg.norm(matrix - 1 / n, 2)
    assert spectrum(topology).rho == pytest.approx(dense, abs=1e-9)
    if topology.is_symmetric:
        eigenvalues = np.linalg.eigvalsh(matrix)
        assert topology.lambda_min() == pytest.approx(eigenvalues[0], abs=1e-9)
        assert second_eigenvalue(topology.round(0)) == pytest.approx(eigenvalues[-2], abs=1e-9)


@pytest.mark.parametrize("name", ["base", "one_peer_exponential", "hyper_hypercube"])
def test_rho_of_a_period_is_the_dense_norm_of_its_product(name):
    topology = build(name, 12)
    product = np.eye(12)
    for t in range(topology.period):
        product = topology.round(t).matrix() @ product
    dense = np.linalg.norm(product - 1 / 12, 2)
    assert spectrum(topology).rho_period == pytest.approx(dense, abs=1e-12)


@pytest.mark.parametrize("name", ["ring", "exponential", "complete", "equi_static", "paley"])
def test_eigenvalues_of_circulant_rounds_come_from_one_fft(name):
    round_ = build(name, 13).round(0)
    found = circulant_eigenvalues(round_)
    expected = np.linalg.eigvals(round_.matrix())
    assert found[0] == pytest.approx(1, abs=1e-12)
    # Each of one set has a partner in the other: the two orders differ.
    distances = np.abs(found[:, None] - expected[None])
    assert distances.min(axis=0).max() < 1e-12
    assert distances.min(axis=1).max() < 1e-12


@pytest.mark.parametrize("name", ["path", "star", "de_bruijn", "erdos_renyi"])
def test_other_rounds_are_not_taken_for_circulant(name):
    assert circulant_eigenvalues(build(name, 13).round(0)) is None


def test_a_round_with_one_weight_off_is_not_taken_for_circulant():
    matrix = build("ring", 6).round(0).matrix()
    matrix[2, 3] += 1e-9
    assert circulant_eigenvalues(Round.from_matrix(matrix)) is None


N = 4096
LARGE = {
    "ring": (1 + 2 * cos(2 * pi / N)) / 3,
    "path": (1 + 2 * cos(pi / N)) / 3,
    "star": 1 - 1 / N,
    "torus": (3 + 2 * cos(2 * pi / 64)) / 5,
    "hypercube": 11 / 13,
    "exponential": 11 / 13,
}


@pytest.mark.parametrize("name", LARGE)
def test_rho_of_4096_ranks_has_its_closed_form(name):
    # 1e-9 where 1 - rho is as small as 2e-7: the gap is right to better than a percent.
    assert spectrum(build(name, N)).rho == pytest.approx(LARGE[name], abs=1e-9)


def test_rho_of_a_long_grid_with_max_degree_weights_has_its_closed_form():
    rows, cols = 4, 1024
    slow = 1 - 0.4 * (1 - cos(pi / cols))
    fast = abs(1 - (4 + 2 * cos(pi / rows) + 2 * cos(pi / cols)) / 5)
    found = spectrum(build("grid", N, rows=rows, cols=cols, weights="max_degree"))
    assert found.rho == pytest.approx(max(slow, fast), abs=1e-9)


def test_ends_of_the_spectrum_of_a_path_of_4096_are_the_closed_form():
    round_ = build("path", N).round(0)
    for end, k in ((second_eigenvalue, 1), (smallest_eigenvalue, N - 1)):
        assert end(round_) == pytest.approx((1 + 2 * cos(pi * k / N)) / 3, abs=1e-9)


@pytest.mark.parametrize("name", ["tree", "erdos_renyi", "small_world", "margulis"])
def test_the_sparse_solvers_agree_with_the_dense_ones(name):
    n = 576
    round_ = build(name, n).round(0)
    eigenvalues = np.linalg.eigvalsh(round_.matrix())
    assert second_eigenvalue(round_) == pytest.approx(eigenvalues[-2], abs=1e-9)
    assert smallest_eigenvalue(round_) == pytest.approx(eigenvalues[0], abs=1e-9)


@pytest.mark.slow
def test_random_regular_graphs_of_4096_ranks_keep_the_expander_mixing_bound():
    found = spectrum(build("random_regular", N, degree=4))
    assert found.rho < (1 + 2 * 3**0.5) / 5 + 0.01  # Friedman: almost Ramanujan


@pytest.mark.parametrize("name", ["random_matching", "one_peer_hypercube", "base"])
def test_rounds_of_few_distinct_eigenvalues_do_not_mislead_the_solver(name):
    # Lanczos exhausts its space at once here, and ARPACK alone answers 1.
    round_ = build(name, N).round(1)
    assert smallest_eigenvalue(round_) == pytest.approx(0, abs=1e-9)


def test_norms_of_large_directed_rounds_and_products_agree_with_dense_ones():
    n = 540
    graph = nx.DiGraph(build("directed_ring", n).graph())
    graph.add_edges_from((i, (7 * i + 3) % n) for i in range(n))
    edges = [[a, b] for a, b in graph.edges if a != b]
    topology = build("custom", n, edges=edges)
    matrix = topology.round(0).matrix()
    expected = np.linalg.norm(matrix - 1 / n, 2)
    assert distance_to_mean([topology.round(0)]) == pytest.approx(expected, abs=1e-8)
    moduli = np.sort(np.abs(np.linalg.eigvals(matrix)))
    assert second_modulus([topology.round(0)]) == pytest.approx(moduli[-2], abs=1e-8)
    both = [topology.round(0), build("tree", n).round(0)]
    product = both[1].matrix() @ both[0].matrix()
    expected = np.linalg.norm(product - 1 / n, 2)
    assert distance_to_mean(both) == pytest.approx(expected, abs=1e-8)


ROUNDS_TO = {
    16: {"path": 1060, "ring": 258, "star": 213, "grid": 98, "torus": 27, "hypercube": 28,
         "exponential": 23, "one_peer_exponential": 4, "base 1": 4, "base 3": 2},
    25: {"ring": 634, "torus": 43, "exponential": 19, "one_peer_exponential": 44, "base 1": 9,
         "base 2": 6, "base 3": 5, "base 4": 2},
}  # fmt: skip


@pytest.mark.parametrize(
    ("n", "name", "rounds"), [(n, *item) for n, row in ROUNDS_TO.items() for item in row.items()]
)
def test_rounds_to_a_millionth_are_as_in_the_table(n, name, rounds):
    name, _, k = name.partition(" ")
    topology = build(name, n, **({"k": int(k)} if k else {}))
    assert spectrum(topology).rounds_to(1e-6) == rounds


def test_exactness_is_told_from_fast_contraction():
    assert spectrum(build("complete", 9)).exact_after == 1
    assert spectrum(build("ring", 3)).exact_after == 1
    assert spectrum(build("ring", 1)).exact_after == 0
    nearly = np.eye(5) * 1e-5 + (1 - 1e-5) / 5
    assert spectrum(build("custom", 5, edges=nearly)).exact_after is None
    assert spectrum(build("exponential", 8)).exact_after is None


def test_a_de_bruijn_graph_that_is_not_exact_is_rated_by_its_eigenvalues():
    found = spectrum(build("de_bruijn", 6))
    assert found.rho == pytest.approx(1, abs=1e-12)
    assert found.rate == pytest.approx(0.5, abs=1e-9)
    assert found.rounds_to(1e-6) <= 25


def test_the_rate_of_a_biased_matrix_is_that_towards_its_own_limit():
    topology = build("star", 6, weights="row_stochastic")
    moduli = np.sort(np.abs(np.linalg.eigvals(topology.round(0).matrix())))
    found = spectrum(topology)
    assert found.rate == pytest.approx(moduli[-2], abs=1e-9)
    assert found.rounds_to(1e-6, max_rounds=500) is None


def test_lazy_matrices_have_no_negative_eigenvalue_and_half_the_spectrum():
    topology = build("ring", 8)
    assert topology.lambda_min() == pytest.approx(-1 / 3, abs=1e-12)
    lazy = build("ring", 8, lazy=True)
    assert lazy.lambda_min() == pytest.approx(1 / 3, abs=1e-12)
    assert spectrum(lazy).rho == pytest.approx((1 + spectrum(topology).rho) / 2, abs=1e-12)


def test_the_smallest_eigenvalue_is_that_of_the_worst_round():
    topology = build("base", 25)
    worst = min(np.linalg.eigvalsh(topology.round(t).matrix())[0] for t in range(topology.period))
    assert topology.lambda_min() == pytest.approx(worst, abs=1e-12)
    with pytest.raises(TopologyStochasticError, match="needs a symmetric W"):
        build("exponential", 6).lambda_min()


def test_an_estimated_rate_of_a_random_schedule_is_near_the_formula():
    topology = build("equi_dyn", 8)
    estimated = build("custom", 8, edges=topology.round)
    assert estimated.rho_ms is None
    # 256 samples of 7 equally likely rounds: a few hundredths.
    assert spectrum(estimated).rho_ms == pytest.approx(topology.rho_ms, abs=0.05)


def test_estimated_rounds_are_whole_periods():
    found = spectrum(build("one_peer_exponential", 25))
    periods = np.ceil(np.log(1e-3) / np.log(found.rho_period))
    assert found.estimated_rounds(1e-3) == 5 * periods
    assert spectrum(build("base", 25)).estimated_rounds(1e-9) == 9
