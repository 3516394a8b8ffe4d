"""Learning-rate schedules against their formulas."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles_for_tests import Trial

from gossamer.algorithms.decentralized.slowmo import SlowMo
from gossamer.algorithms.optimizers.sgd import SGD
from gossamer.algorithms.schedules import Scheduled
from gossamer.runtime import Communicator, ConfigError, StackedTransport
from gossamer.runtime.component import validate
from gossamer.topologies import build


def communicator(ranks=2, steps=None):
    return Communicator(build("complete", ranks), StackedTransport(), steps=steps)


def rates(steps, count=None, ranks=2, **fields):
    comm, schedule = communicator(ranks, steps), Scheduled(lr=1.0, **fields)
    found = []
    for comm.step in range(count or steps):
        found.append(schedule.rate(comm))
    return found


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("sqrt", [1.0, 1 / math.sqrt(2), 1 / math.sqrt(3), 0.5]),
        ("sqrt_n_over_t", [1.0, 1.0, math.sqrt(2 / 3), math.sqrt(0.5)]),
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]),
    ],
)
def test_a_schedule_gives_the_rates_it_names(schedule, expected):
    assert rates(4, schedule=schedule) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_warmup_rises_linearly_from_0(schedule):
    assert rates(40, 5, schedule=schedule, warmup=4) == [0.0, 0.25, 0.5, 0.75, 1.0]


@given(
    schedule=st.sampled_from(["linear", "cosine"]),
    warmup=st.integers(0, 20),
    fall=st.integers(2, 400),
    floor=st.floats(0, 0.9),
)
def test_a_falling_rate_starts_at_lr_and_ends_at_its_floor(schedule, warmup, fall, floor):
    found = rates(warmup + fall, schedule=schedule, warmup=warmup, lr_floor=floor)
    assert found[warmup] == 1.0
    after = found[warmup:]
    assert all(a > b > floor for a, b in pairwise(after))
    # A step before the end: what the slope takes in one, pi / 2 fall at most.
    assert found[-1] - floor <= (1 - floor) * (math.pi / 2) / fall + 1e-12


def test_the_recipe_of_sltrain():
    found = rates(11_000, schedule="cosine", warmup=1_100, lr_floor=0.1)
    for u in (0, 1, 1_099, 1_100, 1_101, 6_000, 10_999):
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (u - 1_100) / (11_000 - 1_100)))
        expected = u / 1_100 if u < 1_100 else cosine
        assert found[u] == pytest.approx(expected, rel=1e-14)
    assert found[-1] == pytest.approx(0.1, abs=1e-7)


@given(
    cycle=st.integers(2, 30),
    cycles=st.integers(1, 5),
    floor=st.sampled_from([0.0, 0.1]),
    data=st.data(),
)
def test_a_rate_with_restarts_is_relora_s(cycle, cycles, floor, data):
    warmup, rewarm = (data.draw(st.integers(0, cycle - 1)) for _ in range(2))
    steps = cycle * cycles
    fields = {"warmup": warmup, "lr_floor": floor}
    plain = rates(steps, schedule="cosine", **fields)
    found = rates(steps, schedule="cosine-restarts", cycle=cycle, rewarm=rewarm, **fields)
    for u in range(steps):
        j = u % cycle
        if u >= cycle and j < rewarm:
            assert found[u] == pytest.approx(j / rewarm * plain[u - j + rewarm], rel=1e-15)
        else:
            assert found[u] == plain[u]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr_floor": 0.1}, r"lr_floor: has no effect on schedule: constant"),
        ({"schedule": "sqrt", "lr_floor": 0.1}, r"lr_floor: has no effect on schedule: sqrt"),
        ({"schedule": "cosine", "cycle": 5}, r"cycle: has no effect on schedule: cosine"),
        ({"schedule": "linear", "rewarm": 5}, r"rewarm: has no effect on schedule: linear"),
        ({"schedule": "cosine-restarts"}, r"cycle: cosine-restarts needs the steps between"),
        (
            {"schedule": "cosine-restarts", "cycle": 5, "rewarm": 5},
            r"rewarm: must be less than cycle, 5",
        ),
        (
            {"schedule": "cosine-restarts", "cycle": 5, "warmup": 7},
            r"warmup: must be less than cycle, 5",
        ),
        ({"lr_floor": 1.0, "schedule": "cosine"}, r"lr_floor: must be less than 1"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        validate(SGD, {"lr": 0.1, **fields}, "optimizer")


def test_a_horizon_that_is_no_multiple_of_the_cycle_is_refused():
    fields = {"schedule": "cosine-restarts", "cycle": 100}
    assert len(rates(300, **fields)) == 300
    with pytest.raises(ConfigError, match=r"cycle: 100 does not divide the run's 250 steps.* 300"):
        rates(250, 1, **fields)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_with_an_end_asks_for_the_number_of_steps(schedule):
    with pytest.raises(ConfigError, match=f"schedule: {schedule} needs the number of steps"):
        rates(None, 1, schedule=schedule)


@pytest.mark.parametrize("base", ["local", "gossip"])
def test_slow_momentum_waits_for_the_first_rate_above_0(base):
    optimizer = SGD(lr=0.1, warmup=2)
    trial = Trial(SlowMo(tau=1, base=base, optimizer=optimizer), build("ring", 3))
    start = trial.x.copy()
    trial.step()
    np.testing.assert_allclose(trial.x, start, rtol=0, atol=1e-15)
    trial.step()
    assert 1e-6 < np.abs(trial.x - start).max() < 1
