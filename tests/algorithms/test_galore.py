"""GaLore against the paper's rule in plain torch, its memory, and ranks that share a basis."""

import math

import pytest
import torch
from torch import nn
from zeroth_order_problems import network, program

from gossamer.algorithms.decentralized.all_reduce import AllReduce
from gossamer.algorithms.decentralized.dsgd import DSGD
from gossamer.algorithms.optimizers import galore
from gossamer.algorithms.optimizers.adam8bit import Adam8bit
from gossamer.algorithms.optimizers.galore import GaLore
from gossamer.algorithms.oracles.backprop import Backprop
from gossamer.algorithms.privacy.dp import DP
from gossamer.algorithms.zeroth_order.zeroth_order import ZerothOrder
from gossamer.runtime import Communicator, ConfigError, RowLayout, StackedTransport
from gossamer.topologies import build

SHAPES = {
    "attn.tall": (9, 5),
    "attention.wide": (4, 11),
    "mlp.square": (6, 6),
    "mlp.bias": (7,),
    "mlp.small": (2, 20),
    "mlp.thin": (12, 1),
    "mlp.cube": (4, 4, 4),
    "head": (8, 8),
}
PROJECTED = {"attn.tall", "attention.wide", "mlp.square", "mlp.small", "mlp.thin"}
RANK = 3  # above the sizes of two


class Named(nn.Module):
    """Parameters with dots in their names."""

    def __init__(self, dtype):
        super().__init__()
        for name, shape in SHAPES.items():
            parent, _, leaf = name.rpartition(".")
            if parent and not hasattr(self, parent):
                self.add_module(parent, nn.Module())
            owner = getattr(self, parent) if parent else self
            setattr(owner, leaf, nn.Parameter(torch.zeros(shape, dtype=dtype)))


def layout_of(dtype=torch.float64):
    return RowLayout(Named(dtype))


def communicator(ranks):
    return Communicator(build("complete", ranks), StackedTransport())


def made(layout, alike=False, **fields):
    optimizer = GaLore(**{"lr": 0.1, "rank": RANK, "refresh": 3} | fields)
    optimizer.know(layout, alike)
    return optimizer


def rows_of(layout, ranks, seed):
    """Return random rows (ranks, d), padding zero."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.zeros(ranks, layout.d, dtype=layout.dtype)
    for row in rows:
        for view in layout.views(row):
            view.copy_(torch.randn(view.shape, generator=generator, dtype=torch.float64))
    return rows


class Written:
    """GaLore of one matrix as the paper's Algorithm 2 has it, W (d, p)."""

    def __init__(self, w, refresh, scale, weight_decay):
        self.w, self.refresh, self.scale, self.decay = w, refresh, scale, weight_decay
        self.m = self.v = 0.0
        self.k = 0

    def step(self, g, lr):
        tall = g.shape[0] >= g.shape[1]
        if self.k % self.refresh == 0:
            u, _, vh = torch.linalg.svd(g.float(), full_matrices=False)
            self.p = (vh[:RANK] if tall else u[:, :RANK]).to(g.dtype)
        self.k += 1
        r = g @ self.p.T if tall else self.p.T @ g
        self.m = 0.9 * self.m + 0.1 * r
        self.v = 0.999 * self.v + 0.001 * r**2
        n = self.m / (self.v.sqrt() + 1e-6)
        size = lr * math.sqrt(1 - 0.999**self.k) / (1 - 0.9**self.k)
        full = n @ self.p if tall else self.p @ n
        self.w = (1 - lr * self.decay) * self.w - size * self.scale * full


class Plain(Written):
    """Adam in the same form, of a parameter that is not projected."""

    def step(self, g, lr):
        self.k += 1
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * g**2
        size = lr * math.sqrt(1 - 0.999**self.k) / (1 - 0.9**self.k)
        self.w = (1 - lr * self.decay) * self.w - size * self.m / (self.v.sqrt() + 1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_updates_are_galore_s_over_refreshes(weight_decay):
    layout = layout_of()
    optimizer = made(layout, weight_decay=weight_decay)
    x, comm = rows_of(layout, 2, seed=0), communicator(2)
    state = optimizer.init(x)
    theirs = [
        [
            (Written if s.name in PROJECTED else Plain)(view.clone(), 3, 0.25, weight_decay)
            for s, view in zip(layout.slices, layout.views(row), strict=True)
        ]
        for row in x
    ]
    for k in range(8):
        grad = rows_of(layout, 2, seed=k + 1)
        optimizer.update_(state, x, grad, comm)
        for row, g, rules in zip(x, grad, theirs, strict=True):
            views = zip(layout.views(row), layout.views(g), rules, strict=True)
            for view, part, rule in views:
                rule.step(part, 0.1)
                torch.testing.assert_close(view, rule.w, rtol=0, atol=1e-12)


def test_a_matrix_moves_within_the_span_of_its_basis():
    layout = layout_of()
    optimizer, comm = made(layout), communicator(1)
    x = rows_of(layout, 1, seed=0)
    state = optimizer.init(x)
    for k in range(7):
        before, basis = x.clone(), state.basis.clone()
        optimizer.update_(state, x, rows_of(layout, 1, seed=k + 1), comm)
        renewed = not torch.equal(state.basis, basis)
        assert renewed == (k % 3 == 0)  # the first update is one
        moved, places = layout.views((x - before)[0]), optimizer._places.values()
        for s, place, delta in zip(layout.slices, places, moved, strict=True):
            if s.name not in PROJECTED:
                assert not place.projected
                continue
            tall = s.shape[0] >= s.shape[1]
            rank = min(RANK, *s.shape)
            p = state.basis[0, place.basis].view((rank, -1) if tall else (-1, rank))
            assert p.shape == ((rank, s.shape[1]) if tall else (s.shape[0], rank))
            eye = torch.eye(rank, dtype=p.dtype)
            torch.testing.assert_close(p @ p.T if tall else p.T @ p, eye, rtol=0, atol=1e-5)
            inside = delta @ p.T @ p if tall else p @ p.T @ delta
            torch.testing.assert_close(inside, delta, rtol=0, atol=1e-6)  # P has float32's digits
            assert torch.linalg.matrix_rank(delta, atol=1e-6) == rank


def test_moments_have_the_projected_size():
    layout = layout_of(torch.float32)
    optimizer = made(layout)
    state = optimizer.init(torch.zeros(2, layout.d))
    projected = sum(min(RANK, *SHAPES[name]) * max(SHAPES[name]) for name in PROJECTED)
    others = sum(math.prod(shape) for name, shape in SHAPES.items() if name not in PROJECTED)
    bases = sum(min(RANK, *SHAPES[name]) * min(SHAPES[name]) for name in PROJECTED)
    padding = 16 * len(SHAPES)
    for moment in (state.m, state.v):
        assert projected + others <= moment.shape[1] < projected + others + padding
    assert bases <= state.basis.shape[1] < bases + padding
    assert all(len(tensor) == 2 for tensor in (state.m, state.v, state.basis))


def test_a_row_s_bits_do_not_depend_on_the_rows_beside_it():
    layout = layout_of(torch.float32)

    def after(ranks):
        optimizer, x = made(layout), rows_of(layout, 4, seed=0)[:ranks].contiguous()
        state = optimizer.init(x)
        for k in range(5):
            grad = rows_of(layout, 4, seed=k + 1)[:ranks].contiguous()
            optimizer.update_(state, x, grad, communicator(ranks))
        return x

    together = after(4)
    assert torch.equal(after(1), together[:1])
    assert torch.equal(after(3), together[:3])


def test_an_update_by_parameters_is_the_update_of_whole_rows():
    layout, comm = layout_of(torch.float32), communicator(2)
    rows = [rows_of(layout, 2, seed=0) for _ in range(2)]
    optimizer = made(layout, weight_decay=0.1)
    states = [optimizer.init(x) for x in rows]
    for k in range(5):
        grad = rows_of(layout, 2, seed=k + 1)
        optimizer.update_(states[0], rows[0], grad, comm)
        with optimizer.in_parts(states[1], rows[1], comm) as update:
            for s in reversed(layout.slices):
                columns = slice(s.begin, s.end)
                update(columns, grad[:, columns])
        assert states[0].t == states[1].t == k + 1
        assert torch.equal(*rows)
        assert torch.equal(states[0].m, states[1].m)
        assert torch.equal(states[0].basis, states[1].basis)


def test_parts_that_are_no_parameters_are_refused():
    layout = layout_of(torch.float32)
    optimizer, x = made(layout), torch.zeros(1, layout.d)
    state = optimizer.init(x)
    with (
        pytest.raises(ConfigError, match=r"galore projects whole matrices.*columns 0 to 16"),
        optimizer.in_parts(state, x, communicator(1)) as update,
    ):
        update(slice(0, 16), x[:, :16])


def test_directions_are_refused():
    optimizer = GaLore(lr=0.1, rank=2, targets=("weight",))
    with pytest.raises(ConfigError, match=r"galore projects whole gradients"):
        program(network(n=2), ZerothOrder(), optimizer)


@pytest.mark.parametrize("optimizer", [GaLore(lr=0.1, rank=2, targets=("weight",)), Adam8bit(lr=1)])
@pytest.mark.parametrize("algorithm", [AllReduce, DSGD])
@pytest.mark.parametrize("n", [1, 2])
def test_private_gradients_are_whole(optimizer, algorithm, n):
    oracle = DP(inner=Backprop(batch_size=8), noise_multiplier=1.0, noise_seed=1)
    run = program(network(n=n), oracle, algorithm=algorithm(optimizer=optimizer))
    before = run.state.x.clone()
    run.step()
    assert (run.state.x != before).any()


@pytest.mark.parametrize("targets", [("lora",), ("bias", "cube")])
def test_a_model_without_a_matrix_to_project_is_refused(targets):
    with pytest.raises(ConfigError, match=r"targets: no matrix has .* there are head .8, 8., att"):
        made(layout_of(), targets=targets)


def test_a_rank_above_all_sizes_is_that_of_the_matrices():
    layout, comm = layout_of(), communicator(1)
    rows = [rows_of(layout, 1, seed=0) for _ in range(2)]
    for rank, x in zip((6, 100), rows, strict=True):
        optimizer = made(layout, rank=rank)
        state = optimizer.init(x)
        for k in range(4):
            optimizer.update_(state, x, rows_of(layout, 1, seed=k + 1), comm)
    assert torch.equal(*rows)


def test_a_gradient_that_is_not_finite_keeps_the_basis():
    layout = layout_of(torch.float32)
    optimizer, x = made(layout, refresh=1), torch.zeros(1, layout.d)
    state = optimizer.init(x)
    optimizer.update_(state, x, rows_of(layout, 1, seed=0), communicator(1))
    basis = state.basis.clone()
    optimizer.update_(state, x, torch.full_like(x, torch.nan), communicator(1))
    assert torch.equal(state.basis, basis)
    assert x.isnan().any()


# --- ranks --------------------------------------------------------------------------------------


def run_of(algorithm, n=4, steps=5):
    optimizer = GaLore(lr=0.01, rank=2, refresh=2, targets=("weight",))
    oracle = Backprop(batch_size=4)
    run = program(network(n=n), oracle, algorithm=algorithm(optimizer=optimizer), n=n)
    for _ in range(steps):
        run.step()
        run.comm.step += 1
        run.comm.round += 1
    return run


def test_ranks_of_the_same_gradient_take_rank_0_s_basis(monkeypatch):
    found, principal = [], galore._principal

    def another_sign(grad, rank):
        """A library on another machine may give the opposite vectors at every call."""
        found.append(grad.shape)
        return principal(grad, rank) * (-1) ** len(found)

    monkeypatch.setattr(galore, "_principal", another_sign)
    state = run_of(AllReduce, steps=5).state
    assert found == [(7, 5), (3, 7)] * 3
    for rows in (state.x, state.optimizer.m, state.optimizer.v, state.optimizer.basis):
        assert torch.equal(rows, rows[:1].expand_as(rows))
    assert state.optimizer.basis.abs().max() > 0.1


def test_ranks_with_gradients_of_their_own_keep_bases_of_their_own():
    state = run_of(DSGD).state
    bases = state.optimizer.basis
    assert not any(torch.equal(bases[0], row) for row in bases[1:])


def test_a_new_basis_is_counted_as_sent():
    def bytes_of(step):
        run = run_of(AllReduce, steps=step)
        return int(run.comm.traffic.bytes_sent.sum())

    first, second, third = (bytes_of(k) for k in (1, 2, 3))
    basis = run_of(AllReduce, steps=1).state.optimizer.basis
    gradient = second - first
    assert first - gradient == third - second - gradient == 3 * basis.shape[1] * 4
