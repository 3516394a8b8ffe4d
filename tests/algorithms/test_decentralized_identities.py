"""Exact identities of D-NASA and its synchronous baselines, in float64."""

import numpy as np
import pytest
import torch
from decentralized_cases import (
    CASES,
    DNASA_CASES,
    FALLING,
    SGD05,
    X0,
    D,
    advance,
    gradients,
    run,
    start,
)

from gossamer.algorithms.decentralized.all_reduce import AllReduce
from gossamer.algorithms.decentralized.d2 import D2, EDM
from gossamer.algorithms.decentralized.decentlam import DecentLaM
from gossamer.algorithms.decentralized.dnasa import DNASA
from gossamer.algorithms.decentralized.dsgd import DSGD
from gossamer.algorithms.decentralized.gradient_tracking import GradientTracking
from gossamer.algorithms.decentralized.kgt import KGT
from gossamer.algorithms.decentralized.momentum_tracking import MomentumTracking
from gossamer.algorithms.decentralized.quasi_global import QGDSGDm
from gossamer.algorithms.optimizers.adam import Adam
from gossamer.algorithms.optimizers.sgd import SGD, Momentum
from gossamer.runtime import row_norm
from gossamer.topologies import build

# --- D-NASA ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [o for o, _ in DNASA_CASES.values() if "weight_decay" not in o])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dnasa_is_bitwise_invariant_to_powers_of_two_of_the_loss(options, dtype):
    one, two, three = (
        run(DNASA(**options), build("ring", 8), 30, scale=scale, dtype=dtype)[0][-1]
        for scale in (1.0, 2.0**-7, 2.0**20)
    )
    assert torch.equal(one, two)
    assert torch.equal(one, three)
    other = run(DNASA(**options), build("ring", 8), 30, scale=1000.0, dtype=torch.float64)[0][-1]
    if dtype == torch.float64:
        assert (other - one).abs().max() <= 1e-12


@pytest.mark.parametrize("schedule", ["constant", "diminishing"])
def test_dnasa_moves_by_gamma_and_keeps_consensus_within_its_recursion(schedule):
    topology = build("ring", 8)
    W = topology.round(0).matrix()
    rho = np.linalg.norm(W - 1 / 8, 2)
    algorithm = DNASA(schedule=schedule)
    comm, state = start(algorithm, topology, steps=40)
    error, gammas, x0 = 0.0, 0.0, state.x.mean(0)
    for k in range(40):
        x, z = state.x.clone(), state.z.clone()
        _, gamma = algorithm._rates(comm)
        advance(algorithm, comm, state, 1)
        if k > 0:  # z = 0 before the first step, which moves nothing
            half = np.linalg.solve(W, state.x.numpy())
            moved = torch.from_numpy(half) - x
            expected = torch.full((8, 1), gamma, dtype=torch.float64)
            torch.testing.assert_close(row_norm(moved), expected, rtol=0, atol=1e-12)
            assert torch.all((moved * z).sum(1) < 0)
            gammas += gamma
        else:
            torch.testing.assert_close(state.x, x, rtol=0, atol=1e-15)
        error = rho * (error + gamma * np.sqrt(8))
        assert (state.x - state.x.mean(0)).norm() <= error + 1e-12
        assert (state.x.mean(0) - x0).norm() <= gammas + 1e-12


def test_dnasa_averages_z_as_its_rule_says():
    algorithm = DNASA()
    comm, state = start(algorithm, build("star", 8))
    for k in range(10):
        alpha, _ = algorithm._rates(comm)
        v, before = gradients(8)(state.x.numpy(), k), state.z.mean(0).numpy()
        advance(algorithm, comm, state, 1)
        after = (1 - alpha) * before + alpha * v.mean(0)
        np.testing.assert_allclose(state.z.mean(0).numpy(), after, rtol=0, atol=1e-12)


def test_dnasa_on_the_complete_graph_is_centralised_normalised_momentum():
    rows, _ = run(DNASA(), build("complete", 8), 20)
    x, z, G = X0.copy(), np.zeros(D), gradients(8)
    for k in range(20):
        alpha, gamma = min(1, np.sqrt(8 / (k + 1))), min(1, 8**0.25 / (k + 1) ** 0.75)
        g = G(np.tile(x, (8, 1)), k).mean(0)
        x = x - gamma * z / max(np.linalg.norm(z), 1e-30)
        z = (1 - alpha) * z + alpha * g
    np.testing.assert_allclose(rows[-1].numpy(), np.tile(x, (8, 1)), rtol=0, atol=1e-12)


def test_dnasa_hands_its_direction_to_an_optimizer():
    plain, _ = run(DNASA(), build("ring", 4), 10)
    fed, _ = run(DNASA(optimizer=SGD(lr=1.0)), build("ring", 4), 10)
    torch.testing.assert_close(plain[-1], fed[-1], rtol=0, atol=1e-14)
    adam, state = run(DNASA(optimizer=Adam(lr=0.1)), build("ring", 4), 10)
    assert state.optimizer.t == 10
    assert not torch.allclose(plain[-1], adam[-1])


def test_dnasa_warns_of_rows_too_coarse_for_its_late_steps(caplog):
    run(DNASA(), build("ring", 4), 1, dtype=torch.bfloat16)
    assert "float32" in caplog.text
    caplog.clear()
    run(DNASA(), build("ring", 4), 1, dtype=torch.float32)
    assert not caplog.records


# --- the others -----------------------------------------------------------------------------

MEAN_RULES = {
    name: CASES[name][0] for name in CASES
    if name in ("all-reduce", "dsgd", "dsgd-cta", "gradient-tracking", "gradient-tracking-cta",
                "d2", "d2-never", "extra", "mt-dsgt", "official-dsgd", "official-dsgt")
} | {
    "k-gt": KGT(optimizer=SGD05, local_steps=1),
    "qg": QGDSGDm(optimizer=SGD05, beta=0.0),
    "decentlam": DecentLaM(optimizer=SGD05, beta=0.0),
    "momentum-tracking": MomentumTracking(optimizer=SGD05, beta=0.0),
    "edm": EDM(optimizer=SGD05, beta=0.0),
}  # fmt: skip


@pytest.mark.parametrize("name", MEAN_RULES)
@pytest.mark.parametrize("warmup", [0, 4])
def test_the_mean_row_follows_the_mean_gradient(name, warmup):
    algorithm = MEAN_RULES[name]
    optimizer = algorithm.optimizer.model_copy(update={"warmup": warmup})
    algorithm = algorithm.model_copy(update={"optimizer": optimizer})
    comm, state = start(algorithm, algorithm.adapt(build("ring", 8)))
    share = 1 / 8 if name.startswith("official") else 1.0  # their losses carry a factor 1/n
    for k in range(10):
        x, lr = state.x.numpy().copy(), algorithm.optimizer.rate(comm) * share
        (after,) = advance(algorithm, comm, state, 1)
        expected = x.mean(0) - lr * gradients(8)(x, k).mean(0)
        np.testing.assert_allclose(after.mean(0).numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", ["atc", "cta"])
@pytest.mark.parametrize("graph", ["ring", "one_peer_exponential"])
def test_tracked_gradients_average_to_the_gradients(order, graph):
    algorithm = GradientTracking(optimizer=SGD05, order=order)
    comm, state = start(algorithm, build(graph, 8))
    for _ in range(12):
        advance(algorithm, comm, state, 1)
        torch.testing.assert_close(state.y.mean(0), state.g_old.mean(0), rtol=0, atol=1e-12)


def test_after_a_period_of_one_peer_exponential_every_rank_holds_the_mean_to_the_bit():
    topology = build("one_peer_exponential", 8)
    values = np.random.default_rng(0).integers(-9, 9, (8, D)).astype(float)
    algorithm = DSGD(optimizer=SGD05)
    comm, state = start(algorithm, topology, x0=values, noise=0)
    last = advance(algorithm, comm, state, 3, noise=0, scale=0.0)[-1]
    assert torch.equal(last, torch.from_numpy(values).mean(0).expand(8, D))


@pytest.mark.parametrize("algorithm", [KGT(optimizer=SGD05), MomentumTracking(optimizer=SGD05)])
def test_corrections_sum_to_zero(algorithm):
    _, state = run(algorithm, build("ring", 8), 20)
    assert state.c.abs().max() > 0.1
    assert state.c.sum(0).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("algorithm", "same"),
    [
        (DSGD(optimizer=SGD05), True),
        (GradientTracking(optimizer=SGD05), True),
        (D2(optimizer=SGD05, lazy="never"), True),
        (DSGD(optimizer=SGD05, order="cta"), False),
    ],
)
def test_on_the_complete_graph_adapt_first_methods_are_all_reduce_sgd(algorithm, same):
    complete = build("complete", 8)
    ours, _ = run(algorithm, complete, 300)
    reference, _ = run(AllReduce(optimizer=SGD05), complete, 300)
    difference = max((a - b).abs().max().item() for a, b in zip(ours, reference, strict=True))
    assert (difference < 1e-12) is same


@pytest.mark.parametrize("algorithm", [
    DSGD(optimizer=Momentum(lr=0.05, beta=0.0)),
    QGDSGDm(optimizer=SGD05, beta=0.0, mu=0.3),
    DecentLaM(optimizer=SGD05, beta=0.0),
])  # fmt: skip
def test_without_momentum_its_remedies_are_dsgd(algorithm):
    ours, _ = run(algorithm, build("torus", 8), 20)
    plain, _ = run(DSGD(optimizer=SGD05), build("torus", 8), 20)
    torch.testing.assert_close(ours[-1], plain[-1], rtol=0, atol=1e-12)


def test_edm_without_momentum_is_d2():
    topology = build("ring", 8)
    ours, _ = run(EDM(optimizer=FALLING, beta=0.0), topology.lazy(), 20)
    plain, _ = run(D2(optimizer=FALLING), topology.lazy(), 20)
    assert torch.equal(ours[-1], plain[-1])


def test_the_fixed_points_show_what_momentum_does_to_the_bias():
    ring = build("ring", 8)

    def limit(algorithm):
        return run(algorithm, ring, 800, noise=0.0)[0][-1]

    slow, fast = (limit(DSGD(optimizer=SGD(lr=lr))) for lr in (0.05, 0.25))
    heavy = limit(DSGD(optimizer=Momentum(lr=0.05, beta=0.8)))
    lam = limit(DecentLaM(optimizer=SGD(lr=0.05), beta=0.8))
    qg = limit(QGDSGDm(optimizer=SGD(lr=0.05), beta=0.8, mu=0.8))
    torch.testing.assert_close(heavy, fast, rtol=0, atol=1e-11)
    torch.testing.assert_close(lam, slow, rtol=0, atol=1e-11)
    torch.testing.assert_close(qg, slow, rtol=0, atol=1e-11)
