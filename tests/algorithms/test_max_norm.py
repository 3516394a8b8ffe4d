"""The bound on gradients: torch's, for every optimizer, under every algorithm."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from zeroth_order_problems import network, program

from gossamer.algorithms.decentralized.all_reduce import AllReduce
from gossamer.algorithms.decentralized.dsgd import DSGD
from gossamer.algorithms.optimizers.adam import AdamW
from gossamer.algorithms.optimizers.sgd import SGD, Momentum
from gossamer.algorithms.oracles.backprop import Backprop
from gossamer.algorithms.privacy.dp import DP
from gossamer.algorithms.program import TrainingProgram
from gossamer.algorithms.registry import REGISTRY, find
from gossamer.algorithms.zeroth_order.conservative import Conservative
from gossamer.algorithms.zeroth_order.zeroth_order import ZerothOrder
from gossamer.runtime import Communicator, ConfigError, StackedTransport
from gossamer.runtime.component import validate
from gossamer.topologies import build


def communicator(ranks=2):
    return Communicator(build("complete", ranks), StackedTransport())


@pytest.mark.parametrize("kind", [SGD, Momentum, AdamW])
@pytest.mark.parametrize("max_norm", [0.3, 3.0, 1e4])
def test_a_bound_is_torchs_clip_grad_norm(kind, max_norm):
    theirs = {
        SGD: lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
        Momentum: lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        AdamW: lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    }[kind]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 30, generator=generator, dtype=torch.float64)
    grads = torch.randn(6, 2, 30, generator=generator, dtype=torch.float64)
    grads *= torch.linspace(0.01, 3, 6, dtype=torch.float64)[:, None, None]
    ours, x = kind(lr=0.1, weight_decay=0.1, max_norm=max_norm), start.clone()
    state = ours.init(x)
    parameters = [torch.nn.Parameter(row.clone()) for row in start]
    optimizers = [theirs([p]) for p in parameters]
    for grad in grads:
        ours.update_(state, x, grad, communicator())
        for p, g, optimizer in zip(parameters, grad, optimizers, strict=True):
            p.grad = g.clone()
            torch.nn.utils.clip_grad_norm_([p], max_norm)
            optimizer.step()
    # torch adds 1e-6 to the norm, which is at least max_norm where it divides
    expected = torch.stack([p.detach() for p in parameters])
    torch.testing.assert_close(x, expected, rtol=0, atol=2e-6 / min(max_norm, 1))


@given(
    st.floats(1e-30, 1e30), st.floats(1e-3, 1e3), st.sampled_from([torch.float32, torch.float64])
)
def test_a_bounded_gradient_is_at_most_so_long(size, max_norm, dtype):
    grad = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)).to(dtype)
    grad[0] *= size
    found = SGD(lr=0.1, max_norm=max_norm).clipped(grad)
    for row, bounded in zip(grad.double(), found, strict=True):
        length = row.norm()
        if length <= max_norm:
            assert torch.equal(bounded, row.to(dtype))
        else:
            assert float(bounded.double().norm()) == pytest.approx(max_norm, rel=1e-6)
            expected = (row / length * max_norm).to(dtype)
            torch.testing.assert_close(bounded, expected, rtol=1e-6, atol=0)


def test_a_bound_changes_no_bit_of_what_is_within():
    grad = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) * 1e-3
    optimizer = SGD(lr=0.1, max_norm=1.0)
    assert optimizer.clipped(grad) is grad
    grad[1] *= 1e6
    found = optimizer.clipped(grad)
    assert torch.equal(found[::2], grad[::2])
    assert torch.equal(optimizer.clipped(grad[1:2]), found[1:2])


def test_a_gradient_in_parts_has_no_bound():
    optimizer, x = SGD(lr=0.1, max_norm=1.0), torch.zeros(2, 8)
    with (
        pytest.raises(ConfigError, match=r"max_norm: 1 bounds the length of whole gradients"),
        optimizer.in_parts(None, x, communicator()),
    ):
        pass


@pytest.mark.parametrize("algorithm", [AllReduce, Conservative, DSGD])
def test_random_directions_have_no_bound(algorithm):
    rule = algorithm(optimizer=SGD(lr=0.1, max_norm=1.0))
    with pytest.raises(ConfigError, match=r"max_norm: 1 bounds the length of whole gradients"):
        program(network(n=2), ZerothOrder(), algorithm=rule)


def test_random_directions_that_are_written_down_have_a_bound():
    rule = DSGD(optimizer=SGD(lr=0.1, max_norm=1e-3), order="cta")
    run = program(network(n=1), ZerothOrder(), algorithm=rule)
    start = run.state.x.clone()
    run.step()
    assert float((run.state.x - start).norm()) == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("algorithm", [AllReduce, Conservative, DSGD])
def test_a_private_gradient_is_bounded_with_its_noise(algorithm, ranks):
    def rows(max_norm):
        made = program(
            network(n=ranks),
            DP(inner=Backprop(batch_size=8), noise_multiplier=1e6, noise_seed=1),
            algorithm=algorithm(optimizer=SGD(lr=0.1, max_norm=max_norm)),
        )
        start = made.state.x.clone()
        made.step()
        return start, made.state.x

    start, free = rows(None)
    _, bounded = rows(1e-3)
    moved = (free - start).norm(dim=1)
    if algorithm is not Conservative:  # which may stay
        assert (moved > 1).all()
    assert ((bounded - start).norm(dim=1) <= 1.001e-4).all()


# --- under every algorithm ----------------------------------------------------------------------


def with_an_optimizer():
    """Return the algorithms that need one and take rows."""
    classes = {name: find("algorithm", name) for name in REGISTRY["algorithm"]}
    return [
        name
        for name, cls in classes.items()
        if cls.model_fields["optimizer"].is_required() and "row" in cls.takes
    ]


def rows_after(name, scale, max_norm, steps=4):
    """Return the rows after some steps on a loss times ``scale``."""
    problem = network(n=4, dtype=torch.float64)
    loss = problem.loss
    problem = replace(problem, loss=lambda module, inputs: scale * loss(module, inputs))
    cls = find("algorithm", name)
    fields = {"local_steps": 2, "tau": 2}
    chosen = {key: value for key, value in fields.items() if key in cls.model_fields}
    rule = validate(cls, {"optimizer": SGD(lr=0.1, max_norm=max_norm), **chosen}, "algorithm")
    comm = Communicator(rule.adapt(build("ring", 4)), StackedTransport(), steps=steps)
    run = TrainingProgram(comm, problem, Backprop(batch_size=4, objective="ranks"), rule).start()
    for _ in range(steps):
        run.step()
        run.comm.step += 1
        run.comm.round += rule.rounds_per_step
    return run.state.x.clone()


@pytest.mark.parametrize("name", with_an_optimizer())
def test_the_size_of_what_is_too_long_changes_nothing(name):
    one, other = (rows_after(name, 2.0**power, 1e-3) for power in (20, 30))
    # gt-hsgd adds what is bounded to gradients 10^6 as long, or 10^9.
    torch.testing.assert_close(one, other, rtol=0, atol=1e-8)
    start = rows_after(name, 1.0, None, steps=0)
    assert (one - start).abs().max() > 1e-6


@pytest.mark.parametrize("name", with_an_optimizer())
def test_a_bound_above_all_lengths_changes_no_bit(name):
    assert torch.equal(rows_after(name, 1.0, 1e9), rows_after(name, 1.0, None))
