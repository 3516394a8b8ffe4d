"""The deterministic training run of the specification, in plain numpy.

Wine, one class against the others, sorted by label over six ranks, logistic loss, 60 steps of
adapt-then-combine. The same figures must come out of every transport.
"""

import numpy as np
import pytest
from sklearn.datasets import load_wine

from gossamer.topologies import build

RANKS, STEPS, RATE = 6, 60, 0.1
FIGURES = {  # topology: mean loss at the mean row, root mean square distance to it
    ("ring", 0): (0.166388171592, 0.047717939415),
    ("star", 0): (0.172781489630, 0.099397564150),
    ("exponential", 0): (0.159942756193, 0.010684357348),
    ("one_peer_exponential", 0): (0.163400238244, 0.029182263886),
    ("base", 1): (0.164957150788, 0.021298800918),
    ("base", 2): (0.161666884747, 0.007722537856),
    ("complete", 0): (0.159564909304, 0.0),
}


def shards():
    data = load_wine()
    x = (data.data - data.data.mean(0)) / data.data.std(0)
    x = np.hstack([x, np.ones((len(x), 1))])
    y = np.where(data.target == 0, 1.0, -1.0)
    order = np.argsort(y, kind="stable")
    return list(zip(np.array_split(x[order], RANKS), np.array_split(y[order], RANKS), strict=True))


def loss(w, x, y):
    return np.logaddexp(0, -y * (x @ w)).mean() + 0.005 * w @ w


def gradient(w, x, y):
    return x.T @ (-y / (1 + np.exp(y * (x @ w)))) / len(y) + 0.01 * w


@pytest.mark.parametrize(("name", "k"), FIGURES)
def test_sixty_steps_give_the_recorded_figures(name, k):
    topology = build(name, RANKS, **({"k": k} if k else {}))
    data = shards()
    rows = np.zeros((RANKS, data[0][0].shape[1]))
    for t in range(STEPS):
        gradients = np.stack([gradient(w, *shard) for w, shard in zip(rows, data, strict=True)])
        rows = topology.round(t).apply(rows - RATE * gradients)
    mean = rows.mean(0)
    distance = np.sqrt(((rows - mean) ** 2).sum() / RANKS)
    expected_loss, expected_distance = FIGURES[name, k]
    assert np.mean([loss(mean, *shard) for shard in data]) == pytest.approx(expected_loss, abs=1e-9)
    assert distance == pytest.approx(expected_distance, abs=1e-9)
