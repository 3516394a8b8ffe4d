"""GT-HSGD, DAMSGrad, and normalised methods, tracking or naive."""

from __future__ import annotations

import numpy as np
from oracles_for_tests import (
    LR,
    PLAIN,
    Trial,
    close,
    matrix,
    start,
)

from gossamer.algorithms.decentralized.damsgrad import DAMSGrad
from gossamer.algorithms.decentralized.dnsgd import DNSGD
from gossamer.algorithms.decentralized.gradient_tracking import GradientTracking
from gossamer.algorithms.decentralized.gt_hsgd import GTHSGD
from gossamer.algorithms.decentralized.gt_nsgdm import GTNSGDm
from gossamer.algorithms.optimizers.sgd import SGD
from gossamer.topologies import build


def test_gt_hsgd_follows_the_recursion_and_mean_y_is_mean_v():
    beta, topology = 0.1, build("ring", 8)
    trial = Trial(GTHSGD(beta=beta, optimizer=PLAIN), topology, batch_size=3)
    W, x = matrix(topology), np.repeat(start(trial.oracle), 8, axis=0)
    v = trial.gradients(x, 0)
    y = W @ v
    for k in range(1, 20):
        x_old, x = x, W @ (x - LR * y)
        trial.step()
        close(trial.x, x)
        close(trial.state.y.mean(0).numpy(), trial.state.v.mean(0).numpy())
        v_old = v
        v = trial.gradients(x, k) + (1 - beta) * (v - trial.gradients(x_old, k))
        y = W @ (y + v - v_old)


def test_gt_hsgd_with_beta_one_is_gradient_tracking_with_fresh_samples():
    topology, optimizer = build("complete", 8), SGD(lr=LR, weight_decay=0.02)
    hsgd, tracking = (
        Trial(a, topology, batch_size=3)
        for a in (GTHSGD(beta=1.0, optimizer=optimizer), GradientTracking(optimizer=optimizer))
    )
    for _ in range(20):
        hsgd.step()
        tracking.step()
        close(hsgd.x, tracking.x)


def test_gt_hsgd_takes_its_first_estimate_from_several_batches_at_x0():
    algorithm = GTHSGD(initial_batches=4, optimizer=PLAIN)
    trial = Trial(algorithm, build("ring", 8), batch_size=3)
    x0 = trial.x
    trial.step(3)
    close(trial.x, x0)
    trial.step()
    assert (trial.x != x0).any()
    close(trial.state.v.numpy(), np.mean([trial.gradients(x0, k) for k in range(4)], axis=0))


def test_damsgrad_follows_the_recursion_and_sum_ut_is_sum_vh():
    lr, eps, topology = 0.05, 1e-6, build("ring", 8)
    trial = Trial(DAMSGrad(optimizer=SGD(lr=lr)), topology, batch_size=3)
    W, x = matrix(topology), np.repeat(start(trial.oracle), 8, axis=0)
    m = v = vh = np.zeros_like(x)
    for k in range(20):
        g = trial.gradients(x, k)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        vh_old, vh = vh, np.maximum(vh, v)
        if k == 0:
            ut = vh_old = vh
        x = W @ x - lr * m / np.sqrt(np.maximum(ut, eps))
        ut = W @ (ut + vh - vh_old)
        trial.step()
        close(trial.x, x)
        close(trial.state.ut.sum(0).numpy(), trial.state.vh.sum(0).numpy())


def unit(v: np.ndarray) -> np.ndarray:
    return v / np.linalg.norm(v, axis=1, keepdims=True)


def test_naive_dnsgd_follows_the_recursion():
    topology = build("ring", 8)
    trial = Trial(DNSGD(optimizer=PLAIN), topology)
    x = np.repeat(start(trial.oracle), 8, axis=0)
    for k in range(20):
        x = matrix(topology) @ (x - LR * unit(trial.gradients(x, k)))
        trial.step()
        close(trial.x, x)


def test_gt_nsgdm_follows_the_recursion_and_mean_y_is_mean_m():
    alpha, topology = 0.2, build("ring", 8)
    trial = Trial(GTNSGDm(alpha=alpha, optimizer=SGD(lr=0.05)), topology, batch_size=3)
    W, x = matrix(topology), np.repeat(start(trial.oracle), 8, axis=0)
    m = y = np.zeros_like(x)
    for k in range(20):
        m_old, m = m, (1 - alpha) * m + alpha * trial.gradients(x, k)
        y = W @ (y + m - m_old)
        x = W @ (x - 0.05 * unit(y))
        trial.step()
        close(trial.x, x)
        close(trial.state.y.mean(0).numpy(), trial.state.m.mean(0).numpy())
