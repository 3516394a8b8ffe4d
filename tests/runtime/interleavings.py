"""Explores every interleaving of small programs that share memory, as x86 orders their accesses.

A process has a store buffer: a plain (or release, or relaxed) store waits in it for any time, then
reaches memory; stores keep their order, and the process itself reads its own. Sequentially
consistent stores, read-modify-writes and system calls wait until the buffer is empty. Without
buffers (``buffered=False``) every access is sequentially consistent.

Instructions: ``write`` a plain store, ``publish`` a sequentially consistent one, ``expect`` a read
that must find a value, ``note`` a read into the process's register, ``bump`` an atomic increment,
``when`` a read and a jump, ``jump``, ``sleep`` futex(FUTEX_WAIT) if a word equals the register,
``wake`` futex(FUTEX_WAKE), ``when_alive`` a jump if a process lives, ``give_up`` the named error.
``look_at`` is an ``expect`` that is only held against the process when it comes to ``believe``.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

COMPARE = {"==": operator.eq, "!=": operator.ne, "<": operator.lt, ">=": operator.ge}


class Process(NamedTuple):
    at: int = 0
    noted: int = 0
    asleep: bool = False
    alive: bool = True
    deceived: bool = False
    buffer: tuple = ()


class State(NamedTuple):
    memory: tuple
    processes: tuple


class Violation(Exception):
    """A read found what it must not find, or a process waits for ever."""


class Program:
    """Instructions of one process; jumps name labels."""

    def __init__(self):
        self.code, self.labels = [], {}

    def __getattr__(self, name):
        return lambda *operands: self.code.append((name, *operands))

    def label(self, name):
        self.labels[name] = len(self.code)

    def new_label(self):
        return f"label {len(self.code)} {len(self.labels)}"


class Explorer:
    """All states that the programs can reach; raises ``Violation`` at the first bad one."""

    def __init__(self, programs, *, buffered=True, mortal=(), limit=2_000_000):
        self.programs, self.buffered, self.mortal = programs, buffered, mortal
        names = sorted({op for p in programs for i in p.code for op in i[1:2] if i[0] in _READS})
        self.place = {name: k for k, name in enumerate(names)}
        self.code = [[self._resolved(i, p) for i in p.code] for p in programs]
        start = State((0,) * len(names), (Process(),) * len(programs))
        self.before, self.states = {start: None}, 0
        self._explore(start, limit)

    def _resolved(self, instruction, program):
        name, *operands = instruction
        if name in _READS:
            operands[0] = self.place[operands[0]]
        if name in _JUMPS:
            operands[-1] = program.labels[operands[-1]]
        return (name, *operands)

    def _explore(self, start, limit):
        ends, sources, frontier = [], {}, [start]
        while frontier:
            state = frontier.pop()
            if all(self._ended(state, p) for p in range(len(self.code))):
                ends.append(state)
            for following, counts in self._steps(state):
                if counts:
                    sources.setdefault(following, []).append(state)
                if following not in self.before:
                    self.before[following] = state
                    frontier.append(following)
            assert len(self.before) < limit, "too many states"
        self.states = len(self.before)
        # From everywhere an end can be reached without the help of chance.
        good = set(ends)
        frontier = ends
        while frontier:
            for state in sources.get(frontier.pop(), ()):
                if state not in good:
                    good.add(state)
                    frontier.append(state)
        for state in self.before:
            if state not in good:
                self._fail(state, "waits for ever")

    def _ended(self, state, p):
        process = state.processes[p]
        over = not process.alive or process.at >= len(self.code[p])
        return over and not process.buffer

    def _fail(self, state, what):
        history = [state]
        while self.before[history[-1]] is not None:
            history.append(self.before[history[-1]])
        shown = [" ".join(str(p.at) for p in s.processes) for s in reversed(history)]
        raise Violation(f"{what}: {state}; program counters: {', '.join(shown)}")

    def _steps(self, state):
        """Yield (next state, whether it happens for sure if nothing else does)."""
        someone_died = not all(p.alive for p in state.processes)
        for p, process in enumerate(state.processes):
            if process.buffer:
                (place, value), *rest = process.buffer
                yield self._with(state, p, process._replace(buffer=tuple(rest)), place, value), True
            if not process.alive or process.at >= len(self.code[p]):
                continue
            if p in self.mortal and not someone_died:
                yield self._with(state, p, process._replace(alive=False, asleep=False)), False
            if process.asleep:
                # A signal, or the end of a slice. A slice always ends; but in a run where nobody
                # dies, nobody may need it.
                woken = process._replace(at=process.at + 1, asleep=False)
                yield self._with(state, p, woken), someone_died
            else:
                following = self._instruction(state, p, process)
                if following is not None:
                    yield following, True

    def _with(self, state, p, process, place=None, value=None):
        processes = (*state.processes[:p], process, *state.processes[p + 1 :])
        memory = state.memory
        if place is not None:
            memory = (*memory[:place], value, *memory[place + 1 :])
        return State(memory, processes)

    def _load(self, state, process, place):
        for stored, value in reversed(process.buffer):
            if stored == place:
                return value
        return state.memory[place]

    def _instruction(self, state, p, process):
        name, *operands = self.code[p][process.at]
        onward = process._replace(at=process.at + 1)
        if name == "write" and self.buffered:
            return self._with(state, p, onward._replace(buffer=(*process.buffer, tuple(operands))))
        if name in ("publish", "bump", "sleep", "wake") and process.buffer:
            return None  # drains first
        if name in ("write", "publish"):
            return self._with(state, p, onward, *operands)
        if name == "bump":
            return self._with(state, p, onward, operands[0], state.memory[operands[0]] + 1)
        if name == "note":
            value = self._load(state, process, operands[0])
            return self._with(state, p, onward._replace(noted=value))
        if name == "expect":
            found = self._load(state, process, operands[0])
            if found != operands[1]:
                self._fail(state, f"process {p} reads {found} instead of {operands[1]}")
            return self._with(state, p, onward)
        if name == "look_at":
            deceived = self._load(state, process, operands[0]) != operands[1]
            return self._with(state, p, onward._replace(deceived=deceived or process.deceived))
        if name == "believe":
            if process.deceived:
                self._fail(state, f"process {p} reads a row of a peer that gave up")
            return self._with(state, p, onward)
        if name == "sleep":
            if state.memory[operands[0]] == process.noted:
                return self._with(state, p, process._replace(asleep=True))
            return self._with(state, p, onward)
        if name == "wake":
            state = self._with(state, p, onward)
            peer = state.processes[operands[0]]
            if not peer.asleep:
                return state
            return self._with(state, operands[0], peer._replace(asleep=False, at=peer.at + 1))
        if name == "give_up":
            return self._with(state, p, process._replace(at=len(self.code[p])))
        return self._with(
            state, p, process._replace(at=self._target(state, process, name, operands))
        )

    def _target(self, state, process, name, operands):
        target = operands[-1]
        if name == "when":
            place, comparison, value = operands[:3]
            jumps = COMPARE[comparison](self._load(state, process, place), value)
        elif name == "when_alive":
            peer = state.processes[operands[0]]
            # The kernel reports an end when it is complete: everything stored is in memory.
            jumps = peer.alive or bool(peer.buffer)
        else:
            assert name == "jump", name
            jumps = True
        return target if jumps else process.at + 1


_READS = ("write", "publish", "expect", "look_at", "note", "bump", "when", "sleep")
_JUMPS = ("when", "when_alive", "jump")
