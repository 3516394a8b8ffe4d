"""Layers before a block are skipped: the same bits, fewer layers."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from zeroth_order_problems import N, advance, program, words

from gossamer.algorithms.problems import Problem
from gossamer.algorithms.tasks.arrays import TensorDataset
from gossamer.algorithms.tasks.transformer import Transformer
from gossamer.algorithms.zeroth_order.blocks import blocks_of
from gossamer.algorithms.zeroth_order.losses import Directed, LossesBeside
from gossamer.algorithms.zeroth_order.zeroth_order import ZerothOrder
from gossamer.runtime import RowLayout

LAYERS = 4


class Chain(nn.Module):
    """Layers in turn, what is special about them, and a norm at the end that is named first."""

    def __init__(self, special="nothing"):
        super().__init__()
        self.special = special
        self.last = nn.LayerNorm(6)
        self.first = nn.Linear(5, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(LAYERS))
        if special == "layers of zeros on a path past them":
            for layer in self.layers:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
        if special == "layers that differ in width":
            self.layers = nn.ModuleList(nn.Linear(6 + k, 7 + k) for k in range(LAYERS))
            self.last = nn.LayerNorm(6 + LAYERS)

    def forward(self, h):
        h = self.first(h)
        for k, layer in enumerate(self.layers):
            if self.special == "an early layer takes a late weight" and k == 1:
                h = h @ self.layers[3].weight
            if self.special == "layers of zeros on a path past them":
                h = h + layer(h)
            elif self.special == "what a layer returns is written to":
                h = layer(h)
                h += 1
            elif self.special == "layers that differ in width":
                h = layer(h + torch.ones(6 + k)).tanh()
            else:
                h = layer(h).tanh()
        if self.special == "a layer runs twice":
            h = self.layers[0](h)
        return self.last(h)


def chain(special="nothing", n=1):
    torch.manual_seed(0)
    inputs, shards = torch.randn(N, 5), tuple(np.array_split(np.arange(N), n))

    def loss(module, given):
        return module(given[0]).pow(3).mean()

    return Problem(Chain(special), TensorDataset((inputs,)), shards, loss)


def deep_words(n=1):
    problem = words(n)
    torch.manual_seed(0)
    problem.module = Transformer(vocabulary=23, context=6, layers=3, width=8, heads=2, tied=True)
    return problem


def without_skipping(run):
    run.oracle._beside.prefix = None
    return run


@pytest.mark.parametrize("make", [chain, deep_words])
@pytest.mark.parametrize("sweep", ["gauss-seidel", "jacobi"])
@pytest.mark.parametrize(
    "options",
    [
        {"restore": "transient"},
        {"restore": "snapshot"},
        {"estimate": "one-sided", "queries": 2},
        {"blocks": "module", "directions": "own"},
    ],
    ids=str,
)
def test_what_is_skipped_changes_no_bit(make, sweep, options):
    def run():
        oracle = ZerothOrder(**{"blocks": "layer", "sweep": sweep, "batch_size": 8} | options)
        return program(make(n=2), oracle)

    ours, plain = run(), without_skipping(run())
    assert sum(ours.oracle._beside.prefix.skipped.values()) > 0
    assert torch.equal(advance(ours, 4).state.x, advance(plain, 4).state.x)


def test_layers_before_a_block_run_once_more_at_most():
    def layers_run(run):
        count = 0

        def counted(forward, h):
            nonlocal count
            count += 1
            return forward(h)

        for layer in run.problem.module.layers:
            layer.forward = partial(counted, layer.forward)
        run.step()
        return count

    def run():
        return program(chain(), ZerothOrder(blocks="layer", batch_size=8, restore="snapshot"))

    skipping, plain = run(), without_skipping(run())
    assert len(plain.oracle._blocks) == LAYERS + 2
    assert layers_run(plain) == 2 * (LAYERS + 2) * LAYERS
    # last: all once, then none; first, and layer 0: all twice; layer k: those from k - 1 on, once.
    expected = LAYERS + 2 * LAYERS + 2 * LAYERS
    expected += sum((LAYERS - (k - 1)) + (LAYERS - k) for k in range(1, LAYERS))
    assert layers_run(skipping) == expected


@pytest.mark.parametrize(
    ("special", "skipped"),
    [
        ("nothing", [LAYERS, 0, 0, 1, 2, 3]),
        ("a layer runs twice", [0] * (LAYERS + 2)),
        ("an early layer takes a late weight", [LAYERS, 0, 0, 1, 2, 0]),
        ("what a layer returns is written to", [0] * (LAYERS + 2)),
        ("layers of zeros on a path past them", [0, 0, 0, 1, 0, 0]),
        ("layers that differ in width", [0, 0, 0, 1, 0, 0]),
    ],
)
def test_nothing_is_skipped_that_would_change_a_loss(special, skipped):
    problem = chain(special)
    before = [p.detach().clone() for p in problem.module.parameters()]
    for restore in ("snapshot", "transient"):
        if (restore, special) != ("transient", "an early layer takes a late weight"):  # refused
            assert list(cache_of(problem, restore).skipped.values()) == skipped
    assert all(map(torch.equal, problem.module.parameters(), before))
    assert not any("forward" in m.__dict__ for m in problem.module.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in problem.module.modules())


def cache_of(problem, restore="transient"):
    layout = RowLayout(problem.module)

    @torch.no_grad()
    def loss(inputs):
        return problem.loss(problem.module, inputs).item()

    beside = LossesBeside(problem, layout, Directed(0, "normal", None), loss, restore)
    beside.skip_before(blocks_of(layout, "layer"), None)
    return beside.prefix


def test_an_error_inside_leaves_the_module_as_it_was():
    problem = chain()
    cache = cache_of(problem)
    blocks = list(cache.skipped)
    with torch.no_grad(), cache.before(blocks[3], "row"):
        problem.loss(problem.module, problem.train.tensors)
    with pytest.raises(RuntimeError, match="on purpose"), cache.before(blocks[4], "row"):
        raise RuntimeError("on purpose")
    assert not any("forward" in m.__dict__ for m in problem.module.modules())
    assert not cache._kept


def test_a_second_pass_within_a_loss_is_an_error_not_another_loss():
    problem = chain()
    cache = cache_of(problem)
    block = list(cache.skipped)[4]
    for passes in (1, 2):
        with torch.no_grad(), cache.before(block, "row"):
            problem.loss(problem.module, problem.train.tensors)
            if passes == 2:
                with pytest.raises(RuntimeError, match="runs twice"):
                    problem.loss(problem.module, problem.train.tensors)


def test_a_batch_in_parts_is_not_kept():
    run = program(chain(), ZerothOrder(blocks="layer", batch_size=8, micro_batch_size=3))
    assert run.oracle._beside.prefix is None


def test_a_sweep_that_ends_early_leaves_nothing_for_the_next_batch():
    run = program(chain(), ZerothOrder(blocks="layer", batch_size=8))
    batch = run._sampler.batches(0, 1)[0]
    sweep = run.oracle.sweep_over(run.state.x, batch)
    for _ in range(LAYERS):
        next(sweep)
    assert run.oracle._beside.prefix._kept
    sweep.close()
    assert not run.oracle._beside.prefix._kept
