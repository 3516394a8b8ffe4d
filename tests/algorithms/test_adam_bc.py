"""Adam without the bias of known noise, with and without a filter in front."""

import math

import numpy as np
import pytest
import torch
from quadratic_for_tests import D, Given, Quadratic, Run

from gossamer.algorithms.estimates import PLAIN, Estimate, Origin
from gossamer.algorithms.optimizers.adam import Adam
from gossamer.algorithms.optimizers.adam_bc import AdamBC
from gossamer.algorithms.privacy.disk import Disk
from gossamer.algorithms.privacy.doppler import Doppler
from gossamer.runtime import ConfigError


class Still(AdamBC):
    """Reads what it is given, moves nothing: for means over many equal runs."""

    def update_(self, state, x, grad, comm, origin=PLAIN):
        self.direction(state, x, grad, comm, origin)
        return x


def phi_hat(optimizer, state):
    assert (state.noise == state.noise[0]).all()
    return float(state.noise[0]) / (1 - optimizer.beta2**state.t)


@pytest.mark.parametrize("floor", [None, 0.02])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_an_update_is_the_formula(floor, weight_decay):
    beta1, beta2, lr = 0.8, 0.95, 0.1
    generator = np.random.default_rng(0)
    grads = generator.normal(size=(40, 2, D))
    noise_vars = generator.uniform(0.1, 0.4, size=40)
    optimizer = AdamBC(lr=lr, beta1=beta1, beta2=beta2, floor=floor, weight_decay=weight_decay)
    run = Run(Quadratic(), optimizer)
    x = run.x.numpy().copy()
    m, v, phi = np.zeros_like(x), np.zeros_like(x), 0.0
    for t, (grad, noise_var) in enumerate(zip(grads, noise_vars, strict=True), start=1):
        optimizer.update_(run.state, run.x, torch.from_numpy(grad), run.comm, Origin(noise_var))
        m = beta1 * m + (1 - beta1) * grad
        v = beta2 * v + (1 - beta2) * grad**2
        phi = beta2 * phi + (1 - beta2) * noise_var
        m_hat, v_hat, phi_t = m / (1 - beta1**t), v / (1 - beta2**t), phi / (1 - beta2**t)
        least = 3 * phi_t * math.sqrt(2 * (1 - beta2) / (1 + beta2)) if floor is None else floor
        x = x - lr * (m_hat / np.sqrt(np.maximum(v_hat - phi_t, least)) + weight_decay * x)
        np.testing.assert_allclose(run.x.numpy(), x, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("steps", "mean", "last"), [(200, 0.0656, 0.0526), (6, 0.411, 0.172)])
def test_the_second_moment_remembers_the_first_steps_of_a_filter(steps, mean, last):
    optimizer = Still(lr=1.0)
    given = []
    oracle = Doppler(inner=Quadratic(noise=1.0), beta=0.9)
    run = Run(oracle, optimizer).steps(steps, lambda x, e: given.append(e.origin.noise_var))
    assert phi_hat(optimizer, run.state) == pytest.approx(mean, abs=5e-4 if steps == 6 else 5e-5)
    assert given[-1] == pytest.approx(last, abs=5e-4 if steps == 6 else 5e-5)


@pytest.mark.parametrize(
    "filtered",
    [lambda o: o, lambda o: Doppler(inner=o), lambda o: Disk(inner=o, kappa=0.3, gamma=0.0)],
    ids=["plain", "ema", "disk"],
)
@pytest.mark.parametrize("steps", [6, 100])
def test_what_is_subtracted_is_what_noise_adds(filtered, steps):
    # No gradient but noise: 2000 x 40 values of v^, each a mean of squares of variance phi^.
    class Noise(Quadratic):
        def curvature(self, x):
            return torch.zeros(x.shape[1], dtype=x.dtype)

    optimizer = Still(lr=1.0)
    run = Run(filtered(Noise(noise=0.7)), optimizer, ranks=2000).steps(steps)
    v_hat = run.state.v.mean().item() / (1 - optimizer.beta2**steps)
    # relative standard error below sqrt(2 / 80000) = .5%
    assert v_hat == pytest.approx(phi_hat(optimizer, run.state), rel=0.02)


def test_a_small_gradient_under_noise_keeps_its_adaptive_size():
    # gradients .5 and .25 under noise 1: Adam divides both by about 1, AdamBC each by its own size
    grads = torch.tensor([0.5, 0.25], dtype=torch.float64).repeat(D // 2)
    steps, ranks = 400, 1000

    class Constant(Quadratic):
        def __call__(self, x, batch, **ignored):
            noise = self.noise_rows(x, self._comm.step)
            ones = torch.ones(len(x), dtype=torch.float64)
            return Estimate(0 * ones, grads + noise, ones, Origin(1.0), Origin(1.0))

    def second(optimizer):
        run = Run(Constant(noise=1.0), optimizer, ranks).steps(steps)
        v_hat = run.state.v / (1 - optimizer.beta2**steps)
        noise = phi_hat(optimizer, run.state) if isinstance(optimizer, AdamBC) else 0.0
        return (v_hat.mean(dim=0) - noise).view(-1, 2).mean(dim=0).sqrt()

    close = {"rtol": 0.02, "atol": 0.0}
    torch.testing.assert_close(second(AdamBC(lr=1e-9)), grads[:2], **close)
    torch.testing.assert_close(second(Adam(lr=1e-9)), (1 + grads[:2] ** 2).sqrt(), **close)


def test_gradients_of_unknown_noise_are_refused_with_the_way_out():
    optimizer = AdamBC(lr=0.1)
    run = Run(Quadratic(), optimizer)
    with pytest.raises(ConfigError, match=r"optimizer\.name: adam-bc subtracts .* use adam"):
        optimizer.update_(run.state, run.x, torch.ones_like(run.x), run.comm, PLAIN)


def test_without_noise_it_is_adam():
    plain, known = (Run(Quadratic(dtype="float32"), cls(lr=0.1)) for cls in (Adam, AdamBC))
    for step in range(5):
        grad = torch.zeros_like(plain.x)  # the rest, padding among it, has no gradient ever
        grad[:, :9] = 0.1 * (step + 1)
        plain.optimizer.update_(plain.state, plain.x, grad, plain.comm, Origin(0.0))
        known.optimizer.update_(known.state, known.x, grad, known.comm, Origin(0.0))
    torch.testing.assert_close(known.x, plain.x, rtol=1e-5, atol=1e-6)


def test_each_rank_is_rid_of_its_own_noise():
    levels = torch.tensor([[0.3], [0.0], [2.0]], dtype=torch.float64)
    apart = []
    for noise_var in (levels, *levels.flatten().tolist()):
        run = Run(Quadratic(), AdamBC(lr=0.1), ranks=3)
        for _ in range(3):
            grad = torch.arange(3 * D, dtype=torch.float64).view(3, D) / D
            run.optimizer.update_(run.state, run.x, grad, run.comm, Origin(noise_var))
        apart.append(run.x)
    for rank in range(3):
        assert torch.equal(apart[0][rank], apart[1 + rank][rank])


def test_a_gradient_without_noise_among_noisy_ones_counts_as_one():
    optimizer = AdamBC(lr=0.1, beta2=0.5)
    run = Run(Quadratic(), optimizer)
    grad = torch.ones(2, D, dtype=torch.float64)
    optimizer.update_(run.state, run.x, grad, run.comm, Origin(0.4))
    optimizer.update_(run.state, run.x, grad, run.comm, Origin(0.0))
    assert phi_hat(optimizer, run.state) == pytest.approx(0.1 / 0.75)


@pytest.mark.parametrize("cls", [Adam, AdamBC])
def test_a_restart_forgets_the_first_moment_alone(cls):
    rows = torch.randn(12, 2, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    run = Run(Given(gradients=rows, restart_at=10), cls(lr=0.1)).steps(10)
    state, x, v = run.state, run.x.clone(), run.state.v.clone()
    run.steps(1)
    torch.testing.assert_close(state.m, 0.1 * rows[10], rtol=1e-14, atol=0)
    torch.testing.assert_close(state.v, 0.999 * v + 0.001 * rows[10] ** 2, rtol=1e-14, atol=0)
    assert state.t == 11
    if cls is AdamBC:
        assert phi_hat(run.optimizer, state) == pytest.approx(1.0)
    # The step count stays too: the first update is a tenth of a whole one, as after a warmup.
    v_hat = state.v / (1 - 0.999**11)
    least = (v_hat - 1).clamp_min(3 * math.sqrt(2 * 0.001 / 1.999)) if cls is AdamBC else v_hat
    expected = x - 0.1 * (0.1 * rows[10]) / (1 - 0.9**11) / least.sqrt()
    torch.testing.assert_close(run.x, expected, rtol=0, atol=1e-8)  # Adam adds eps 1e-8


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_padding_stays_zero(weight_decay):
    run = Run(Quadratic(dtype="float32"), AdamBC(lr=0.1, weight_decay=weight_decay))
    assert run.x.shape[1] > D
    grad = torch.zeros_like(run.x)
    grad[:, :D] = 0.3
    for _ in range(5):
        run.optimizer.update_(run.state, run.x, grad, run.comm, Origin(0.1))
    assert torch.equal(run.x[:, D:], torch.zeros_like(run.x[:, D:]))
    assert torch.isfinite(run.x).all()


@pytest.mark.parametrize("d", [1, 5, 17, 64])
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(d):
    grads = torch.randn(8, 64, d, generator=torch.Generator().manual_seed(0))

    def updated(count):
        optimizer = AdamBC(lr=0.1, weight_decay=0.1)
        x = torch.ones(count, d)
        state, comm = optimizer.init(x), Run(Quadratic(), optimizer).comm
        for grad in grads:
            optimizer.update_(state, x, grad[:count].clone(), comm, Origin(0.2))
        return x

    together = updated(64)
    assert torch.equal(updated(1), together[:1])
    assert torch.equal(updated(3), together[:3])
