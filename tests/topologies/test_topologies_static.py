"""Static graphs: shape, weights and the closed forms of rho."""

from math import cos, pi, sqrt

import numpy as np
import pytest

from gossamer.topologies import build, factories, spectrum

TOLERANCE = 1e-9

FORMULAS = [
    *[("ring", n, {}, (1 + 2 * cos(2 * pi / n)) / 3) for n in (4, 5, 8, 9, 31)],
    ("ring", 3, {}, 0.0),
    *[("directed_ring", n, {}, cos(pi / n)) for n in (3, 4, 7, 12)],
    *[("directed_ring", n, {"direction": "from_next"}, cos(pi / n)) for n in (3, 8)],
    *[("path", n, {}, (1 + 2 * cos(pi / n)) / 3) for n in (3, 4, 9, 20)],
    *[("star", n, {"center": n // 2}, 1 - 1 / n) for n in (3, 4, 9, 20)],
    *[("complete", n, {}, 0.0) for n in (2, 3, 8, 13)],
    *[("hypercube", 2**d, {}, (d - 1) / (d + 1)) for d in (1, 2, 3, 4, 6)],
    *[("exponential", n, {}, (t - 1) / (t + 1)) for n, t in ((4, 2), (6, 3), (16, 4), (24, 5))],
    *[("paley", n, {}, (1 + sqrt(n)) / (n + 1)) for n in (5, 13, 17, 29)],
]
ODD_EXPONENTIAL = {
    3: 0, 5: 0.25, 7: 0.353553, 9: 0.441787, 15: 0.489898, 25: 0.510861, 33: 0.607800,
}  # fmt: skip


@pytest.mark.parametrize(("name", "n", "params", "rho"), FORMULAS)
def test_rho_has_its_closed_form(name, n, params, rho):
    assert spectrum(build(name, n, **params)).rho == pytest.approx(rho, abs=TOLERANCE)


@pytest.mark.parametrize(("n", "rho"), ODD_EXPONENTIAL.items())
def test_rho_of_the_exponential_graph_on_odd_n(n, rho):
    assert spectrum(build("exponential", n)).rho == pytest.approx(rho, abs=5e-7)


@pytest.mark.parametrize(("rows", "cols"), [(2, 3), (2, 5), (3, 3), (4, 6)])
def test_rho_of_a_grid_with_max_degree_weights(rows, cols):
    degree = (2 if cols > 2 else 1) + (2 if rows > 2 else 1)
    share = 1 / (degree + 1)
    slow = 1 - 2 * share * (1 - cos(pi / max(rows, cols)))
    fast = abs(1 - share * (4 + 2 * cos(pi / rows) + 2 * cos(pi / cols)))
    topology = build("grid", rows * cols, rows=rows, cols=cols, weights="max_degree")
    assert spectrum(topology).rho == pytest.approx(max(slow, fast), abs=TOLERANCE)


@pytest.mark.parametrize(("rows", "cols"), [(3, 3), (3, 4), (4, 4), (4, 6), (5, 7)])
def test_rho_of_a_torus(rows, cols):
    slow = (3 + 2 * cos(2 * pi / max(rows, cols))) / 5
    both_even = 0.6 if rows % 2 == cols % 2 == 0 else 0.0
    topology = build("torus", rows * cols, rows=rows, cols=cols)
    assert spectrum(topology).rho == pytest.approx(max(slow, both_even), abs=TOLERANCE)
    assert topology.degree == 4


def test_rho_of_the_binary_tree_of_15():
    assert spectrum(build("tree", 15)).rho == pytest.approx(0.975803, abs=5e-7)


@pytest.mark.parametrize("side", [4, 5, 8])
def test_the_margulis_graph_keeps_its_bound(side):
    assert spectrum(build("margulis", side * side)).rho <= 5 * sqrt(2) / 8 + TOLERANCE


@pytest.mark.parametrize(("n", "degree", "t"), [(8, 2, 3), (27, 3, 3), (16, 4, 2), (64, 2, 6)])
def test_powers_of_a_de_bruijn_matrix_reach_the_mean_exactly(n, degree, t):
    topology = build("de_bruijn", n, degree=degree)
    power = np.linalg.matrix_power(topology.round(0).matrix(), t)
    np.testing.assert_allclose(power, 1 / n, rtol=0, atol=1e-15)
    found = spectrum(topology)
    assert found.rho == pytest.approx(1, abs=TOLERANCE)
    assert found.exact_after == t


def test_weights_and_edges_of_small_graphs_are_as_the_index_formulas_say():
    third, half, quarter = 1 / 3, 1 / 2, 1 / 4
    assert build("directed_ring", 3).round(0).recv(0)[0].tolist() == [2]
    assert build("directed_ring", 3, direction="from_next").round(0).recv(0)[0].tolist() == [1]
    np.testing.assert_allclose(
        build("path", 3).round(0).matrix(),
        [[2 * third, third, 0], [third, third, third], [0, third, 2 * third]],
    )
    exponential = build("exponential", 6).round(0)
    assert exponential.recv(0)[0].tolist() == [2, 4, 5]  # i - 4, i - 2, i - 1
    assert exponential.self_weight.tolist() == [quarter] * 6
    assert build("p-peer-exponential", 9, p=2).round(0).recv(0)[0].tolist() == [3, 6, 7, 8]
    assert build("circulant", 6, offsets=[1, 3]).round(0).recv(0)[0].tolist() == [3, 5]
    assert build("hypercube", 8).round(0).recv(5)[0].tolist() == [1, 4, 7]
    assert build("tree", 7).round(0).recv(1)[0].tolist() == [0, 3, 4]
    assert build("grid", 6, rows=2, cols=3).round(0).recv(1)[0].tolist() == [0, 2, 4]
    assert build("paley", 5).round(0).recv(0)[0].tolist() == [1, 4]
    assert build("directed_ring", 2).round(0).matrix().tolist() == [[half, half], [half, half]]


def test_a_dimension_of_two_has_one_neighbor_and_of_one_none():
    assert build("torus", 8, rows=2, cols=4).round(0).recv(0)[0].tolist() == [1, 3, 4]
    assert build("torus", 4, rows=2, cols=2).round(0).recv(0)[0].tolist() == [1, 2]
    ring = build("ring", 5).round(0).matrix()
    np.testing.assert_allclose(build("torus", 5, rows=1).round(0).matrix(), ring)


@pytest.mark.parametrize(("n", "shape"), [(12, (3, 4)), (16, (4, 4)), (24, (4, 6)), (243, (9, 27))])
def test_the_default_shape_is_the_squarest(n, shape):
    params = build("torus", n).params
    assert (params["rows"], params["cols"]) == shape


def test_a_prime_lattice_says_that_it_degenerates(caplog):
    build("grid", 7)
    assert "7 is prime, so the grid is a path" in caplog.text


def test_margulis_sums_the_multiplicities_of_its_edges():
    round_ = build("margulis", 9).round(0)
    eighths = round_.weights * 8
    np.testing.assert_array_equal(eighths, np.round(eighths))
    assert eighths.max() >= 2


STATIC = [name for name, factory in factories.items() if name not in ("custom", "circulant")]


@pytest.mark.parametrize("name", STATIC)
def test_one_rank_keeps_its_value(name):
    assert build(name, 1).round(0).matrix().tolist() == [[1.0]]


@pytest.mark.parametrize("name", [name for name in STATIC if build(name, 2).is_static])
def test_two_ranks_average(name):
    np.testing.assert_allclose(build(name, 2).round(0).matrix(), 0.5, rtol=0, atol=1e-15)
