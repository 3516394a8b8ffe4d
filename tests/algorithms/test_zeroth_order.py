"""Estimates from losses: the formulas, the memory of parameters, who exchanges what."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from zeroth_order_problems import (
    N,
    advance,
    estimate_at,
    full,
    mean_of,
    network,
    program,
    quadratic,
    words,
)

from gossamer.algorithms.decentralized.dsgd import DSGD
from gossamer.algorithms.optimizers.adam import Adam, AdamW
from gossamer.algorithms.optimizers.sgd import SGD, Momentum, SignSGD
from gossamer.algorithms.tasks.arrays import TensorDataset
from gossamer.algorithms.zeroth_order.transient import TransientModule
from gossamer.algorithms.zeroth_order.zeroth_order import ZerothOrder
from gossamer.runtime import ConfigError, RowLayout
from gossamer.runtime.perturb import add_, direction_, perturb_

# --- the formulas -----------------------------------------------------------------------------


@pytest.mark.parametrize("restore", ["transient", "snapshot"])
def test_on_a_quadratic_two_losses_give_the_derivative_along_z(restore):
    problem, h = quadratic()
    run = program(problem, full(restore=restore))
    found, _ = estimate_at(run)
    x = run.layout.values(run.state.x[0])
    grad = (x - problem.train.tensors[0].mean(0)) @ h
    z = direction_(torch.zeros_like(run.state.x[0]), run.layout, run.oracle._directed.seed, 0, 0)
    slope = float(run.layout.values(z) @ grad)
    assert found.grad.coefficients.item() == pytest.approx(slope, rel=1e-9)
    assert torch.allclose(found.grad.dense()[0], slope * z, rtol=1e-9)


def test_on_a_quadratic_one_sided_losses_add_the_curvature_along_z():
    problem, h = quadratic()
    run = program(problem, full(estimate="one-sided", eps=1e-2))
    found, _ = estimate_at(run)
    x = run.layout.values(run.state.x[0])
    z = direction_(torch.zeros_like(run.state.x[0]), run.layout, run.oracle._directed.seed, 0, 0)
    z = run.layout.values(z)
    grad = (x - problem.train.tensors[0].mean(0)) @ h
    assert found.grad.coefficients.item() == pytest.approx(
        float(z @ grad + 0.005 * z @ h @ z), rel=1e-9
    )


def test_losses_approach_the_derivative_as_the_square_of_eps():
    slopes = {}
    for name, options in {
        "exact": {"estimate": "forward"},
        "far": {"eps": 1e-2},
        "near": {"eps": 1e-3},
    }.items():
        run = program(network(dtype=torch.float64), full(**options))
        slopes[name] = estimate_at(run)[0].grad.coefficients.item()
    far, near = (abs(slopes[name] - slopes["exact"]) for name in ("far", "near"))
    assert 50 < far / near < 200


@pytest.mark.parametrize(
    ("distribution", "q"), [("normal", 1), ("normal", 4), ("rademacher", 1), ("sphere", 4)]
)
def test_estimates_have_the_gradient_as_mean_and_the_stated_square(distribution, q):
    d, draws = 48, 800
    problem, h = quadratic(d)
    run = program(problem, full(distribution=distribution, queries=q))
    grad = (run.layout.values(run.state.x[0]) - problem.train.tensors[0].mean(0)) @ h
    rows = []
    for step in range(draws):
        run.comm.step = step
        rows.append(run.layout.values(estimate_at(run)[0].grad.dense()[0]))
    table = torch.stack(rows)
    error = table.std(0) / draws**0.5
    assert bool(((table.mean(0) - grad).abs() < 5 * error).all())
    squares = table.square().sum(1)
    factor = (d + (1 if distribution == "normal" else -1)) / q + 1
    expected = factor * float(grad @ grad)
    error = float(squares.std()) / draws**0.5
    assert abs(float(squares.mean()) - expected) < 5 * error < 0.5 * expected


def test_a_direction_on_the_sphere_is_as_long_as_the_root_of_d():
    run = program(network(dtype=torch.float64), full(distribution="sphere", coefficient="sign"))
    found = estimate_at(run)[0].grad.dense()[0]
    assert float(found.norm()) == pytest.approx(run.layout.size**0.5, rel=1e-6)


def test_estimates_of_sums_are_sums_of_estimates():
    run = program(network(n=2, dtype=torch.float64), full(queries=2))
    x, y = run.state.x, run.state.x + 0.1
    batch = run._sampler.batches(0, 1)[0]
    oracle = run.oracle

    def dense(points):
        oracle._calls = (-1, 0)
        return oracle(x, batch, combine=points).grad

    whole = dense([(1.0, x), (-0.5, y)])
    assert torch.allclose(whole, dense([(1.0, x)]) - 0.5 * dense([(1.0, y)]), atol=1e-12)


# --- parameters stay where they are -------------------------------------------------------------


@pytest.mark.parametrize("make", [network, words])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", [2**18, 16])
def test_layers_compute_at_moved_parameters_and_write_none(make, dtype, part, monkeypatch):
    """With a part of 16 elements every linear layer and embedding goes through in parts."""
    monkeypatch.setattr("gossamer.algorithms.zeroth_order.transient._PART", {"cpu": part})
    problem = make()
    problem.module.to(dtype).eval()
    inputs = tuple(t.to(dtype) if t.is_floating_point() else t for t in problem.examples(8))
    layout = RowLayout(problem.module)
    row = layout.gather(problem.module, torch.empty(layout.d, dtype=dtype))
    before = row.clone()
    layout.bind(problem.module, row)
    moved = TransientModule(problem.module, layout)
    z = (5, 0, 3, 0.1)
    with torch.no_grad():
        with moved.moved(lambda flat, pieces, source: add_(flat, pieces, *z, source=source)):
            found = problem.loss(problem.module, inputs)
        layout.bind(problem.module, perturb_(row.clone(), layout, *z))
        written = problem.loss(problem.module, inputs)
        layout.bind(problem.module, row)
        assert problem.loss(problem.module, inputs) != found
    rel = 1e-6 if dtype is torch.float32 else 1e-2
    assert float(found) == pytest.approx(float(written), rel=rel)
    assert torch.equal(row, before)
    assert not any(m._forward_hooks or "forward" in vars(m) for m in problem.module.modules())


def test_an_error_inside_leaves_the_module_as_it_was():
    problem = network()
    layout = RowLayout(problem.module)
    data = [p.data for p in problem.module.parameters()]
    moved = TransientModule(problem.module, layout)

    def fail(flat, pieces, source):
        if len(flat) == 3:  # the last bias
            raise ArithmeticError("on purpose")

    with pytest.raises(ArithmeticError), moved.moved(fail):
        problem.module(problem.examples(2)[0])
    assert all(
        p.data is d or p.data.data_ptr() == d.data_ptr()
        for p, d in zip(problem.module.parameters(), data, strict=True)
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in problem.module.modules())


def test_ten_thousand_estimates_leave_every_bit_of_a_16_bit_model():
    oracle = ZerothOrder(batch_size=4, eps=1e-2, restore="transient")
    run = program(network(dtype=torch.bfloat16), oracle)
    x = run.state.x
    before = x.clone()
    batches = run._sampler.batches(0, 1)[0]
    for _ in range(10_000):
        run.oracle.deferred(x, batches)
    assert torch.equal(x, before)


def test_a_penalty_on_parameters_is_seen_and_rows_are_copied_then(monkeypatch):
    monkeypatch.setattr("gossamer.algorithms.zeroth_order.losses._SMALL", 16)
    plain = program(network(), full())
    assert plain.oracle._beside.transient is not None
    run = program(network(l2=0.01), full())
    assert run.oracle._beside.transient is None
    exact = program(network(l2=0.01), full(estimate="forward"))
    found, expected = (estimate_at(r)[0].grad.coefficients.item() for r in (run, exact))
    assert found == pytest.approx(expected, rel=1e-2)
    with pytest.raises(ConfigError, match=r"oracle\.restore: .* use snapshot"):
        program(network(l2=0.01), full(restore="transient"))


def test_looking_for_a_penalty_leaves_every_bit():
    problem = network(dtype=torch.bfloat16, l2=0.01)
    before = [p.detach().clone() for p in problem.module.parameters()]
    layout = RowLayout(problem.module)
    inputs = problem.examples(8)
    problem.module.eval()
    moved = TransientModule(problem.module, layout)
    assert not moved.follows(lambda: problem.loss(problem.module, inputs).double().item())
    assert all(map(torch.equal, before, problem.module.parameters()))


def test_both_ways_to_move_parameters_give_the_same_estimate():
    runs = [program(network(), full(queries=3, restore=r)) for r in ("transient", "snapshot")]
    found = [estimate_at(run)[0].grad.coefficients for run in runs]
    assert torch.equal(*found)


def test_a_model_in_another_memory_format_is_looked_at_too():
    problem = network()
    inputs = torch.randn(N, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    problem.train = TensorDataset((inputs, problem.train.tensors[1]))
    layers = [nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(64, 3)]
    problem.module = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    run = program(problem, full(restore="transient"))
    other = program(problem, full(restore="snapshot"))
    found = [estimate_at(r)[0].grad.coefficients.item() for r in (run, other)]
    assert found[0] == pytest.approx(found[1], rel=1e-3)


# --- who exchanges what -------------------------------------------------------------------------


@pytest.mark.parametrize("directions", ["shared", "own"])
@pytest.mark.parametrize("n", [1, 3])
def test_ranks_exchange_eight_bytes_per_probe_and_stay_equal(directions, n):
    run = program(network(n=n), ZerothOrder(batch_size=4, queries=2, directions=directions))
    advance(run, 5)
    assert all(torch.equal(row, run.state.x[0]) for row in run.state.x)
    assert run.comm.traffic.bytes_sent.sum() == 5 * n * (n - 1) * 2 * 8


def test_own_directions_on_equal_data_are_one_rank_with_all_queries():
    one = network()
    same = replace(one, shards=(np.arange(N),) * 4)
    runs = [
        program(network(), full(queries=4)),
        program(same, full(directions="own"), n=4),
    ]
    for run in runs:
        advance(run, 6)
    assert torch.equal(runs[0].state.x[0], runs[1].state.x[0])


def test_shared_directions_on_shards_are_one_rank_on_all_examples():
    runs = [program(network(n=n, dtype=torch.float64), full()) for n in (1, 4)]
    for run in runs:
        advance(run, 6)
    apart = (runs[0].state.x[0] - runs[1].state.x[0]).abs().max()
    assert float(apart) <= 1e-12 * float(runs[0].state.x[0].abs().max())


def test_unequal_shards_weigh_by_their_examples():
    whole = network(dtype=torch.float64)
    uneven = replace(whole, shards=(np.arange(8), np.arange(8, N)), objective="examples")
    found = [
        mean_of(program(problem, full(), n=n)).coefficients[0].item()
        for problem, n in ((network(dtype=torch.float64), 1), (uneven, 2))
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-9)


@pytest.mark.parametrize("coefficient", ["value", "sign"])
@pytest.mark.parametrize("optimizer", [SGD(lr=0.01), Momentum(lr=0.01), Adam(lr=0.01)])
def test_a_loss_that_is_not_finite_on_one_rank_makes_all_skip_the_step(optimizer, coefficient):
    problem = network(n=3)
    bad = problem.shards[1]

    def loss(model, inputs, whole=problem.loss):
        value = whole(model, inputs)
        broken = torch.isin(inputs[0][:, 0], problem.train.tensors[0][bad, 0]).any()
        return value / 0 if broken and run is not None and run.comm.step == 2 else value

    run = None
    run = program(replace(problem, loss=loss), full(coefficient=coefficient), optimizer)
    advance(run, 2)
    before = run.state.x.clone()
    state = (
        [t.clone() for t in vars(run.state.optimizer).values() if isinstance(t, torch.Tensor)]
        if run.state.optimizer
        else []
    )
    assert run.step()["skipped"] == 1.0
    assert torch.equal(run.state.x, before)
    if run.state.optimizer is not None:
        now = [t for t in vars(run.state.optimizer).values() if isinstance(t, torch.Tensor)]
        assert all(map(torch.equal, state, now))
        assert getattr(run.state.optimizer, "t", 2) == 2
    run.comm.step += 1
    assert "skipped" not in run.step()
    assert not torch.equal(run.state.x, before)


def test_averaging_algorithms_take_the_estimate_as_a_row():
    run = program(network(n=4), full(), algorithm=DSGD(optimizer=SGD(lr=0.01)))
    other = program(network(n=4), full())
    before = run.state.x.clone()
    advance(run, 1)
    advance(other, 1)
    assert not torch.equal(run.state.x, before)
    assert torch.allclose(run.state.x.mean(0), other.state.x.mean(0), atol=1e-7)


# --- updates ------------------------------------------------------------------------------------

OPTIMIZERS = [
    SGD(lr=0.1, weight_decay=0.1),
    Momentum(lr=0.1),
    Momentum(lr=0.1, nesterov=True, weight_decay=0.1),
    Adam(lr=0.1),
    AdamW(lr=0.1),
    SignSGD(lr=0.1, weight_decay=0.1),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: f"{o.name}-{o.weight_decay}")
def test_an_update_in_parts_is_the_update_of_whole_rows(optimizer, monkeypatch):
    rows = [program(network(n=2), full(queries=2), optimizer) for _ in range(2)]
    monkeypatch.setattr("gossamer.algorithms.optimizers.base._COLUMNS", 16)
    advance(rows[0], 4)
    for _ in range(4):
        run = rows[1]
        mean = estimate_at(run)[0].grad.mean(run.comm).dense()
        optimizer.update_(run.state.optimizer, run.state.x, mean, run.comm)
        run.comm.step += 1
    assert torch.allclose(rows[0].state.x, rows[1].state.x, rtol=0, atol=1e-6)
    if optimizer.name != "sgd":  # which takes rows and parts in the same order of roundings
        assert torch.equal(rows[0].state.x, rows[1].state.x)


def test_scaling_the_loss_leaves_steps_along_signs_as_they_are():
    runs = []
    for scale in (1.0, 8.0):
        problem = network()
        scaled = replace(problem, loss=lambda m, i, s=scale, f=problem.loss: s * f(m, i))
        runs.append(advance(program(scaled, full(), SignSGD(lr=0.01)), 5))
    assert torch.equal(runs[0].state.x, runs[1].state.x)


def test_momentum_zero_is_sgd():
    runs = [program(network(), full(), o) for o in (SGD(lr=0.01), Momentum(lr=0.01, beta=0.0))]
    for run in runs:
        advance(run, 5)
    assert torch.allclose(runs[0].state.x, runs[1].state.x, rtol=0, atol=1e-7)


def test_the_sign_of_the_slope_keeps_the_lengths_of_z():
    run = program(network(), full(coefficient="sign", queries=3))
    found = estimate_at(run)[0].grad.coefficients[0].tolist()
    assert {abs(c) for c in found} == {1 / 3}


def test_a_masked_estimate_has_the_mask_of_its_direction():
    run = program(network(), full(sparsity=0.5, mask_interval=2))
    zeros = []
    for step in range(4):
        run.comm.step = step
        zeros.append(run.layout.values(estimate_at(run)[0].grad.dense()[0]) == 0)
    assert torch.equal(zeros[0], zeros[1]), "one mask serves two steps"
    assert torch.equal(zeros[2], zeros[3])
    assert not torch.equal(zeros[1], zeros[2])
    share, d = float(zeros[0].double().mean()), run.layout.size
    assert abs(share - 0.5) < 5 * math.sqrt(0.25 / d)


# --- a step of the oracle -----------------------------------------------------------------------


def test_dropout_is_off():
    run = program(network(), full(queries=1))
    found = []
    for _ in range(2):
        run.oracle._calls = (-1, 0)
        found.append(estimate_at(run)[0].loss.item())
    assert found[0] == found[1]


def test_calls_within_a_step_take_other_directions():
    run = program(network(n=2), full(queries=2, directions="own"))
    along = [
        run.oracle.deferred(run.state.x, run._sampler.batches(0, 1)[0]).grad.along for _ in range(2)
    ]
    flat = [direction for call in along for rank in call for direction in rank]
    assert len(set(flat)) == len(flat) == 8


def test_parts_of_a_batch_have_the_loss_of_the_whole():
    found = [
        estimate_at(program(network(dtype=torch.float64), full(micro_batch_size=size)))[
            0
        ].loss.item()
        for size in (None, 7)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_a_resumed_run_counts_on():
    run = advance(program(network(), full()), 3)
    tensors, scalars = run.snapshot()
    other = program(network(), full())
    other.restore(tensors, scalars)
    other.comm.step = 3
    assert advance(other, 1).step()["forwards"] == advance(run, 1).step()["forwards"] == 10.0
