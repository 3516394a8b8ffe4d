"""Shared memory between real processes: kills, hangs, signals, other jobs and other users."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from native_ranks import Crew

NOBODY = 65534
BOUND_S = 20
"""A dead peer is noticed within 0.1 s; the rest is what a busy machine may take."""

OPERATIONS = ["average", "average in place", "sum", "exchange"]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_process_killed_at_any_instant_is_named_by_all_and_no_row_is_torn(operation):
    named = set(Path("/dev/shm").iterdir())
    for seed in range(2):
        rng = np.random.default_rng([seed, OPERATIONS.index(operation)])
        with Crew(3).attach() as crew:
            for p in range(3):
                crew.tell(p, "repeat", operation, 300.0)
            victim = int(rng.integers(3))
            time.sleep(rng.uniform(0.0, 0.2))  # an instant like any other
            assert len(crew.holders()) == 3
            crew.signal(victim, signal.SIGKILL)
            for p in {0, 1, 2} - {victim}:
                _, (error, message, whole) = crew.hear(p, BOUND_S)
                assert error == "PeerLost"
                name = operation.split()[0]
                assert message == f"{name}: process {victim} is gone (native)"
                assert whole, "a row is as it was, or averaged"
        crew.until_nobody_holds_its_memory()
    assert not {name for name in set(Path("/dev/shm").iterdir()) - named if "gossamer" in str(name)}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_hung_process_is_a_timeout_that_names_it(operation):
    with Crew(2).attach() as crew:
        for p in range(2):
            crew.tell(p, "repeat", operation, 1.0)
        time.sleep(0.05)
        crew.signal(1, signal.SIGSTOP)
        _, (error, message, whole) = crew.hear(0, 1 + BOUND_S)
        assert error == "CommTimeout"
        assert message == f"{operation.split()[0]}: no answer from process 1 within 1 s (native)"
        assert whole or operation == "average in place"
        crew.signal(1, signal.SIGCONT)  # it finds that the other one gave up
        _, (error, message, _) = crew.hear(1, BOUND_S)
        assert error == "PeerLost"
        assert "process 0 " in message
    crew.until_nobody_holds_its_memory()


def test_a_process_that_left_is_named():
    with Crew(2).attach() as crew:
        crew.members[1][1].close()  # ends it
        _, (error, message, _) = crew.ask(0, "repeat", "average", 60.0)
        assert error == "PeerLost"
        assert "process 1 is gone" in message or "process 1 has left" in message


def test_control_c_ends_a_long_wait():
    with Crew(2).attach() as crew:
        crew.tell(0, "repeat", "average", 300.0)
        time.sleep(0.3)  # it sleeps by now
        sent = time.monotonic()
        crew.signal(0, signal.SIGINT)
        error, *_ = crew.hear(0, BOUND_S)
        assert error == "KeyboardInterrupt"
        assert time.monotonic() - sent < BOUND_S
        _, (error, message, _) = crew.ask(1, "repeat", "average", 300.0)
        assert (error, message) == (
            "PeerLost",
            "average: process 0 stopped after a failure of its own (native)",
        )


def test_a_forked_child_that_leaves_does_not_take_its_parent_along():
    with Crew(2).attach() as crew:
        assert crew.ask(0, "fork_a_child_that_leaves") == ("ok", 0)
        crew.tell(1, "repeat", "average", 300.0, 3)
        time.sleep(0.3)  # it waits for process 0 and looks whether that has left
        crew.tell(0, "repeat", "average", 300.0, 3)
        assert [crew.hear(p)[1][0] for p in range(2)] == ["done", "done"]


# --- who may attach -------------------------------------------------------------------------------


def refusal(crew, p, tickets):
    error, message, _ = crew.ask(p, "attach", tickets)
    assert error == "CommError"
    return message


def test_two_jobs_at_once_never_meet():
    with Crew(2).attach() as one, Crew(2) as other:
        for p in range(2):
            one.tell(p, "repeat", "average", 300.0, 20)
        crossed = [other.tickets[0], one.tickets[1]]
        assert refusal(other, 0, crossed) == "start: process 1 is of another job (native)"
        swapped = [other.tickets[1], other.tickets[1]]
        assert refusal(other, 1, swapped) == "start: process 0 is of another job (native)"
        other.attach()
        for p in range(2):
            other.tell(p, "repeat", "sum", 300.0, 20)
        for crew in (one, other):
            assert [crew.hear(p)[1][0] for p in range(2)] == ["done", "done"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_memory_of_another_user_is_refused():
    with Crew(2) as ours, Crew(2, uid=NOBODY) as theirs:
        message = refusal(ours, 0, [ours.tickets[0], theirs.tickets[1]])
        assert f"belongs to user {NOBODY}, this process runs as user 0" in message
        message = refusal(theirs, 0, [theirs.tickets[0], ours.tickets[1]])
        assert "cannot be opened" in message
        assert "belongs to another user" in message
        assert theirs.ask(0, "memory")[1]["uid"] == NOBODY


def test_memory_is_for_its_user_only_and_cannot_be_cut_short():
    with Crew(1) as crew:
        _, memory = crew.ask(0, "memory")
        assert memory["mode"] == 0o600
        assert memory["uid"] == os.geteuid()
        assert "not permitted" in memory["refused"]


def test_what_is_not_the_memory_of_a_process_is_refused(tmp_path):
    with Crew(2) as crew:
        pid, fd, size = crew.tickets[1]
        mine = crew.tickets[0]
        assert "not of this program's kind" in refusal(crew, 0, [mine, (pid, fd, size - 4096)])
        assert "cannot be opened" in refusal(crew, 0, [mine, (pid, 999, size)])
        with (tmp_path / "file").open("w") as file:
            (tmp_path / "file").chmod(0o600)
            ticket = (os.getpid(), file.fileno(), 0)
            assert "not of this program's kind" in refusal(crew, 0, [mine, ticket])
        gone = max(int(p.name) for p in Path("/proc").glob("[0-9]*")) + 100_000
        assert f"process {gone} is gone" in refusal(crew, 0, [mine, (gone, fd, size)])
