"""The compiled group by itself, threads as its processes: what it refuses, and what it holds up."""

import os
import secrets
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gossamer.runtime.native import AveragePlan, DeviceGroup, Exchange, Group

FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = range(4)
TIMEOUT, STOPPED, MISMATCH = 1, 4, 5  # outcomes of csrc/group.h
REFUSED = (IndexError, ValueError)


def groups(n):
    """Return the groups of n processes, all in this one."""
    job = secrets.token_bytes(16)
    made = [Group.create(job, p, n, 64 << 20, 1) for p in range(n)]
    for group in made:
        group.attach([g.ticket for g in made])
    return made


def at_once(*calls):
    """Run every call in a thread of its own; return their results."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(60) for future in [pool.submit(call) for call in calls]]


def mean_plan(me, n, local=1):
    """Every row becomes the mean of all rows."""
    peers = [p for p in range(n) if p != me]
    rows, terms = list(range(local)), n * local
    return AveragePlan.create(
        peers,
        rows,
        local,
        [(p, rows, rows) for p in peers],
        np.arange(local + 1) * terms,
        np.tile(np.arange(terms), local),
        np.full(local * terms, 1 / terms),
        np.full(local, len(peers)),
    )


def at(rows):
    return rows.__array_interface__["data"][0]


def average(group, plan, x, out, y=None, rounds=1, dtype=FLOAT32, timeout_s=5.0):
    """Call the average of rows of float32 (or bytes said to be of ``dtype``)."""
    size = {FLOAT32: 4, FLOAT64: 8}.get(dtype, 2)
    d = x.shape[1] * x.itemsize // size
    addend = (0, 0) if y is None else (at(y), y.strides[0])
    return group.average(
        plan, at(x), x.strides[0], at(out), out.strides[0], *addend, 1.0, d, dtype, rounds, 1,
        timeout_s,
    )  # fmt: skip


def rows(value, count=1, d=200):
    return np.full((count, d), value, dtype=np.float32)


def assert_works(made, local=1):
    """Nothing of what was refused is on its way: the next averages are right."""
    n = len(made)
    for k in range(2):

        def work(p, k=k):
            x, out = rows(10 * k + p, local), rows(0, local)
            assert average(made[p], mean_plan(p, n, local), x, out) == 0
            np.testing.assert_allclose(out, 10 * k + (n - 1) / 2, rtol=1e-6)

        at_once(*(lambda p=p: work(p) for p in range(n)))


# --- peers, roots and counts ----------------------------------------------------------------------


def terms(own_weight=1.0, column=0):
    return np.array([0, 1]), np.array([column]), np.array([own_weight]), np.array([1])


BAD_CALLS = {
    "a root that there is not": lambda g, x: g.broadcast(at(x), 99, at(x), 16, 1.0),
    "counts of more processes": lambda g, x: g.sum(at(x), 0, [1] * 5, at(x), 4, FLOAT32, 1.0, 1.0),
    "counts of fewer processes": lambda g, x: g.sum(at(x), 0, [1], at(x), 4, FLOAT32, 1.0, 1.0),
    "a process without rows": lambda g, x: g.sum(at(x), 0, [1, 0], at(x), 4, FLOAT32, 1.0, 1.0),
    "a dtype that there is not": lambda g, x: g.sum(at(x), 0, [1, 1], at(x), 4, 9, 1.0, 1.0),
    "gather: more counts": lambda g, x: g.gather(at(x), 0, [1] * 5, at(x), 16, 1.0),
    "gather: fewer counts": lambda g, x: g.gather(at(x), 0, [1], at(x), 16, 1.0),
    "gather: x in another's place": lambda g, x: g.gather(at(x) + 16, 16, [1, 1], at(x), 16, 1.0),
    "a send to nobody": lambda g, x: Exchange(g, [(1, at(x), 800), (7, at(x), 800)], []),
    "a send to itself": lambda g, x: Exchange(g, [(1, at(x), 800), (0, at(x), 800)], []),
    "from nobody": lambda g, x: Exchange(g, [], [(1, at(x), 800), (7, at(x), 800)]),
    "a target that there is not": lambda g, x: average(
        g, AveragePlan.create([9], [0], 1, [], *terms()), x, x
    ),
    "itself as a target": lambda g, x: average(
        g, AveragePlan.create([0], [0], 1, [], *terms()), x, x
    ),
    "a source that there is not": lambda g, x: average(
        g, AveragePlan.create([1], [0], 1, [(9, [0], [0])], *terms()), x, x
    ),
    "a staged row that there is not": lambda g, x: average(
        g, AveragePlan.create([1], [3], 1, [], *terms()), x, x
    ),
    "a term outside the table": lambda g, x: average(
        g,
        AveragePlan.create(
            [1], [0], 1, [], np.array([0, 1]), np.array([4]), np.array([1.0]), np.array([1])
        ),
        x,
        x,
    ),
}


@pytest.mark.parametrize("call", BAD_CALLS)
def test_what_names_no_process_or_row_is_refused_before_anything_is_sent(call):
    made = groups(2)
    with pytest.raises(REFUSED):
        BAD_CALLS[call](made[0], rows(1.0))
    assert_works(made)


def on_device(made):
    return [DeviceGroup.on_host(group, 0, 0) for group in made]


BAD_DEVICE_CALLS = {
    "a send to nobody": lambda g, x: g.exchange([(1, at(x), 800), (7, at(x), 800)], [], 1.0, 0),
    "from nobody": lambda g, x: g.exchange([], [(7, at(x), 800)], 1.0, 0),
    "from itself": lambda g, x: g.exchange([], [(0, at(x), 800)], 1.0, 0),
    "counts of more processes": lambda g, x: g.sum(
        at(x), 0, [1] * 5, at(x), 4, FLOAT32, 1.0, 1.0, 0
    ),
    "a target that there is not": lambda g, x: g.average(
        AveragePlan.create([9], [0], 1, [], *terms()),
        at(x), 0, at(x), 0, 0, 0, 0.0, 4, FLOAT32, 1, 1.0, 0,
    ),
    "a source that there is not": lambda g, x: g.average(
        AveragePlan.create([1], [0], 1, [(9, [0], [0])], *terms()),
        at(x), 0, at(x), 0, 0, 0, 0.0, 4, FLOAT32, 1, 1.0, 0,
    ),
    "axpy is overwritten": lambda g, x: g.average(
        mean_plan(0, 2), at(x), 0, at(x), 0, at(x), 0, 1.0, 4, FLOAT32, 2, 1.0, 0
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", BAD_DEVICE_CALLS)
def test_devices_refuse_the_same(call):
    made = on_device(groups(2))
    with pytest.raises(REFUSED):
        BAD_DEVICE_CALLS[call](made[0], rows(1.0))
    sent, received = rows(3.0), rows(0.0)
    done = at_once(
        lambda: made[0].exchange([(1, at(sent), 800)], [], 5.0, 0),
        lambda: made[1].exchange([], [(0, at(received), 800)], 5.0, 0),
    )
    made[1].synchronize(0)
    assert done == [0, 0]
    assert (received == 3.0).all()
    at_once(*(group.close for group in made))


# --- rows that overlap ----------------------------------------------------------------------------


@pytest.mark.parametrize("local", [1, 2], ids=["one row", "two rows"])
@pytest.mark.parametrize("what", ["x", "axpy"])
def test_an_output_on_part_of_a_source_is_refused_before_anything_is_sent(local, what):
    made = groups(2)
    buffer = rows(5.0, local, 300)
    x = buffer[:, :200] if what == "x" else rows(5.0, local)
    y = buffer[:, :200] if what == "axpy" else None
    with pytest.raises(ValueError, match="in part"):
        average(made[0], mean_plan(0, 2, local), x, buffer[:, 5:205], y)
    assert_works(made, local)


def test_output_rows_that_overlap_each_other_are_refused():
    made = groups(2)
    x = rows(1.0, 2)
    out = np.lib.stride_tricks.as_strided(rows(0.0, 2), (2, 200), (0, 4))
    with pytest.raises(ValueError, match="overlap"):
        average(made[0], mean_plan(0, 2, 2), x, out)
    assert_works(made, 2)


@pytest.mark.parametrize("local", [1, 2], ids=["one row", "two rows"])
def test_rows_that_are_the_same_may_be_sources_and_outputs(local):
    made = groups(2)
    x = [rows(1.0 + p, local) for p in range(2)]
    call = [lambda p=p: average(made[p], mean_plan(p, 2, local), x[p], x[p], x[p]) for p in (0, 1)]
    assert at_once(*call) == [0, 0]
    assert (x[0] == 2.5).all()
    assert (x[1] == 3.5).all()


@pytest.mark.parametrize("in_place", [False, True])
def test_an_addend_that_an_earlier_round_would_overwrite_is_refused(in_place):
    made = groups(2)
    x = rows(1.0)
    out = x if in_place else rows(2.0)
    with pytest.raises(ValueError, match="overwrite the rows of axpy"):
        average(made[0], mean_plan(0, 2), x, out, out, rounds=2)
    assert (out == (1.0 if in_place else 2.0)).all()
    assert_works(made)


# --- messages between pairs -----------------------------------------------------------------------


def test_peers_that_do_not_receive_hold_up_no_message_to_another():
    made = groups(5)
    large, small = np.ones(16 << 20, np.uint8), np.full(1000, 7, np.uint8)
    there = np.zeros(1000, np.uint8)
    to_three = Exchange(made[0], [(p, at(large), large.size) for p in (1, 2, 3)], [])
    to_one = Exchange(made[0], [(4, at(small), small.size)], [])
    assert Exchange(made[4], [], [(0, at(there), there.size)]).wait(2.0) == 0
    assert (there == small).all()
    received = [np.zeros(large.size, np.uint8) for _ in range(3)]
    late = [Exchange(made[p], [], [(0, at(received[p - 1]), large.size)]) for p in (1, 2, 3)]
    waits = [lambda e=e: e.wait(20.0) for e in (to_three, to_one, *late)]
    assert at_once(*waits) == [0] * 5
    assert all((r == 1).all() for r in received)


def test_many_peers_have_a_piece_on_its_way_each():
    n = 24
    made = groups(n)
    large = np.arange(3 << 20, dtype=np.uint8)
    sent = Exchange(made[0], [(p, at(large), large.size) for p in range(1, n)], [])
    last = np.zeros_like(large)
    receives = Exchange(made[n - 1], [], [(0, at(last), last.size)])
    received = threading.Thread(target=receives.wait, args=(20.0,))
    received.start()
    while sent.test() is None and received.is_alive():  # the others never receive
        received.join(0.001)
    assert not received.is_alive()
    assert (last == large).all()


DIFFERENT = {
    "bfloat16 and float16": (BFLOAT16, FLOAT16, 64),
    "float32 and half as many float64": (FLOAT32, FLOAT64, 64),
    "large, float32 and half as many float64": (FLOAT32, FLOAT64, 40_000),
}


@pytest.mark.parametrize("operation", ["average", "sum"])
@pytest.mark.parametrize("what", DIFFERENT)
def test_rows_of_different_dtypes_do_not_meet(what, operation):
    first, second, d = DIFFERENT[what]
    made = groups(2)

    def call(p, dtype):
        x, out = rows(1.0, d=d), rows(0.0, d=d)
        if operation == "average":
            return average(made[p], mean_plan(p, 2), x, out, dtype=dtype)
        count = d * 4 // {FLOAT32: 4, FLOAT64: 8}.get(dtype, 2)
        return made[p].sum(at(x), 0, [1, 1], at(out), count, dtype, 1.0, 5.0)

    outcomes = [s % 8 for s in at_once(lambda: call(0, first), lambda: call(1, second))]
    assert MISMATCH in outcomes
    assert set(outcomes) <= {MISMATCH, STOPPED}


def test_rows_of_different_dtypes_do_not_meet_on_devices():
    made = on_device(groups(2))

    def call(p, dtype, d):
        x = rows(1.0)
        return made[p].sum(at(x), 0, [1, 1], at(x), d, dtype, 1.0, 5.0, 0)

    outcomes = [s % 8 for s in at_once(lambda: call(0, FLOAT32, 32), lambda: call(1, FLOAT64, 16))]
    assert MISMATCH in outcomes


# --- after a failure, and in a child --------------------------------------------------------------


def test_memory_is_not_handed_out_again_once_the_group_has_failed():
    made = groups(2)
    first, second = made[0].allocate(1 << 16), made[0].allocate(1 << 16)
    freed = at(first)
    del first
    first = made[0].allocate(1 << 16)
    assert at(first) == freed  # while all is well it is
    assert average(made[0], mean_plan(0, 2), rows(1.0), rows(0.0), timeout_s=0.05) % 8 == TIMEOUT
    del first
    assert at(made[0].allocate(1 << 16)) not in (freed, at(second))


CHILD_CALLS = {
    "average": lambda g, x: average(g, mean_plan(0, 2), x, x, timeout_s=0.1),
    "sum": lambda g, x: g.sum(at(x), 0, [1, 1], at(x), 4, FLOAT32, 1.0, 0.1),
    "exchange": lambda g, x: Exchange(g, [(1, at(x), 16)], []),
    "allocate": lambda g, x: g.allocate(100),
    "device": lambda g, x: DeviceGroup.on_host(g, 0, 0).exchange([(1, at(x), 16)], [], 0.1, 0),
}


@pytest.mark.parametrize("call", CHILD_CALLS)
def test_a_forked_child_is_refused(call):
    made = groups(2)
    pid = os.fork()
    if pid == 0:
        try:
            CHILD_CALLS[call](made[0], rows(1.0))
            os._exit(1)
        except RuntimeError as error:
            os._exit(0 if "forked" in str(error) else 2)
        finally:
            os._exit(3)
    assert os.waitpid(pid, 0)[1] == 0
    assert_works(made)
