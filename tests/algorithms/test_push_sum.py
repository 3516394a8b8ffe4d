"""SGP, its overlapped form and Push-DIGing on directed graphs."""

from __future__ import annotations

import numpy as np
import pytest
from oracles_for_tests import (
    LR,
    MOMENTUM,
    PLAIN,
    LogisticOracle,
    Trial,
    close,
    digraph,
    matrix,
    start,
    switching_digraph,
)

from gossamer.algorithms.decentralized.dsgd import DSGD
from gossamer.algorithms.decentralized.push_diging import PushDIGing
from gossamer.algorithms.decentralized.sgp import SGP
from gossamer.runtime import ConfigError
from gossamer.topologies import Round, Topology, build


@pytest.mark.parametrize("topology", [digraph(8), switching_digraph(8)], ids=str)
def test_sgp_follows_the_recursion_on_directed_graphs(topology):
    trial = Trial(SGP(optimizer=PLAIN), topology)
    u, w = np.repeat(start(trial.oracle), 8, axis=0), np.ones((8, 1))
    for k in range(20):
        P = matrix(topology, k)
        u = P @ (u - LR * trial.gradients(u / w, k))
        w = P @ w
        trial.step()
        close(trial.x, u / w)


def test_sgp_moves_the_biased_parameters_by_a_momentum_of_gradients_at_z():
    trial, topology = Trial(SGP(optimizer=MOMENTUM), digraph(8)), digraph(8)
    u, w = np.repeat(start(trial.oracle), 8, axis=0), np.ones((8, 1))
    m, P = np.zeros_like(u), matrix(topology)
    for k in range(20):
        g = trial.gradients(u / w, k)
        m = 0.9 * m + g
        u, w = P @ (u - LR * (g + 0.9 * m)), P @ w
        trial.step()
    close(trial.x, u / w)


@pytest.mark.parametrize("topology", ["ring", "one_peer_exponential"])
def test_sgp_with_a_doubly_stochastic_w_is_dsgd_with_weights_one(topology):
    sgp = Trial(SGP(optimizer=PLAIN), build(topology, 8))
    dsgd = Trial(DSGD(optimizer=PLAIN), build(topology, 8))
    for _ in range(30):
        sgp.step()
        dsgd.step()
    close(sgp.x, dsgd.x)
    close(sgp.state.row[:, -1].numpy(), np.ones(8))


def test_push_sum_finds_the_mean_where_row_stochastic_averaging_does_not():
    topology, oracle = digraph(8), LogisticOracle(scale=0.0)
    x0 = np.arange(8.0)[:, None] * np.ones(oracle.layout.d)
    trial = Trial(SGP(optimizer=PLAIN), topology, oracle=oracle, x0=x0)
    for _ in range(200):
        trial.step()
        close(trial.state.row.sum(0).numpy(), np.append(x0.sum(0), 8.0))
    np.testing.assert_allclose(trial.x, 3.5, atol=1e-12)

    adjacency = (matrix(topology) > 0).astype(float)
    plain = np.linalg.matrix_power(adjacency / adjacency.sum(1, keepdims=True), 200) @ x0
    assert abs(plain[0, 0] - 3.5) > 0.3


@pytest.mark.parametrize("topology", [digraph(8), switching_digraph(8)], ids=str)
def test_overlapped_sgp_follows_its_recursion_and_loses_no_mass(topology):
    trial = Trial(SGP(overlap=True, optimizer=PLAIN), topology)
    d = trial.oracle.layout.d
    row = np.concatenate([np.repeat(start(trial.oracle), 8, axis=0), np.ones((8, 1))], axis=1)
    travelling = np.zeros_like(row)
    for k in range(20):
        P, P_next = matrix(topology, k), matrix(topology, k + 1)
        x, w = row[:, :d], row[:, d:]
        moved = np.concatenate([x - LR * trial.gradients(x / w, k), w], axis=1)
        row = np.diag(P_next)[:, None] * moved + (P - np.diag(np.diag(P))) @ travelling
        travelling = moved
        trial.step()
        close(trial.state.row.numpy(), row)
        on_the_way = (1 - np.diag(P_next))[:, None] * moved
        close((row + on_the_way).sum(0)[d], 8.0)


@pytest.mark.parametrize("topology", [digraph(8), switching_digraph(8)], ids=str)
def test_push_diging_follows_the_recursion_and_sum_y_is_sum_g(topology):
    trial = Trial(PushDIGing(optimizer=PLAIN), topology)
    u, v = np.repeat(start(trial.oracle), 8, axis=0), np.ones((8, 1))
    g = y = trial.gradients(u / v, 0)
    for k in range(30):
        P = matrix(topology, k)
        u, v = P @ (u - LR * y), P @ v
        g_old, g = g, trial.gradients(u / v, k + 1)
        y = P @ y + g - g_old
        trial.step()
        close(trial.x, u / v)
        close(trial.state.y.sum(0).numpy(), trial.state.g_old.sum(0).numpy())
    assert np.linalg.norm(trial.gradients(trial.x, 30).mean(0)) < 0.2


def test_push_sum_refuses_what_loses_mass():
    rows = Topology.static("rows", Round.from_matrix(matrix(digraph(8)).T))
    silent = Topology.static("cycle", Round.from_matrix(np.roll(np.eye(4), 1, axis=0)))
    for algorithm in (SGP(optimizer=PLAIN), PushDIGing(optimizer=PLAIN)):
        with pytest.raises(ConfigError, match="row-stochastic"):
            algorithm.adapt(rows)
        with pytest.raises(ConfigError, match="rank 0 keeps nothing"):
            algorithm.adapt(silent)
