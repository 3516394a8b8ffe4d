"""Local optimizers against torch.optim, and what a row's update must not depend on."""

import pytest
import torch

from gossamer.algorithms.estimates import PLAIN, Origin
from gossamer.algorithms.optimizers.adam import Adam, AdamW
from gossamer.algorithms.optimizers.adam8bit import Adam8bit
from gossamer.algorithms.optimizers.adam_bc import AdamBC
from gossamer.algorithms.optimizers.sgd import SGD, Momentum, SignSGD
from gossamer.algorithms.registry import REGISTRY, find
from gossamer.runtime import Communicator, ConfigError, RowLayout, StackedTransport
from gossamer.runtime.component import validate
from gossamer.topologies import build

CASES = {
    "sgd": (SGD(lr=0.1, weight_decay=0.02),
            lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.02)),
    "momentum": (Momentum(lr=0.1, beta=0.8, weight_decay=0.02),
                 lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, weight_decay=0.02)),
    "nesterov": (Momentum(lr=0.1, nesterov=True),
                 lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True)),
    "adam": (Adam(lr=0.1, beta2=0.99, weight_decay=0.02),
             lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.9, 0.99), weight_decay=0.02)),
    "adamw": (AdamW(lr=0.1), lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.01)),
}  # fmt: skip


def communicator(ranks, steps=None):
    return Communicator(build("complete", ranks), StackedTransport(), steps=steps)


def updates(optimizer, x, count=20):
    comm, state = communicator(len(x)), optimizer.init(x)
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        noise = torch.randn(64, x.shape[1], generator=generator, dtype=torch.float64)
        optimizer.update_(
            state, x, ((x / (1 + x * x)).double() + noise[: len(x)]).to(x.dtype), comm
        )
        comm.step += 1
    return x


@pytest.mark.parametrize("name", CASES)
def test_an_optimizer_equals_its_namesake_of_torch(name):
    ours, theirs = CASES[name]
    start = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    actual = updates(ours, start.clone())
    parameter = torch.nn.Parameter(start.clone())
    optimizer = theirs([parameter])
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        noise = torch.randn(64, 7, generator=generator, dtype=torch.float64)[:3]
        x = parameter.detach()
        parameter.grad = x / (1 + x * x) + noise
        optimizer.step()
    torch.testing.assert_close(actual, parameter.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("d", [1, 5, 17, 64])
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(name, d):
    start = torch.randn(64, d, generator=torch.Generator().manual_seed(0))
    together = updates(CASES[name][0], start.clone())
    assert torch.equal(updates(CASES[name][0], start[:1].clone()), together[:1])
    assert torch.equal(updates(CASES[name][0], start[:3].clone()), together[:3])


@pytest.mark.parametrize("name", CASES)
def test_zero_gradients_move_nothing(name):
    optimizer, x = CASES[name][0], torch.zeros(2, 5)
    comm, state = communicator(2), optimizer.init(x)
    for _ in range(3):
        optimizer.update_(state, x, torch.zeros(2, 5), comm)
    assert torch.equal(x, torch.zeros(2, 5))


def test_a_direction_keeps_the_row_and_the_gradient():
    for optimizer, _ in CASES.values():
        x, grad = torch.ones(2, 5), torch.full((2, 5), 2.0)
        optimizer.direction(optimizer.init(x), x, grad, communicator(2), PLAIN)
        assert torch.equal(x, torch.ones(2, 5))
        assert torch.equal(grad, torch.full((2, 5), 2.0))


@pytest.mark.parametrize("name", REGISTRY["optimizer"])
def test_every_registered_optimizer_asks_for_a_learning_rate(name):
    cls = find("optimizer", name)
    with pytest.raises(ConfigError, match=r"optimizer\.lr: missing"):
        validate(cls, {}, "optimizer")
    with pytest.raises(ConfigError, match=r"optimizer\.lr: must be greater than 0"):
        validate(cls, {"lr": -1.0}, "optimizer")
    assert validate(cls, {"lr": 0.1}, "optimizer").name == name


@pytest.mark.parametrize("kind", [SGD, Momentum, SignSGD, Adam, AdamW, AdamBC, Adam8bit])
@pytest.mark.parametrize("columns", [2**18, 16])
def test_parameters_with_certain_names_do_not_decay(kind, columns, monkeypatch):
    monkeypatch.setattr("gossamer.algorithms.optimizers.base._COLUMNS", columns)
    module = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7))
    layout = RowLayout(module)
    start = torch.zeros(1, layout.d)
    layout.gather(module, start[0])

    class Written:
        """An estimate that is not written down, of a row that is."""

        def __init__(self, row):
            self.columns = lambda begin, end: row[:, begin:end]
            self.add_to_ = lambda x, scale: x.add_(row, alpha=scale)

    def after(**options):
        optimizer = kind(lr=0.1, **options)
        optimizer.know(layout)
        comm, x = communicator(1), start.clone()
        state = optimizer.init(x)
        for k in range(3):
            grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(k))
            given = grad if kind is AdamBC else Written(grad)  # it takes no gradient in parts
            optimizer.apply_(state, x, given, comm, Origin(noise_var=0.01))
        return [view.clone() for view in layout.views(x[0])]

    whole, none = after(weight_decay=0.3), after(weight_decay=0.0)
    some = after(weight_decay=0.3, decay_except=("bias", "1."))
    spared = [s.name != "0.weight" for s in layout.slices]
    assert spared == [False, True, True, True]
    for found, decays, stays, is_spared in zip(some, whole, none, spared, strict=True):
        torch.testing.assert_close(found, stays if is_spared else decays)
        assert not torch.allclose(decays, stays)


def test_names_that_no_parameter_has_are_refused():
    with pytest.raises(ConfigError, match=r"decay_except: no parameter has norm .* 0\.weight"):
        SGD(lr=0.1, decay_except=("norm",)).know(
            RowLayout(torch.nn.Sequential(torch.nn.Linear(2, 2)))
        )
