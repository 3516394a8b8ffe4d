"""LARS: steps as long as their parameters ask, and what is spared."""

import pytest
import torch
from torch import nn

from gossamer.algorithms.optimizers.lars import LARS
from gossamer.runtime import Communicator, ConfigError, RowLayout, StackedTransport
from gossamer.topologies import build

LR, TRUST, DECAY, BETA = 0.5, 0.01, 0.1, 0.9


def start(ranks=2, **options):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    layout = RowLayout(module)
    comm = Communicator(build("complete", ranks), StackedTransport())
    optimizer = LARS(lr=LR, trust=TRUST, weight_decay=DECAY, beta=BETA, **options)
    optimizer.know(layout)
    x = torch.randn(ranks, layout.d)
    return optimizer, layout, comm, x


def gradient(x, k):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(k))


def expected(layout, x, steps):
    """Of one row, by parameter, as the paper writes it."""
    rows = []
    for i, row in enumerate(x):
        views = [view.clone() for view in layout.views(row.clone())]
        momenta = [torch.zeros_like(view) for view in views]
        for k in range(steps):
            grads = layout.views(gradient(x, k)[i])
            for p, m, g in zip(views, momenta, grads, strict=True):
                update = g
                if p.dim() > 1:
                    update = g + DECAY * p
                    update = TRUST * p.norm() / update.norm() * update
                m.mul_(BETA).add_(update)
                p.sub_(LR * m)
        rows.append(views)
    return rows


def test_matrices_are_trusted_by_their_length_and_vectors_take_plain_momentum():
    optimizer, layout, comm, x = start()
    found, state = x.clone(), optimizer.init(x)
    for k in range(4):
        optimizer.update_(state, found, gradient(x, k), comm)
    for row, views in zip(found, expected(layout, x, 4), strict=True):
        for got, want in zip(layout.views(row), views, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_parameter_by_parameter_gives_the_bits_of_whole_rows():
    optimizer, layout, comm, x = start()
    whole, parts = x.clone(), x.clone()
    states = optimizer.init(x), optimizer.init(x)
    for k in range(3):
        grad = gradient(x, k)
        optimizer.update_(states[0], whole, grad, comm)
        with optimizer.in_parts(states[1], parts, comm) as update:
            for s in reversed(layout.slices):
                update(slice(s.begin, s.end), grad[:, s.begin : s.end].contiguous())
    for s in layout.slices:
        assert torch.equal(whole[:, s.begin : s.end], parts[:, s.begin : s.end])


def test_a_parameter_of_zeros_moves_along_its_gradient():
    optimizer, _, comm, x = start(ranks=1)
    zeros, grad = torch.zeros_like(x), gradient(x, 0)
    optimizer.update_(optimizer.init(x), zeros, grad, comm)
    torch.testing.assert_close(zeros, -LR * grad)


def test_random_directions_are_refused():
    with pytest.raises(ConfigError, match=r"optimizer\.name: lars .* use adam or sgd"):
        start()[0].require_directions()
