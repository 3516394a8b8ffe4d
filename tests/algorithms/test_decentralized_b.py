"""Push-sum, compression, local steps, variance reduction, adaptive and normalised peers."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles_for_tests import (
    LogisticOracle,
    Trial,
    digraph,
    matrix,
    start,
    switching_digraph,
)

from gossamer.algorithms.decentralized.ad_psgd import ADPSGD, PairAverages
from gossamer.algorithms.decentralized.all_reduce import AllReduce
from gossamer.algorithms.decentralized.choco import Choco
from gossamer.algorithms.decentralized.damsgrad import DAMSGrad
from gossamer.algorithms.decentralized.deepsqueeze import DeepSqueeze
from gossamer.algorithms.decentralized.diloco import DiLoCo
from gossamer.algorithms.decentralized.dnsgd import DNSGD
from gossamer.algorithms.decentralized.dsgd import DSGD
from gossamer.algorithms.decentralized.gradient_tracking import GradientTracking
from gossamer.algorithms.decentralized.gt_hsgd import GTHSGD
from gossamer.algorithms.decentralized.gt_nsgdm import GTNSGDm
from gossamer.algorithms.decentralized.local_sgd import LocalSGD
from gossamer.algorithms.decentralized.push_diging import PushDIGing
from gossamer.algorithms.decentralized.sgp import SGP
from gossamer.algorithms.decentralized.slowmo import SlowMo
from gossamer.algorithms.optimizers.adam import AdamW
from gossamer.algorithms.optimizers.sgd import SGD, Momentum
from gossamer.algorithms.registry import find
from gossamer.runtime import ConfigError
from gossamer.runtime.state import flatten, restore
from gossamer.runtime.transports.torch_distributed import GlooTransport
from gossamer.topologies import Round, Topology, build

TOLERANCE = 1e-12  # float64, a few dozen steps, sums in another order than the reference's
LR = 0.3

SGD_ = SGD(lr=LR)
MOMENTUM = Momentum(lr=LR, beta=0.9, nesterov=True)

ALGORITHMS = {
    "sgp": SGP(optimizer=MOMENTUM),
    "osgp": SGP(overlap=True, optimizer=SGD_),
    "push-diging": PushDIGing(optimizer=SGD(lr=LR, weight_decay=0.01)),
    "choco-a": Choco(order="A", compressor="sign", gamma=0.4, optimizer=SGD_),
    "choco-b": Choco(compressor={"name": "random_k", "ratio": 0.5}, optimizer=MOMENTUM),
    "choco-qsgd": Choco(compressor="qsgd", gamma=0.6, optimizer=SGD_),
    "deepsqueeze": DeepSqueeze(compressor={"name": "top-k", "k": 2}, optimizer=SGD_),
    "local-sgd": LocalSGD(local_steps=3, optimizer=SGD_),
    "slowmo": SlowMo(tau=3, optimizer=MOMENTUM),
    "slowmo-gossip": SlowMo(tau=3, base="gossip", optimizer=SGD_),
    "diloco": DiLoCo(local_steps=3, optimizer=AdamW(lr=0.01)),
    "gt-hsgd": GTHSGD(initial_batches=2, optimizer=SGD(lr=LR, weight_decay=0.01)),
    "damsgrad": DAMSGrad(optimizer=SGD(lr=0.05)),
    "ad-psgd": ADPSGD(slowest=3, optimizer=SGD_),
    "dnsgd": DNSGD(optimizer=SGD_),
    "gt-nsgdm": GTNSGDm(optimizer=SGD_),
}
OUTER = ("slowmo", "slowmo-gossip", "diloco")
every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)


def close(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)


# --- push-sum -------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", [digraph(8), switching_digraph(8)], ids=str)
def test_sgp_follows_the_recursion_on_directed_graphs(topology):
    trial = Trial(SGP(optimizer=SGD_), topology)
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
    sgp = Trial(SGP(optimizer=SGD_), build(topology, 8))
    dsgd = Trial(DSGD(optimizer=SGD_), build(topology, 8))
    for _ in range(30):
        sgp.step()
        dsgd.step()
    close(sgp.x, dsgd.x)
    close(sgp.state.row[:, -1].numpy(), np.ones(8))


def test_push_sum_finds_the_mean_where_row_stochastic_averaging_does_not():
    topology, oracle = digraph(8), LogisticOracle(scale=0.0)
    x0 = np.arange(8.0)[:, None] * np.ones(oracle.layout.d)
    trial = Trial(SGP(optimizer=SGD_), topology, oracle=oracle, x0=x0)
    for _ in range(200):
        trial.step()
        close(trial.state.row.sum(0).numpy(), np.append(x0.sum(0), 8.0))
    np.testing.assert_allclose(trial.x, 3.5, atol=1e-12)

    adjacency = (matrix(topology) > 0).astype(float)
    plain = np.linalg.matrix_power(adjacency / adjacency.sum(1, keepdims=True), 200) @ x0
    assert abs(plain[0, 0] - 3.5) > 0.3


@pytest.mark.parametrize("topology", [digraph(8), switching_digraph(8)], ids=str)
def test_overlapped_sgp_follows_its_recursion_and_loses_no_mass(topology):
    trial = Trial(SGP(overlap=True, optimizer=SGD_), topology)
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
    trial = Trial(PushDIGing(optimizer=SGD_), topology)
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
    for algorithm in (SGP(optimizer=SGD_), PushDIGing(optimizer=SGD_)):
        with pytest.raises(ConfigError, match="row-stochastic"):
            algorithm.adapt(rows)
        with pytest.raises(ConfigError, match="rank 0 keeps nothing"):
            algorithm.adapt(silent)


# --- compression ----------------------------------------------------------------------------


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
    trial = Trial(Choco(order=order, compressor=compressor, gamma=gamma, optimizer=SGD_), topology)
    W, x = matrix(topology), np.repeat(start(trial.oracle), 8, axis=0)
    h = np.zeros_like(x)
    for k in range(15):
        x = x - LR * trial.gradients(x, k)
        if order == "A":
            h = h + compressed(compressor["name"], trial.oracle, x - h)
        x, h_old = x + gamma * (W @ h - h), h
        if order == "B":
            h = h_old + compressed(compressor["name"], trial.oracle, x - h_old)
        trial.step()
        close(trial.x, x)
        close(trial.state.s.numpy(), W @ trial.state.h.numpy())


@pytest.mark.parametrize("compressor", ["random-k", "qsgd"])
def test_choco_keeps_the_mean_and_its_running_sum_with_random_compressors(compressor):
    topology = build("ring", 8)
    trial = Trial(Choco(compressor=compressor, optimizer=SGD_), topology)
    for k in range(15):
        before = trial.x
        trial.step()
        close(trial.x.mean(0), before.mean(0) - LR * trial.gradients(before, k).mean(0))
        close(trial.state.s.numpy(), matrix(topology) @ trial.state.h.numpy())


def test_choco_a_with_identity_and_gamma_one_is_dsgd():
    identity = Choco(order="A", compressor="identity", gamma=1.0, optimizer=MOMENTUM)
    choco, dsgd = (Trial(a, build("ring", 8)) for a in (identity, DSGD(optimizer=MOMENTUM)))
    for _ in range(20):
        choco.step()
        dsgd.step()
        close(choco.x, dsgd.x)


def test_choco_refuses_schedules_and_unbiased_compressors():
    with pytest.raises(ConfigError, match="changes over time"):
        Choco(optimizer=SGD_).adapt(build("one_peer_exponential", 8))
    with pytest.raises(ValueError, match="needs a contraction"):
        Choco(compressor={"name": "qsgd", "unbiased": True}, optimizer=SGD_)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda c: c["name"])
def test_deepsqueeze_follows_the_recursion_on_a_changing_graph(compressor):
    gamma, topology = 0.3, build("one_peer_exponential", 8)
    trial = Trial(DeepSqueeze(compressor=compressor, gamma=gamma, optimizer=SGD_), topology)
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


# --- local steps ----------------------------------------------------------------------------


@pytest.mark.parametrize("graph", ["ring", "complete"])
def test_local_sgd_averages_after_k_local_steps(graph):
    topology = build(graph, 8)
    trial = Trial(LocalSGD(local_steps=4, optimizer=SGD_), topology, batch_size=5)
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
    algorithm = SlowMo(tau=tau, alpha=alpha, beta=beta, base=base, optimizer=SGD_)
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
    slowmo = Trial(SlowMo(tau=3, beta=0.0, optimizer=SGD_), build("ring", 8))
    fedavg = Trial(LocalSGD(local_steps=3, optimizer=SGD_), build("complete", 8))
    slowmo.step(8)
    fedavg.step(8)
    close(slowmo.x, fedavg.x)


def test_diloco_follows_nesterov_momentum_on_the_outer_gradient():
    trial = Trial(DiLoCo(local_steps=3, optimizer=SGD_), build("ring", 8))
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


# --- tracking, adaptive, normalised ---------------------------------------------------------


def test_gt_hsgd_follows_the_recursion_and_mean_y_is_mean_v():
    beta, topology = 0.1, build("ring", 8)
    trial = Trial(GTHSGD(beta=beta, optimizer=SGD_), topology, batch_size=3)
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
    algorithm = GTHSGD(initial_batches=4, optimizer=SGD_)
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
    trial = Trial(DNSGD(optimizer=SGD_), topology)
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


# --- AD-PSGD --------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", ["ring", "hypercube", "star"])
@pytest.mark.parametrize("slowest", [1, 4])
def test_ad_psgd_replays_pair_averages_one_after_the_other(graph, slowest):
    trial = Trial(ADPSGD(slowest=slowest, optimizer=SGD_), build(graph, 8))
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
    events = ADPSGD(optimizer=SGD_).adapt(build("ring", 8))
    met = {pair for t in range(60) for pair in events.pairs(t)}
    assert met == {(i, j % 8) for i in (0, 2, 4, 6) for j in (i - 1, i + 1)}


def test_ad_psgd_refuses_odd_cycles_and_schedules():
    algorithm = ADPSGD(optimizer=SGD_)
    with pytest.raises(ConfigError, match="bipartite"):
        algorithm.adapt(build("ring", 5))
    with pytest.raises(ConfigError, match="changes over time"):
        algorithm.adapt(build("one_peer_hypercube", 8))
    assert isinstance(algorithm.adapt(build("ring", 1)), PairAverages)


# --- every algorithm ------------------------------------------------------------------------


@every_algorithm
def test_the_registry_knows_it(name):
    algorithm = ALGORITHMS[name]
    assert find("algorithm", algorithm.name) is type(algorithm)


@every_algorithm
def test_averaging_keeps_the_mean_when_the_gradient_is_zero(name):
    oracle = LogisticOracle(scale=0.0)
    x0 = np.random.default_rng(0).normal(size=(8, oracle.layout.d))
    x0[:, [i for i in range(oracle.layout.d) if i not in oracle.used]] = 0
    algorithm = ALGORITHMS[name].model_copy(update={"optimizer": SGD_})
    trial = Trial(algorithm, build("ring", 8), oracle=oracle, x0=x0)
    if name in OUTER:  # which presume equal rows
        trial.state.x_outer[:] = torch.from_numpy(x0.mean(0))
    trial.step(6)
    if name == "osgp":  # two thirds of what was sent last are on their way
        close((trial.state.row + trial.state.sent * (2 / 3))[:, :-1].mean(0).numpy(), x0.mean(0))
    else:
        close(trial.x.mean(0), x0.mean(0))


@every_algorithm
@pytest.mark.parametrize("n", [1, 2])
def test_one_and_two_ranks_and_zero_gradients_give_numbers(name, n):
    for scale in (1.0, 0.0):
        oracle = LogisticOracle(scale=scale)
        trial = Trial(ALGORITHMS[name], build("ring", n), oracle=oracle)
        trial.step(4)
        assert np.isfinite(trial.x).all()
        zero = Trial(
            ALGORITHMS[name], build("ring", n), oracle=oracle, x0=np.zeros((1, oracle.layout.d))
        )
        zero.step(4)
        assert np.isfinite(zero.x).all()
        if scale == 0.0:
            assert (zero.x == 0).all()


@every_algorithm
def test_a_run_resumed_from_its_state_continues_to_the_bit(name):
    def trial() -> Trial:
        return Trial(ALGORITHMS[name], build("ring", 8), batch_size=3)

    whole, first, second = trial(), trial(), trial()
    whole.step(7)
    first.step(4)
    tensors, scalars = flatten(first.state)
    restore(second.state, {k: v.clone() for k, v in tensors.items()}, scalars)
    second.comm.step, second.comm.round = first.comm.step, first.comm.round
    second.step(3)
    assert (second.x == whole.x).all()


@pytest.mark.parametrize("name", ["sgp", "local-sgd", "choco-a", "slowmo-gossip", "diloco"])
def test_on_the_complete_graph_it_is_all_reduce_sgd(name):
    algorithm = {
        "sgp": SGP(optimizer=SGD_),
        "local-sgd": LocalSGD(local_steps=1, optimizer=SGD_),
        "choco-a": Choco(order="A", compressor="identity", gamma=1.0, optimizer=SGD_),
        "slowmo-gossip": SlowMo(tau=1, beta=0.0, base="gossip", optimizer=SGD_),
        "diloco": DiLoCo(local_steps=1, outer_lr=1.0, outer_momentum=0.0, optimizer=SGD_),
    }[name]
    trial, reference = (
        Trial(a, build("complete", 8), batch_size=3) for a in (algorithm, AllReduce(optimizer=SGD_))
    )
    trial.step(50)
    reference.step(50)
    close(trial.x, reference.x)


def digests(trial: Trial) -> list[str]:
    trial.step(6)
    return [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in trial.state.x]


def all_digests(transport: object) -> dict[str, list[str]]:
    torch.set_num_threads(1)
    found = {}
    for name, algorithm in ALGORITHMS.items():
        oracle = LogisticOracle(dtype="float32")
        graph = digraph(8) if name in ("sgp", "osgp", "push-diging") else build("ring", 8)
        found[name] = digests(
            Trial(algorithm, graph, oracle=oracle, batch_size=3, transport=transport)
        )
    return found


def one_process(rank: int, processes: int, folder: Path) -> None:
    rendezvous = f"file://{folder}/rendezvous"
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), GOSSAMER_RENDEZVOUS=rendezvous)
    transport = GlooTransport(100.0)
    lines = [
        f"{name} {rank} {digest}"
        for name, rows in all_digests(transport).items()
        for digest in rows
    ]
    (folder / f"rank{rank}").write_text("\n".join(lines))
    transport.close()


@pytest.mark.timeout(120)
def test_eight_ranks_give_the_same_bits_in_one_process_and_each_alone(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gossamer.algorithms.decentralized.ad_psgd", "networkx"])
    children = [context.Process(target=one_process, args=(r, 8, tmp_path)) for r in range(8)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 8
    alone: dict[str, list[str]] = {name: [] for name in ALGORITHMS}
    for rank in range(8):
        for line in (tmp_path / f"rank{rank}").read_text().splitlines():
            name, _, digest = line.split()
            alone[name].append(digest)
    assert alone == all_digests(None)
