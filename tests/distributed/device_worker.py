"""What the processes of test_device_memory.py do, on a device made of threads.

Its streams dawdle at random. Work that a stream did not wait for comes too late or too early, and
the results show it.
"""

import logging
import os
import random
import time

import pytest
import torch

from gossamer.runtime import Communicator, StackedTransport
from gossamer.runtime.collectives import RankGroup
from gossamer.runtime.device_memory import DeviceMemory
from gossamer.runtime.errors import CommError, CommTimeout, PeerLost
from gossamer.runtime.exchange import plan_exchange
from gossamer.runtime.native import DeviceGroup
from gossamer.runtime.placement import Placement
from gossamer.runtime.transports import open_transport
from gossamer.runtime.transports.native import meet_on_device, meet_on_host
from gossamer.topologies import build

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
GRAPHS = ["ring", "exponential", "one_peer_exponential", "star", "complete", "directed_ring"]


class OnThreads(DeviceMemory):
    """Rows on a device whose streams are threads of this process, by number."""

    def __init__(self, shared, seed=0, most_delay_us=0):
        group = DeviceGroup.on_host(shared._group, seed, most_delay_us)
        super().__init__(shared, torch.device("cpu"), group)
        self.stream = 0

    def _stream(self):
        return self.stream

    def alloc(self, local, d, dtype):
        rows = super().alloc(local, d, dtype)
        self.synchronize()
        return rows

    def copy(self, to, source):
        """Queue a copy of rows."""
        assert to.shape == source.shape
        for a, b in zip(to, source, strict=True):
            self._rows.copy(a.data_ptr(), b.data_ptr(), a.nbytes, self.stream)

    def synchronize(self):
        """Wait for what is queued on the stream."""
        self._rows.synchronize(self.stream)


class InStep(OnThreads):
    """For callers that look at results at once: a call returns when its work is done."""

    def _queue(self, operation, *arguments):
        status = super()._queue(operation, *arguments)
        if status == 0:
            self.synchronize()
        return status


def meet(make):
    """Return (memory, process, processes)."""
    torch.set_num_threads(1)
    meeting = open_transport("gloo", timeout_s=60)
    process, processes = meeting.process, meeting.processes
    group = RankGroup(processes, meeting, timeout_s=60)
    memory = make(meet_on_host(group, range(processes)))
    meeting.close()
    return memory, process, processes


def rows_of(n, d, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)


def lasting(*shape, kept=[]):  # noqa: B006 - meant to outlive the calls
    """Return zeros that stay until the process ends: the device writes when it gets there."""
    kept.append(torch.zeros(*shape))
    return kept[-1]


class Rows:
    """Buffers that many operations use, each overwriting what the one before left."""

    def __init__(self, memory, local):
        self.memory, self.local, self.kept = memory, local, {}

    def get(self, name, d, dtype, private):
        key = (name, d, dtype, private, self.memory.stream)
        if key not in self.kept:
            like = torch.zeros(self.local, d, dtype=dtype)
            self.kept[key] = like if private else self.memory.alloc(self.local, d, dtype)
        return self.kept[key]


def pipeline(n, seed, operations):
    """Queue many operations without ever waiting for the device; then compare all results."""
    chosen = random.Random(seed)  # the same on all processes
    memory, process, processes = meet(lambda shared: OnThreads(shared, seed, most_delay_us=1500))
    own = random.Random(1000 * seed + process)
    placement = Placement(n, processes)
    here = slice(placement.ranks(process).start, placement.ranks(process).stop)
    counts = [len(placement.ranks(p)) for p in range(processes)]
    rows = Rows(memory, counts[process])
    alive, logs = [], []
    for k in range(operations):
        kind = chosen.choice(["average", "average", "average", "sum", "exchange"])
        d, dtype = chosen.choice([1, 37, 1000, 20_003]), chosen.choice(DTYPES)
        graph, t = chosen.choice(GRAPHS), chosen.randrange(3)
        in_place, rounds, axpy = chosen.random() < 0.4, chosen.choice([1, 1, 2]), chosen.random()
        memory.stream = chosen.choice([0, 1])
        x = rows.get("x", d, dtype, own.random() < 0.3)
        y = rows.get("y", d, dtype, own.random() < 0.3)
        out = x if in_place else rows.get("out", d, dtype, own.random() < 0.3)
        full, full_y = rows_of(n, d, dtype, 2 * k), rows_of(n, d, dtype, 2 * k + 1)
        stacked = Communicator(build(graph, n), StackedTransport())
        stacked.round = t
        garbage = torch.full_like(full[here], 1e4)
        if own.random() < 0.1:
            time.sleep(0.02)

        memory.copy(x, full[here])
        memory.copy(y, full_y[here])
        if kind == "average":
            plan = plan_exchange(stacked.topology.round(t), placement, process)
            aliased = axpy < 0.2 and rounds == 1  # in several rounds it is refused
            pair = (-0.3, out if aliased else y) if axpy < 0.6 else None
            if aliased and not in_place:
                memory.copy(out, full_y[here])
            status = memory.average(memory.prepare(plan), x, out, pair, rounds, 30.0)
            full_pair = None
            if pair:
                full_pair = (-0.3, full if in_place and aliased else full_y)
            expected = stacked.neighbor_average(full, axpy=full_pair, rounds=rounds)
            result, expected = out, expected[here]
        elif kind == "sum":
            result = out[:1]
            status = memory.sum(x, result, counts, float(n), 30.0)
            expected = stacked.all_reduce(full, "mean")
        else:  # everyone's block, and a second message of every pair
            blocks = [torch.zeros(c, d, dtype=dtype) for c in counts]
            marks = [torch.zeros(3, dtype=torch.int64) for _ in counts]
            mark = torch.tensor([process, k, -1])
            block = torch.zeros(counts[process], d, dtype=dtype)
            memory.copy(block, x)
            peers = [p for p in range(processes) if p != process]
            sends = [(p, m) for p in peers for m in (block, mark)]
            receives = [(p, m[p]) for p in peers for m in (blocks, marks)]
            status = memory.exchange(sends, receives).wait(30.0)
            memory.copy(blocks[process], block)
            alive += [sends, receives, *blocks]
            logs += [(k, marks[p], torch.tensor([p, k, -1])) for p in peers]
            log = [torch.zeros_like(b) for b in blocks]
            for to, source in zip(log, blocks, strict=True):
                memory.copy(to, source)
            logs += [(k, to, full[placement.ranks(p)]) for p, to in enumerate(log)]
            result = None
        memory.check(status, f"operation {k}", 30.0)
        if result is not None:
            log = torch.zeros_like(result)
            memory.copy(log, result)
            logs.append((k, log, expected))
        memory.copy(x, garbage)  # what the peers still read must not be overwritten yet
        memory.copy(out, garbage)
        alive += [full, full_y, garbage]
    for memory.stream in (0, 1):
        memory.synchronize()
    wrong = [k for k, found, expected in logs if not torch.equal(found, expected)]
    assert not wrong, f"process {process}: operations {wrong} of {operations}"
    memory.close()
    return 0


def peer_is_gone():
    """Process 1 ends without a word; process 0 says so."""
    memory, process, _ = meet(OnThreads)
    x, out = memory.alloc(1, 10, torch.float32), lasting(1, 10)
    plan = memory.prepare(plan_exchange(build("ring", 2).round(0), Placement(2, 2), process))

    def average(k):
        status = memory.average(plan, x, out, None, 1, 30.0)
        memory.check(status, f"round {k}", 30.0)

    def until(rounds):
        for k in range(rounds):
            average(k)

    if process == 1:
        until(2)
        os._exit(0)
    # In round 1 where it was gone before its last message was read.
    with pytest.raises(PeerLost, match=r"round [12]: process 1 is gone \(native\)"):
        until(3)
    memory.close()  # does not wait for what the peer will never do
    return 0


def peer_is_late():
    """Process 1 does not come; process 0 gives up, and process 1 hears of it."""
    memory, process, _ = meet(OnThreads)
    x, out = lasting(1, 10), lasting(1, 10)
    if process == 0:
        with pytest.raises(CommTimeout, match=r"sum: no answer from process 1 within 0.2 s"):
            memory.check(memory.sum(x, out, [1, 1], 1.0, 0.2), "sum", 0.2)
        return 0
    time.sleep(1.5)
    with pytest.raises((PeerLost, CommTimeout)):
        memory.check(memory.sum(x, out, [1, 1], 1.0, 1.0), "sum", 1.0)
    return 0


def other_size():
    """The processes' rows differ in length."""
    memory, process, _ = meet(OnThreads)
    x, out = lasting(1, 10 + process), lasting(1, 10 + process)
    with pytest.raises((CommError, PeerLost), match=r"another operation's message|failure of its"):
        memory.check(memory.sum(x, out, [1, 1], 1.0, 20.0), "sum", 20.0)
    return 0


def fallback(failing):
    """One process cannot open its device, or reads wrong values: none has device memory."""

    class Broken(OnThreads):
        def sum(self, x, out, *arguments):
            status = super().sum(x, out, *arguments)
            self.synchronize()
            if int(os.environ["RANK"]) == 1:
                out.zero_()
            return status

    def open_memory(shared):
        if failing == "open" and int(os.environ["RANK"]) == 1:
            raise CommError("start: no device")
        return Broken(shared) if failing == "read" else InStep(shared)

    meeting = open_transport("gloo", timeout_s=60)
    group = RankGroup(meeting.processes, meeting, timeout_s=60)
    memory, failure = meet_on_device(group, range(meeting.processes), open_memory)
    meeting.close()
    if failing == "nothing":
        assert memory is not None
        assert failure == ""
        memory.close()
        return 0
    assert memory is None
    assert (
        failure
        == {
            "open": "start: no device",
            "read": "start: cpu read wrong values from its peers (native)",
        }[failing]
    )
    return 0


def selected(device):
    """``auto`` where every process sees one GPU, which works, or does not."""
    torch.cuda.device_count = lambda: 1
    if device == "works":
        DeviceMemory.on_cuda = classmethod(lambda cls, shared, device: InStep(shared))
    torch.cuda.set_device = lambda device: None  # a torch for CPUs has none
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("gossamer").addHandler(handler)
    transport = open_transport("auto", timeout_s=60)
    assert transport.name == "native"
    assert isinstance(transport.shared, DeviceMemory) == (device == "works")
    comm = Communicator(build("ring", 4), transport)
    full = rows_of(4, 50, torch.float32, 0)
    stacked = Communicator(build("ring", 4), StackedTransport()).neighbor_average(full)
    here = slice(comm.ranks.start, comm.ranks.stop)
    assert torch.equal(comm.neighbor_average(full[here].contiguous()), stacked[here])
    told = [m for m in messages if m.endswith("rows on the CPU")]
    assert len(told) == (device == "fails" and transport.process == 0)
    comm.close()
    return 0


def benchmark(graph):
    """What ``bench device`` does in each process, here over a device of threads."""
    from gossamer.launch.bench.device import check_averages, process_rows
    from gossamer.launch.bench.measure import Options
    from gossamer.launch.bench.world import join_world

    torch.cuda.device_count = lambda: 1
    torch.cuda.set_device = lambda device: None
    DeviceMemory.on_cuda = classmethod(lambda cls, shared, device: InStep(shared))
    transport = join_world("native").transport
    check_averages(transport)
    options = Options(4000, 64_000, 4, 2, 1, "bfloat16")
    rows = process_rows(transport, graph, options)
    assert [row["bytes"] for row in rows] == [4000, 16_000, 64_000]
    assert all(row["gbps"] > 0 and row["gloo_ratio"] > 0 for row in rows)
    transport.close()
    return 0


def gathers():
    """Every rank's rows on every process, and one process's; both in place too."""
    memory, process, processes = meet(InStep)
    counts = [2, 1, 3][:processes]
    firsts = [sum(counts[:p]) for p in range(processes)]
    full = rows_of(sum(counts), 77, torch.float64, 0)
    mine = full[firsts[process] : firsts[process] + counts[process]]
    for x in (mine, memory.alloc(counts[process], 77, torch.float64).copy_(mine)):
        out = torch.zeros_like(full)
        memory.check(memory.gather(x, out, counts, 30.0), "gather", 30.0)
        assert torch.equal(out, full)
        out = torch.zeros(1, 77, dtype=torch.float64)
        row = x[0].contiguous() if process == 1 else None
        memory.check(memory.broadcast(row, out, 1, 30.0), "broadcast", 30.0)
        assert torch.equal(out[0], full[firsts[1]])
    row = memory.alloc(1, 77, torch.float64).copy_(full[process])
    root = row[0] if process == 1 else None
    memory.check(memory.broadcast(root, row, 1, 30.0), "broadcast", 30.0)
    assert torch.equal(row[0], full[1])
    memory.close()
    return 0
