"""A part of the parameters at a time: blocks, pools, gradients of some layers; helpful steps."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from zeroth_order_problems import (
    N,
    advance,
    estimate_at,
    full,
    network,
    program,
    quadratic,
    words,
)

from gossamer.algorithms.decentralized.all_reduce import AllReduce
from gossamer.algorithms.optimizers.adam import Adam
from gossamer.algorithms.optimizers.sgd import SGD, Momentum
from gossamer.algorithms.oracles.backprop import Backprop
from gossamer.algorithms.program import TrainingProgram
from gossamer.algorithms.zeroth_order.blocks import blocks_of
from gossamer.algorithms.zeroth_order.conservative import Conservative
from gossamer.algorithms.zeroth_order.probes import Along
from gossamer.algorithms.zeroth_order.zeroth_order import ZerothOrder
from gossamer.runtime import Communicator, ConfigError, RowLayout, StackedTransport
from gossamer.runtime.perturb import direction_
from gossamer.topologies import build


def test_blocks_are_parts_of_the_model_by_name():
    layout = RowLayout(words().module)
    names = {s.tensor: s.name for s in layout.slices}
    assert blocks_of(layout, "none") == [None]
    for partition in ("layer", "sublayer", "module"):
        blocks = blocks_of(layout, partition)
        assert sorted(t for block in blocks for t in block) == sorted(names)
    layers = [{names[t] for t in block} for block in blocks_of(layout, "layer")]
    assert {n for n in names.values() if n.startswith("blocks.0.")} in layers
    assert len(blocks_of(layout, "layer")) < len(blocks_of(layout, "sublayer"))
    assert len(blocks_of(layout, "sublayer")) <= len(blocks_of(layout, "module"))


def test_one_block_is_the_whole_model_in_either_order():
    plain = advance(program(quadratic()[0], full()), 4)
    for sweep in ("gauss-seidel", "jacobi"):
        run = advance(program(quadratic()[0], full(blocks="module", sweep=sweep)), 4)
        assert torch.equal(run.state.x, plain.state.x)


def test_jacobi_adds_the_estimates_of_the_blocks_at_one_point():
    run = program(network(dtype=torch.float64), full(blocks="module", sweep="jacobi"))
    whole = estimate_at(run)[0].grad.dense()
    derivative = program(network(dtype=torch.float64), full(blocks="module", estimate="forward"))
    exact = estimate_at(derivative)[0].grad.dense()
    assert torch.allclose(whole, exact, atol=1e-5)
    z = direction_(torch.zeros_like(whole[0]), run.layout, run.oracle._directed.seed, 0, 0)
    for block in run.oracle._blocks:
        for s in run.layout.slices:
            if s.tensor in block:
                ratio = (whole[0] / z)[s.begin : s.end]
                assert torch.allclose(ratio, ratio[0].expand_as(ratio))


def test_gauss_seidel_takes_a_blocks_losses_where_the_blocks_before_it_moved_to():
    run = program(network(dtype=torch.float64), full(blocks="module"), SGD(lr=0.05))
    x = run.state.x.clone()
    for block in run.oracle._blocks:
        one = program(network(dtype=torch.float64), full())
        z = direction_(torch.zeros_like(x[0]), run.layout, run.oracle._directed.seed, 0, 0)
        for s in run.layout.slices:
            if s.tensor not in block:
                z[s.begin : s.end] = 0
        batch = run._sampler.batches(0, 1)[0]
        high, low = (one.oracle.loss(x + e * z, batch).item() for e in (1e-3, -1e-3))
        x = x - 0.05 * (high - low) / 2e-3 * z
    advance(run, 1)
    assert torch.allclose(run.state.x, x, rtol=1e-9, atol=1e-12)
    assert run.oracle._forwards == 2 * len(run.oracle._blocks) == 4


@pytest.mark.parametrize("optimizer", [Momentum(lr=0.1), SGD(lr=0.1, weight_decay=0.1)])
def test_updates_block_by_block_refuse_an_optimizer_that_moves_the_others(optimizer):
    with pytest.raises(ConfigError, match=r"oracle\.sweep: gauss-seidel .* jacobi"):
        program(network(), full(blocks="layer"), optimizer)
    program(network(), full(blocks="layer", sweep="jacobi"), optimizer)


@pytest.mark.parametrize("directions", ["shared", "own"])
def test_a_pool_holds_all_directions_of_a_run(directions):
    run = program(network(n=2), full(pool=5, queries=2, directions=directions))
    seen, alike = set(), []
    for step in range(30):
        run.comm.step = step
        probes = estimate_at(run)[0].grad
        for along in probes.along:
            assert len(set(along)) == 2
        seen |= {direction for along in probes.along for direction in along}
        alike.append(probes.along[0] == probes.along[1])
    assert seen == {Along(0, k) for k in range(5)}
    assert all(alike) == (directions == "shared")
    with pytest.raises(ConfigError, match=r"oracle\.queries: 6 different directions"):
        program(network(), full(pool=5, queries=6))


@pytest.mark.parametrize("n", [1, 3])
def test_a_conservative_step_takes_the_best_of_three_points(n):
    run = program(network(n=n), full(), algorithm=Conservative(optimizer=SGD(lr=0.3)))
    taken = set()
    for _ in range(25):
        batch = run._sampler.batches(run.comm.step, 1)[0]
        before, x = run.oracle.loss(run.state.x, batch).mean(), run.state.x.clone()
        taken.add(figure := run.step()["taken"])
        after = run.oracle.loss(run.state.x, batch).mean()
        assert after <= before
        assert torch.equal(run.state.x, x) == (figure == 0)
        assert all(torch.equal(row, run.state.x[0]) for row in run.state.x)
        run.comm.step += 1
    assert len(taken) > 1


@pytest.mark.parametrize("losses", [(1, 0.5, math.nan), (1, math.nan, 7), (math.inf, 1, 2)])
def test_a_conservative_step_with_a_loss_that_is_not_finite_is_not_taken(losses, monkeypatch):
    run = program(network(), full(), algorithm=Conservative(optimizer=SGD(lr=0.1)))
    given = iter(losses)
    monkeypatch.setattr(
        ZerothOrder, "loss", lambda self, x, batch: torch.tensor([float(next(given))])
    )
    x = run.state.x.clone()
    assert run.step()["skipped"] == 1.0
    assert torch.equal(run.state.x, x)


def test_own_directions_of_blocks_are_one_rank_with_all_queries():
    same = replace(network(), shards=(np.arange(N),) * 3)
    options = {"blocks": "module", "sweep": "jacobi"}
    runs = [
        advance(program(network(), full(queries=3, **options)), 3),
        advance(program(same, full(directions="own", **options), n=3), 3),
    ]
    assert torch.equal(runs[0].state.x[0], runs[1].state.x[0])


@pytest.mark.parametrize(
    ("losses", "taken"),
    [
        ((1, 2, 3), 0.0),
        ((1, 3, 0), 1.0),
        ((1, 2, 1), 1.0),
        ((1, 1, 2), -1.0),
        ((1, 1, 1), 1.0),
        ((1, 0, 0.5), -1.0),
    ],
)
def test_a_conservative_choice_breaks_ties_as_released(losses, taken, monkeypatch):
    run = program(network(), full(), algorithm=Conservative(optimizer=SGD(lr=0.1)))
    given = iter(losses)
    monkeypatch.setattr(
        ZerothOrder, "loss", lambda self, x, batch: torch.tensor([float(next(given))])
    )
    x = run.state.x.clone()
    slope = estimate_at(run)[0].grad.dense()
    run.oracle._calls = (-1, 0)
    assert run.step()["taken"] == taken
    assert torch.allclose(run.state.x, x + 0.1 * taken * slope, atol=1e-6)


# --- losses for some parameters, backpropagation for the others ---------------------------------


@pytest.mark.parametrize("n", [1, 2])
def test_the_last_layers_can_have_their_gradient_by_backpropagation(n):
    run = program(network(n=n, dtype=torch.float64), full(first_order=("3",)))
    found = estimate_at(run)[0].grad
    plain = program(network(n=n, dtype=torch.float64), full())
    exact = TrainingProgram(
        Communicator(build("ring", n), StackedTransport()),
        replace(network(n=n, dtype=torch.float64)),
        Backprop(sampling="full"),
        AllReduce(optimizer=SGD(lr=0.01)),
    ).start()
    exact.problem.module.eval()
    gradient = exact.oracle(exact.state.x, exact._sampler.batches(0, 1)[0]).grad
    layout, dense = run.layout, found.dense()
    z = direction_(torch.zeros_like(dense[0]), layout, run.oracle._directed.seed, 0, 0)
    for s in layout.slices:
        part = slice(s.begin, s.end)
        if s.name.startswith("3."):
            assert torch.allclose(dense[:, part], gradient[:, part], rtol=1e-12)
        else:
            ratio = dense[:, part] / z[part]
            assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio))
    assert plain.layout.d == layout.d
    assert torch.equal(found.columns(3, layout.d), dense[:, 3:])
    x = run.state.x.clone()
    assert torch.allclose(found.add_to_(x, -0.1), run.state.x - 0.1 * dense, atol=1e-15)
    assert torch.allclose(found.mean(run.comm).dense()[0], dense.mean(0), atol=1e-15)
    assert all(p.requires_grad for p in run.problem.module.parameters())


def test_ranks_that_share_a_hybrid_step_stay_equal():
    run = advance(program(network(n=3), full(first_order=("3.bias",)), Adam(lr=0.01)), 3)
    assert all(torch.equal(row, run.state.x[0]) for row in run.state.x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first_order": ("4",)}, r"oracle\.first_order: the model has no parameter or module '4'"),
        ({"first_order": ("0", "3")}, r"oracle\.first_order: names all parameters"),
        ({"first_order": ("3",), "blocks": "module"}, r"oracle\.blocks: does not go with first_o"),
        ({"first_order": ("3",), "minimize": "f1"}, r"oracle\.minimize: does not go with first_o"),
    ],
)
def test_first_order_parts_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        program(network(), full(**options))


@pytest.mark.parametrize(
    ("options", "algorithm", "expected"),
    [
        ({}, None, 2),
        ({"estimate": "one-sided", "queries": 3}, None, 4),
        ({}, Conservative(optimizer=SGD(lr=0.01)), 5),
        ({"first_order": ("3",)}, None, 3),
    ],
    ids=["two", "one-sided", "conservative", "hybrid"],
)
def test_every_forward_pass_counts(options, algorithm, expected):
    run = program(network(), full(**options), algorithm=algorithm)
    assert [advance(run, 1).step()["forwards"] for _ in range(2)] == [2 * expected, 4 * expected]
