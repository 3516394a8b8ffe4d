"""CHOCO-SGD and DeepSqueeze against copies per neighbour."""

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
    matrix,
    start,
)

from gossamer.algorithms.decentralized.choco import Choco
from gossamer.algorithms.decentralized.deepsqueeze import DeepSqueeze
from gossamer.algorithms.decentralized.dsgd import DSGD
from gossamer.runtime import ConfigError
from gossamer.runtime.component import validate
from gossamer.topologies import build


def compressed(name: str, oracle: LogisticOracle, v: np.ndarray) -> np.ndarray:
    """Apply a deterministic compressor tensor by tensor, the slow way."""
    out = np.zeros_like(v)
    for s in oracle.layout.slices:
        for i, part in enumerate(v[:, s.begin : s.end]):
            if name == "sign":
                q = np.where(part < 0, -1, 1) * np.abs(part).mean()
            elif name == "top-k":
                q = np.where(np.abs(part) >= np.sort(np.abs(part))[-2], part, 0)
            else:
                q = part
            out[i, s.begin : s.end] = q
    return out


COMPRESSORS = [{"name": "sign"}, {"name": "top-k", "k": 2}, {"name": "identity"}]


@pytest.mark.parametrize("order", ["A", "B"])
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda c: c["name"])
def test_choco_follows_the_recursion_with_a_copy_per_neighbour(order, compressor):
    gamma, topology = 0.4, build("ring", 8)
    trial = Trial(Choco(order=order, compressor=compressor, gamma=gamma, optimizer=PLAIN), topology)
    W, x = matrix(topology), np.repeat(start(trial.oracle), 8, axis=0)
    h = np.zeros_like(x)
    own = np.diag(np.diag(W))
    for k in range(15):
        x = x - LR * trial.gradients(x, k)
        if order == "A":
            h = h + compressed(compressor["name"], trial.oracle, x - h)
        x, h_old = x + gamma * (W @ h - h), h
        if order == "B":
            h = h_old + compressed(compressor["name"], trial.oracle, x - h_old)
        trial.step()
        close(trial.x, x)
        on_its_way = 0 if order == "A" else (W - own) @ (h - h_old)
        close(trial.state.s.numpy(), W @ trial.state.h.numpy() - on_its_way)


@pytest.mark.parametrize("order", ["A", "B"])
@pytest.mark.parametrize("compressor", ["random-k", "qsgd"])
def test_choco_keeps_the_mean_and_its_running_sum_with_random_compressors(compressor, order):
    topology = build("ring", 8)
    trial = Trial(Choco(compressor=compressor, order=order, optimizer=PLAIN), topology)
    W, state = matrix(topology), trial.state
    for k in range(15):
        before, h_old = trial.x, state.h.numpy().copy()
        trial.step()
        close(trial.x.mean(0), before.mean(0) - LR * trial.gradients(before, k).mean(0))
        h = state.h.numpy()
        on_its_way = 0 if order == "A" else (W - np.diag(np.diag(W))) @ (h - h_old)
        close(state.s.numpy(), W @ h - on_its_way)


def test_choco_a_with_identity_and_gamma_one_is_dsgd():
    identity = Choco(order="A", compressor="identity", gamma=1.0, optimizer=MOMENTUM)
    choco, dsgd = (Trial(a, build("ring", 8)) for a in (identity, DSGD(optimizer=MOMENTUM)))
    for _ in range(20):
        choco.step()
        dsgd.step()
        close(choco.x, dsgd.x)


def test_choco_refuses_schedules():
    with pytest.raises(ConfigError, match="changes over time"):
        Choco(optimizer=PLAIN).adapt(build("one_peer_exponential", 8))


@pytest.mark.parametrize("algorithm", [Choco, DeepSqueeze])
@pytest.mark.parametrize("compressor", ["qsgd", "random-k"])
def test_what_remembers_an_error_refuses_unbiased_compressors(algorithm, compressor):
    fields = {"compressor": {"name": compressor, "unbiased": True}, "optimizer": PLAIN}
    with pytest.raises(ConfigError, match=r"algorithm\.compressor: needs a contraction"):
        validate(algorithm, fields, "algorithm")


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda c: c["name"])
def test_deepsqueeze_follows_the_recursion_on_a_changing_graph(compressor):
    gamma, topology = 0.3, build("one_peer_exponential", 8)
    trial = Trial(DeepSqueeze(compressor=compressor, gamma=gamma, optimizer=PLAIN), topology)
    x = np.repeat(start(trial.oracle), 8, axis=0)
    e = np.zeros_like(x)
    for k in range(15):
        half = x - LR * trial.gradients(x, k)
        q = compressed(compressor["name"], trial.oracle, half + e)
        e = half + e - q
        x = half + gamma * (matrix(topology, k) @ q - q)
        trial.step()
        close(trial.x, x)
        close(trial.state.e.numpy(), e)
