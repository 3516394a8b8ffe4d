"""gossamer.attach: the user's loop stays, the algorithm takes the step."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import gossamer
from gossamer.algorithms.decentralized.dsgd import DSGD
from gossamer.runtime import Communicator, ConfigError, StackedTransport
from gossamer.topologies import build


@pytest.fixture
def alone():
    """One rank: every average is the identity, so a step is the optimizer's own."""
    return Communicator(build("ring", 1), StackedTransport())


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def train(model, optimizer, steps=20, schedule=None):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(16, 5, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x.argmax(dim=1) % 3).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("algorithm", ["dsgd", "gradient-tracking", "all-reduce"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_with_one_rank_the_optimizer_is_itself(algorithm, kind, alone):
    plain, attached = net(), net()
    optimizer = kind(attached.parameters(), lr=0.01)
    returned = gossamer.attach(attached, optimizer, algorithm, comm=alone)
    assert returned is optimizer
    expected = train(plain, kind(plain.parameters(), lr=0.01))
    # tracking adds y + g - g_old in another order than g alone
    torch.testing.assert_close(train(attached, optimizer), expected, rtol=0, atol=2e-6)


def test_the_row_that_travels_stays_as_it_is_while_the_optimizer_steps(alone, monkeypatch):
    """Combine then adapt: the neighbours read x until the average is over."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gossamer.attach(model, optimizer, {"name": "dsgd", "order": "cta"}, comm=alone)
    x, seen = optimizer.gossamer.parts[0].state.x, []
    start, average = x.clone(), Communicator.neighbor_average_async
    monkeypatch.setattr(
        Communicator,
        "neighbor_average_async",
        lambda comm, row: seen.append(row.data_ptr()) or average(comm, row),
    )
    optimizer.register_step_post_hook(lambda *_: seen.append(torch.equal(x, start)))
    train(model, optimizer, steps=1)
    assert seen == [x.data_ptr(), True]
    assert not torch.equal(x, start)
    assert all(
        p.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for p in model.parameters()
    )


def test_dnasa_with_sgd_of_rate_one_is_exact(alone):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    gossamer.attach(model, optimizer, "d-nasa", comm=alone)
    before = train(model, optimizer, steps=2)  # the first step has z = 0 and moves nothing
    after = train(model, optimizer, steps=1)
    torch.testing.assert_close((after - before).norm(), torch.tensor(3**-0.75), rtol=1e-5, atol=0)


def test_schedulers_made_before_or_after_move_the_rate(alone):
    results = []
    for before in (True, False):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if before:
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.1)
        gossamer.attach(model, optimizer, "dsgd", comm=alone)
        if not before:
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.1)
        results.append(train(model, optimizer, schedule=schedule))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)
    plain = net()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.1)
    expected = train(plain, optimizer, schedule=schedule)
    for result in results:
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


def test_frozen_parameters_stay_and_tied_ones_stay_tied(alone):
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    frozen = model[2].weight.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    gossamer.attach(model, optimizer, "dsgd", comm=alone)
    first = model[0].weight.detach().clone()
    train(model, optimizer, steps=3)
    assert torch.equal(model[2].weight, frozen)
    assert model[0].weight.data_ptr() == model[1].weight.data_ptr()
    assert not torch.equal(model[0].weight, first)


def test_parameters_of_two_dtypes_both_train(alone):
    model = net()
    model[2] = model[2].double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    gossamer.attach(model, optimizer, "dsgd", comm=alone)
    before = [p.detach().clone() for p in model.parameters()]
    hidden = model[1](model[0](torch.randn(4, 5)))
    model[2](hidden.double()).sum().backward()
    optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert not torch.equal(p, old)
        assert float(optimizer.state[p]["step"]) == 1  # once each, not once per row


def test_local_steps_between_rounds_are_the_optimizers_own(alone):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gossamer.attach(model, optimizer, "dsgd", comm=alone, every=4)
    train(model, optimizer, steps=8)
    assert optimizer.gossamer.comm.step == 2


def test_the_state_survives_a_save(alone):
    def attached():
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        fresh = Communicator(build("ring", 1), StackedTransport())
        return model, gossamer.attach(model, optimizer, "d-nasa", comm=fresh)

    model, optimizer = attached()
    train(model, optimizer, steps=5)
    saved = (optimizer.gossamer.state_dict(), copy.deepcopy(optimizer.state_dict()))
    expected = train(model, optimizer, steps=5)
    model, optimizer = attached()
    optimizer.gossamer.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert torch.equal(train(model, optimizer, steps=5), expected)


def refused(message, alone, model=None, algorithm="dsgd", optimizer=None, **options):
    model = model or net()
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=message):
        gossamer.attach(model, optimizer, algorithm, comm=alone, **options)


def test_what_cannot_work_is_refused_with_the_way_out(alone):
    refused("unknown algorithm 'dsdg'; did you mean 'dsgd'", alone, algorithm="dsdg")
    refused("every must be at least 1", alone, every=0)
    refused("buffers must be keep, average or refuse", alone, buffers="drop")
    with_statistics = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    refused("GroupNorm", alone, model=with_statistics, buffers="refuse")
    refused("batches a step", alone, algorithm={"name": "local-sgd", "local_steps": 4})
    refused("directions of whole rows, which this backward does not give", alone, algorithm="flood")
    model = net()
    partial = torch.optim.SGD(model[0].parameters(), lr=0.1)
    refused("does not hold trainable parameters", alone, model=model, optimizer=partial)
    model = net()
    adam = torch.optim.AdamW(model.parameters())
    refused("takes torch.optim.SGD without momentum", alone, model, "extra", adam)
    gossamer.attach(model, adam, "dsgd", comm=alone)
    refused("attached already", alone, model, optimizer=adam)
    refused("LBFGS", alone, model, optimizer=torch.optim.LBFGS(model.parameters()))


@pytest.mark.parametrize(
    "algorithm",
    [{"name": "dsgd", "order": "cta"}, {"name": "gradient-tracking", "order": "cta"}, "sgp"],
)
def test_a_rate_of_zero_moves_nothing(algorithm, alone):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    gossamer.attach(model, optimizer, algorithm, comm=alone)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: float(k > 2))
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert torch.equal(train(model, optimizer, 3, schedule), before)
    assert not torch.equal(train(model, optimizer, 3, schedule), before)


@pytest.mark.parametrize("algorithm", ["d2", "extra", "qg-dsgdm"])
def test_rules_with_an_update_of_their_own_follow_a_plain_sgd(algorithm, alone):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    section = {"name": algorithm}
    if algorithm == "qg-dsgdm":
        section["beta"] = 0.0
    gossamer.attach(model, optimizer, section, comm=alone)
    plain = net()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    plain_schedule = torch.optim.lr_scheduler.StepLR(plain_optimizer, 5, 0.5)
    expected = train(plain, plain_optimizer, 20, plain_schedule)
    # one rank: W = 1, and all of them are SGD, in another order of additions
    torch.testing.assert_close(train(model, optimizer, 20, schedule), expected, rtol=0, atol=1e-5)


def test_loss_scaling_skips_a_step_that_overflows(alone):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gossamer.attach(model, optimizer, "dsgd", comm=alone)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = torch.randn(4, 5)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(model(x).square().mean()).backward()
    grads = [p.grad / 1024.0 for p in model.parameters()]
    scaler.step(optimizer)
    scaler.update()
    for p, old, g in zip(model.parameters(), before, grads, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.1 * g)
    kept = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    scaler.scale(model(x).square().mean() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), kept, strict=True))
    assert optimizer.gossamer.comm.step == 1
    assert scaler.get_scale() == 512.0


def test_a_model_on_another_device_is_refused(alone):
    refused("is on meta", alone, model=net().to("meta"))


def test_averaged_buffers_keep_their_precision(alone):
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3).double())
    model[1].running_mean.fill_(1 / 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gossamer.attach(model, optimizer, "dsgd", comm=alone, buffers="average")
    optimizer.step()
    assert model[1].running_mean.tolist() == [1 / 3] * 3


def test_an_algorithm_that_needs_other_points_says_so(alone):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gossamer.attach(model, optimizer, {"name": "d-nasa", "grad_point": "half"}, comm=alone)
    with pytest.raises(ConfigError, match="gradients at other points"):
        train(model, optimizer, steps=1)


def test_an_algorithm_that_takes_no_rows_is_refused(alone, monkeypatch):
    monkeypatch.setattr(DSGD, "takes", frozenset({"directions"}))
    refused("backward gives row, of which dsgd can make no step", alone)


BATTERY = """
import torch, gossamer
from torch import nn
comm = gossamer.init(topology="ring", timeout_s=60)
rank = comm.ranks[0]
torch.manual_seed(rank)  # ranks start apart: attach must make them equal
model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
gossamer.attach(model, optimizer, "all-reduce", buffers="average")
assert optimizer.gossamer.consensus() < 1e-6  # the mean of three equal numbers rounds
reference = [p.detach().clone() for p in model.parameters()]
for k in range(3):
    x = torch.randn(8, 4) + rank
    model(x).square().mean().backward()          # accumulated over two calls
    model(x).square().mean().backward()
    mean = [comm.all_reduce(p.grad.reshape(1, -1), "mean").view_as(p) for p in model.parameters()]
    optimizer.step()
    for p, r, g in zip(model.parameters(), reference, mean):
        r -= 0.1 * g
        torch.testing.assert_close(p.detach(), r, rtol=0, atol=1e-5)
    optimizer.zero_grad()
assert optimizer.gossamer.consensus() < 1e-6
spread = comm.all_gather(model[1].running_mean[None])
assert torch.allclose(spread, spread[:1].expand_as(spread), atol=1e-6)   # ring of 3: W = J
comm.close()
print("good", rank)
"""


@pytest.mark.slow
def test_all_reduce_over_three_processes_is_the_mean_gradient(tmp_path, launch_environment):
    (tmp_path / "battery.py").write_text(BATTERY)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "battery.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=launch_environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("good") == 3
