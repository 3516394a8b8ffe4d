"""The protocol of csrc/event.h and csrc/channel.h in every interleaving, and its mistakes avoided.

The programs below are those files' steps, in their order: ``post`` and ``consume`` of a channel,
``ring`` and ``wait_until`` of a bell. A row has two halves, and is written for every message anew.
"""

import pytest
from interleavings import Explorer, Program, Violation


class Steps(Program):
    """The steps of process ``me``, with the mistakes named in ``wrong``."""

    def __init__(self, me, wrong=(), watch=()):
        super().__init__()
        self.me, self.wrong, self.watch = me, wrong, watch

    def store(self, what, name, value):
        """A sequentially consistent store, unless it is the weakened one."""
        self.code.append(
            ("write" if f"{what} is a release store" in self.wrong else "publish", name, value)
        )

    def ring(self, peer):
        if "rings before the change" not in self.wrong:
            self._ring(peer)

    def _ring(self, peer):
        awake = self.new_label()
        self.when(f"sleeping {peer}", "==", 0, awake)
        if "the number is not moved" not in self.wrong:
            self.bump(f"number {peer}")
        self.wake(peer)
        self.label(awake)

    def changed(self, what, name, value, peer):
        """Store a counter that ``peer`` may wait for, and ring."""
        if "rings before the change" in self.wrong:
            self._ring(peer)
        self.store(what, name, value)
        self.ring(peer)

    def write_row(self, slot, message):
        self.write(f"row {self.me} {slot} a", message)
        self.write(f"row {self.me} {slot} b", message)

    def post(self, to, slot, message):
        """Write a row and post it: message ``message``, from 1."""
        early = "posted before the row is complete" in self.wrong
        self.write(f"row {self.me} {slot} a", message)
        if early:
            self.changed("posted", f"posted {self.me}{to}", message, to)
        self.write(f"row {self.me} {slot} b", message)
        if not early:
            self.changed("posted", f"posted {self.me}{to}", message, to)

    def take(self, peer, slot, message):
        """Wait for message ``message`` of ``peer``, read it, and say so."""
        self.wait_until(f"posted {peer}{self.me}", ">=", message)
        early = "consumed before the row is read" in self.wrong
        if early:
            self.changed("consumed", f"consumed {peer}{self.me}", message, peer)
        self.expect(f"row {peer} {slot} a", message)
        self.expect(f"row {peer} {slot} b", message)
        if not early:
            self.changed("consumed", f"consumed {peer}{self.me}", message, peer)

    def until_read(self, peer, message):
        if "does not wait until the row is read" not in self.wrong:
            self.wait_until(f"consumed {self.me}{peer}", ">=", message)

    def wait_until(self, *condition):
        done, again, awake = self.new_label(), self.new_label() + " again", self.new_label() + "!"
        sleeping, number = f"sleeping {self.me}", f"number {self.me}"
        self.when(*condition, done)
        self.label(again)
        self.store("sleeping", sleeping, 1)
        late = "the number is noted after the look" in self.wrong
        if not late:
            self.note(number)
        if "no look after saying that it sleeps" not in self.wrong:
            self.when(*condition, awake)
        if late:
            self.note(number)
        self.sleep(number)
        self.label(awake)
        self.write(sleeping, 0)
        self.when(*condition, done)
        for peer in self.watch:
            self.when_alive(peer, again)
            if "no look after the peer's end" not in self.wrong:
                self.when(*condition, done)
            self.give_up()
        self.jump(again)
        self.label(done)


def stream(messages, slots, wrong=(), watch=False):
    """Process 0 sends to process 1 through a ring of slots."""
    sender = Steps(0, wrong, (1,) if watch else ())
    receiver = Steps(1, wrong, (0,) if watch else ())
    for m in range(1, messages + 1):
        if m > slots:
            sender.until_read(1, m - slots)
        sender.post(1, m % slots, m)
        receiver.take(0, m % slots, m)
    sender.until_read(1, messages)
    return [sender, receiver]


def swap(rounds, wrong=(), watch=False):
    """Two processes read each other's row in place, then write their own again."""
    programs = []
    for me in (0, 1):
        steps = Steps(me, wrong, (1 - me,) if watch else ())
        for m in range(1, rounds + 1):
            steps.post(1 - me, 0, m)
            steps.take(1 - me, 0, m)
            steps.until_read(1 - me, m)
        programs.append(steps)
    return programs


def fan_in(wrong=()):
    """Two processes send to a third: its one bell rings for what it does not wait for, too."""
    receiver, senders = Steps(0, wrong), [Steps(1, wrong), Steps(2, wrong)]
    for me, sender in enumerate(senders, 1):
        sender.post(0, 0, 1)
        sender.until_read(0, 1)
        receiver.take(me, 0, 1)
    return [receiver, *senders]


def reuse(wrong=()):
    """Process 0 waits for memory to stage in: until process 1 has read what lies there."""
    sender, reader = Steps(0, wrong), Steps(1, wrong)
    free, late = sender.new_label(), sender.new_label() + " late"
    sender.post(1, 0, 1)
    sender.when("consumed 01", ">=", 1, free)  # the search for a part that is not read
    if "waits for a change after the look" in wrong:
        sender.when("consumed 01", ">=", 1, late)  # the counter that is to change
        sender.until_read(1, 1)
        sender.jump(free)
        sender.label(late)
        sender.until_read(1, 2)
    else:
        sender.until_read(1, 1)
    sender.label(free)
    sender.write_row(0, 2)
    reader.take(0, 0, 1)
    return [sender, reader]


SCENARIOS = {
    "a stream through one slot": lambda **k: stream(3, 1, **k),
    "a stream through two slots": lambda **k: stream(3, 2, **k),
    "rows swapped in place": lambda **k: swap(2, **k),
    "two senders, one bell": lambda **k: fan_in(**k),
    "memory staged again": lambda **k: reuse(**k),
}


@pytest.mark.parametrize("buffered", [False, True], ids=["sequential", "store buffers"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_interleaving_ends_with_every_row_whole(scenario, buffered):
    explored = Explorer(SCENARIOS[scenario](), buffered=buffered)
    assert explored.states > 100


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("scenario", ["stream", "swap"])
def test_a_process_killed_between_any_two_steps_leaves_no_peer_waiting(scenario, victim):
    programs = stream(2, 1, watch=True) if scenario == "stream" else swap(1, watch=True)
    Explorer(programs, mortal=(victim,))


MISTAKES = {
    "no look after saying that it sleeps": "waits for ever",
    "the number is noted after the look": "waits for ever",
    "the number is not moved": "waits for ever",
    "rings before the change": "waits for ever",
    "posted before the row is complete": "reads",
    "consumed before the row is read": "reads",
    "does not wait until the row is read": "reads",
}


@pytest.mark.parametrize("buffered", [False, True], ids=["sequential", "store buffers"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_step_of_the_protocol_is_needed(mistake, buffered):
    with pytest.raises(Violation, match=MISTAKES[mistake]):
        Explorer(stream(2, 1, wrong=(mistake,)), buffered=buffered)


@pytest.mark.parametrize("buffered", [False, True], ids=["sequential", "store buffers"])
def test_whoever_waits_for_memory_names_the_message_it_waits_for(buffered):
    with pytest.raises(Violation, match="waits for ever"):
        Explorer(reuse(wrong=("waits for a change after the look",)), buffered=buffered)


@pytest.mark.parametrize("what", ["posted", "consumed", "sleeping"])
def test_release_stores_would_not_do(what):
    wrong = (f"{what} is a release store",)
    Explorer(stream(2, 1, wrong=wrong), buffered=False)  # the order of the steps is right
    with pytest.raises(Violation, match="waits for ever"):
        Explorer(stream(2, 1, wrong=wrong), buffered=True)


def test_without_slices_a_dead_peer_is_waited_for():
    with pytest.raises(Violation, match="waits for ever"):
        Explorer(stream(2, 1), mortal=(0,))


def impatient(look_first=False):
    """Process 0 gives up before its row was read, says so, and writes the row again."""
    sender, reader = Steps(0), Steps(1)
    sender.post(1, 0, 1)
    sender.publish("failed 0", 1)
    sender.write_row(0, 2)
    reader.wait_until("posted 01", ">=", 1)
    has_failed = reader.new_label()
    if look_first:
        reader.when("failed 0", "==", 1, has_failed)
    reader.look_at("row 0 0 a", 1)
    reader.look_at("row 0 0 b", 1)
    if not look_first:
        reader.when("failed 0", "==", 1, has_failed)
    reader.believe()
    reader.label(has_failed)
    return [sender, reader]


@pytest.mark.parametrize("buffered", [False, True], ids=["sequential", "store buffers"])
def test_a_row_of_a_peer_that_gave_up_does_not_count(buffered):
    Explorer(impatient(), buffered=buffered)
    with pytest.raises(Violation, match="a peer that gave up"):
        Explorer(impatient(look_first=True), buffered=buffered)
