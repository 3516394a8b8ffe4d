"""AD-PSGD replayed: pair averages one after the other, stale gradients."""

from __future__ import annotations

import numpy as np
import pytest
from oracles_for_tests import (
    LR,
    PLAIN,
    Trial,
    close,
    matrix,
    start,
)

from gossamer.algorithms.decentralized.ad_psgd import ADPSGD, PairAverages
from gossamer.runtime import ConfigError
from gossamer.topologies import build


@pytest.mark.parametrize("graph", ["ring", "hypercube", "star"])
@pytest.mark.parametrize("slowest", [1, 4])
def test_ad_psgd_replays_pair_averages_one_after_the_other(graph, slowest):
    trial = Trial(ADPSGD(slowest=slowest, optimizer=PLAIN), build(graph, 8))
    events = trial.comm.topology
    edges = matrix(build(graph, 8)) > 0
    x = np.repeat(start(trial.oracle), 8, axis=0)
    read, averages = x.copy(), np.zeros(8)
    for t in range(12):
        g, done = trial.gradients(read, t), events.finished(t)
        for i, j in events.pairs(t):
            assert edges[i, j]
            assert done[i]
            x[[i, j]] = (x[i] + x[j]) / 2
            averages[[i, j]] += 1
        x -= LR * g * done[:, None]
        figures = trial.step()
        close(trial.x, x)
        assert (figures["staleness"].numpy() == averages).all()
        read[done], averages[done] = x[done], 0
        W = matrix(events, t)
        assert (W.sum(0) == 1).all()
        assert (W.sum(1) == 1).all()
    assert slowest == 1 or not all(events.finished(t).all() for t in range(4))


def test_ad_psgd_meets_every_neighbour_in_the_long_run():
    events = ADPSGD(optimizer=PLAIN).adapt(build("ring", 8))
    met = {pair for t in range(60) for pair in events.pairs(t)}
    assert met == {(i, j % 8) for i in (0, 2, 4, 6) for j in (i - 1, i + 1)}


def test_ad_psgd_refuses_odd_cycles_and_schedules():
    algorithm = ADPSGD(optimizer=PLAIN)
    with pytest.raises(ConfigError, match="bipartite"):
        algorithm.adapt(build("ring", 5))
    with pytest.raises(ConfigError, match="changes over time"):
        algorithm.adapt(build("one_peer_hypercube", 8))
    assert isinstance(algorithm.adapt(build("ring", 1)), PairAverages)
