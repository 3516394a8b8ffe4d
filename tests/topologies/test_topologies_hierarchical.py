"""Machines of several ranks: W = W_M kron J_L, and what follows."""

import numpy as np
import pytest

from gossamer.topologies import HierarchicalTopology, build, spectrum

CASES = [
    ("ring", 5, 3, {}), ("base", 6, 2, {"k": 2}), ("exponential", 4, 4, {}), ("ring", 1, 4, {}),
    ("ring", 4, 1, {}), ("random_matching", 6, 2, {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "machines", "local", "params"), CASES)
def test_the_matrix_is_that_of_the_machines_times_the_local_mean(name, machines, local, params):
    topology = build(name, machines * local, hierarchical={"local": local}, **params)
    among = build(name, machines, **params)
    assert isinstance(topology, HierarchicalTopology)
    assert (topology.machines.n, topology.local, topology.kind) == (machines, local, among.kind)
    for t in range(4):
        expected = np.kron(among.round(t).matrix(), np.full((local, local), 1 / local))
        np.testing.assert_allclose(topology.round(t).matrix(), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(("name", "machines", "local", "params"), CASES[:5])
def test_the_spectrum_is_that_of_the_machines_and_zeros(name, machines, local, params, lazy):
    topology = build(name, machines * local, hierarchical={"local": local}, lazy=lazy, **params)
    flat = build("custom", topology.n, edges=topology.round, period=topology.period)
    found, dense = spectrum(topology), spectrum(flat)
    assert found.rho_period == pytest.approx(dense.rho_period, abs=1e-12)
    assert found.exact_after == dense.exact_after
    if topology.is_symmetric:
        assert found.lambda_min == pytest.approx(dense.lambda_min, abs=1e-12)
        assert topology.lambda_min() == found.lambda_min
    if lazy:
        assert topology.lazy().machines.n == machines
        assert found.lambda_min is None or found.lambda_min >= -1e-12


def test_weight_rules_and_schedules_apply_to_the_machines():
    topology = build("star", 12, weights="best_constant", hierarchical={"local": 3})
    assert spectrum(topology).rho == pytest.approx(3 / 5, abs=1e-9)  # (M - 1)/(M + 1), M = 4
