"""Local SGD, SlowMo and DiLoCo."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles_for_tests import (
    LR,
    MOMENTUM,
    PLAIN,
    Trial,
    close,
    matrix,
    start,
)

from gossamer.algorithms.decentralized.diloco import DiLoCo
from gossamer.algorithms.decentralized.dsgd import DSGD
from gossamer.algorithms.decentralized.local_sgd import LocalSGD
from gossamer.algorithms.decentralized.slowmo import SlowMo
from gossamer.topologies import build


@pytest.mark.parametrize("graph", ["ring", "complete"])
def test_local_sgd_averages_after_k_local_steps(graph):
    topology = build(graph, 8)
    trial = Trial(LocalSGD(local_steps=4, optimizer=PLAIN), topology, batch_size=5)
    x = np.repeat(start(trial.oracle), 8, axis=0)
    for k in range(10):
        for draw in range(4):
            x = x - LR * trial.gradients(x, k, draw)
        x = matrix(topology) @ x
        trial.step()
        close(trial.x, x)


def test_local_sgd_with_one_local_step_is_dsgd():
    local, dsgd = (
        Trial(a, build("ring", 8))
        for a in (LocalSGD(local_steps=1, optimizer=MOMENTUM), DSGD(optimizer=MOMENTUM))
    )
    local.step(10)
    dsgd.step(10)
    assert (local.x == dsgd.x).all()


@pytest.mark.parametrize("base", ["local", "gossip"])
def test_slowmo_follows_the_recursion(base):
    tau, alpha, beta, topology = 3, 0.9, 0.5, build("ring", 8)
    algorithm = SlowMo(tau=tau, alpha=alpha, beta=beta, base=base, optimizer=PLAIN)
    trial = Trial(algorithm, topology)
    x = np.repeat(start(trial.oracle), 8, axis=0)
    outer, u = x.copy(), np.zeros_like(x)
    for _ in range(4):
        for _ in range(tau):
            x = x - LR * trial.gradients(x, 0)
            x = matrix(topology) @ x if base == "gossip" else x
        u = beta * u + (outer - x.mean(0)) / LR
        outer = outer - alpha * LR * u
        x = outer
        trial.step(1 if base == "local" else tau)
        close(trial.x, x)


def test_slowmo_without_momentum_is_local_sgd_on_the_complete_graph():
    slowmo = Trial(SlowMo(tau=3, beta=0.0, optimizer=PLAIN), build("ring", 8))
    fedavg = Trial(LocalSGD(local_steps=3, optimizer=PLAIN), build("complete", 8))
    slowmo.step(8)
    fedavg.step(8)
    close(slowmo.x, fedavg.x)


def test_diloco_follows_nesterov_momentum_on_the_outer_gradient():
    trial = Trial(DiLoCo(local_steps=3, optimizer=PLAIN), build("ring", 8))
    outer = np.repeat(start(trial.oracle), 8, axis=0)
    torch_outer = torch.from_numpy(outer[0].copy()).requires_grad_()
    nesterov = torch.optim.SGD([torch_outer], lr=0.7, momentum=0.9, nesterov=True)
    for _ in range(8):
        x = np.repeat(torch_outer.detach().numpy()[None], 8, axis=0)
        for _ in range(3):
            x = x - LR * trial.gradients(x, 0)
        torch_outer.grad = torch_outer.detach() - torch.from_numpy(x.mean(0))
        nesterov.step()
        trial.step()
        close(trial.x, np.repeat(torch_outer.detach().numpy()[None], 8, axis=0))
