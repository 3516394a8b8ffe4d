"""A process that is stopped while it writes, and comes back when its peer has given up on it."""

import contextlib
import signal
import time

import pytest
from native_ranks import Crew

D = 16 << 20
PIECE = 32 << 10  # elements: at most two pieces are written before a process looks again
TIMEOUT, STOPPED, TORN = 1, 4, 7  # outcomes of csrc/group.h
PATIENCE_S, FAREWELL_S = 1.0, 2.0


@contextlib.contextmanager
def stopped(operation):
    """Give a crew of two: process 0 is stopped where its result appears, process 1 gives up."""
    for _ in range(5):
        with Crew(2).attach() as crew:
            crew.tell(0, "once", operation, D, PATIENCE_S, True)
            crew.tell(1, "once", operation, D, PATIENCE_S)
            if not crew.until_stopped(0):
                continue  # it was done before it noticed
            yield crew
            return
    pytest.skip("the machine is too busy to stop a process at the right time")


def outcome(crew, p):
    _, status = crew.hear(p, 30)
    return status % 8


def test_a_row_that_a_stopped_process_leaves_half_averaged_is_said_to_be_torn():
    with stopped("average in place") as crew:
        assert outcome(crew, 1) == TIMEOUT
        crew.signal(0, signal.SIGCONT)
        assert outcome(crew, 0) == TORN
        assert set(crew.ask(0, "values")[1]) == {1.0, 1.5}
        assert crew.ask(1, "values")[1] == {1.5: D}, "the row of who gave up is whole"


def test_a_process_that_comes_back_never_takes_what_its_peer_wrote_meanwhile():
    with stopped("average in place") as crew:
        time.sleep(PATIENCE_S + 0.3)  # the peer has given up, and leaves it time to finish
        crew.signal(0, signal.SIGCONT)
        came_back = outcome(crew, 0)
        assert came_back in (0, TORN)  # torn only where the machine is very busy
        values = crew.ask(0, "values")[1]
        assert values == {1.5: D} if came_back == 0 else set(values) == {1.0, 1.5}
        assert outcome(crew, 1) == TIMEOUT
        assert crew.ask(1, "values")[1] == {1.5: D}


def test_nothing_is_written_into_the_result_of_a_peer_that_has_given_up():
    with stopped("sum") as crew:
        assert outcome(crew, 1) == TIMEOUT
        crew.ask(1, "fill", -1.0)  # what it got back is its own again
        crew.signal(0, signal.SIGCONT)
        assert outcome(crew, 0) == STOPPED
        assert crew.ask(1, "values")[1].get(3.0, 0) <= PIECE
