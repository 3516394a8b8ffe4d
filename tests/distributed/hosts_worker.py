"""What the processes on separate hosts run: ``python hosts_worker.py NAME ARGUMENTS``."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from gossamer.runtime import CommError, Communicator, ConfigError, StackedTransport, open_transport
from gossamer.runtime.hierarchical import ShardedPlan
from gossamer.topologies import build

TIMEOUT_S = 60
GRAPHS = ["ring", "exponential", "one_peer_exponential", "star", "directed_ring"]


def say(value):
    """Tell the test, in a line of its own."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def here(comm):
    return slice(comm.ranks.start, comm.ranks.stop)


def battery(transport, n):
    """Every operation against the stacked communicator, to the bit."""
    n = int(n)
    assert transport.name == "hybrid", transport.name
    for graph in GRAPHS:
        topology = build(graph, n)
        comm = Communicator(topology, transport, timeout_s=TIMEOUT_S)
        stacked = Communicator(topology, StackedTransport())
        full = stacked.random("x").normal_(stacked.alloc(3001))
        x = comm.alloc(3001).copy_(full[here(comm)])
        for t in range(2):
            comm.round = stacked.round = t
            comm.neighbor_average(x, out=x, axpy=(0.5, x.clone()), rounds=2)
            stacked.neighbor_average(full, out=full, axpy=(0.5, full.clone()), rounds=2)
            assert torch.equal(x, full[here(comm)]), (graph, t)
        assert torch.equal(comm.neighbor_average_async(x).wait(), comm.neighbor_average(x))
        gathered, expected = comm.neighbor_gather(x), stacked.neighbor_gather(full)
        mine = (expected.target >= comm.ranks.start) & (expected.target < comm.ranks.stop)
        assert torch.equal(gathered.values, expected.values[mine])
    for elements in (1, 300_000):
        full = stacked.random("y").normal_(torch.empty(n, elements))
        mine = full[here(comm)]
        for op in ("sum", "mean", "min", "max"):
            assert torch.equal(comm.all_reduce(mine, op), stacked.all_reduce(full, op)), op
        assert torch.equal(comm.all_gather(mine), full)
        for root in (0, n - 1):
            assert torch.equal(comm.broadcast(mine, root), full[root : root + 1])
    cube = stacked.random("z").normal_(torch.empty(n, n * 5))
    assert torch.equal(
        comm.reduce_scatter(cube[here(comm)]), stacked.reduce_scatter(cube)[here(comm)]
    )
    parts = comm.all_to_all(cube[here(comm)].reshape(-1, n, 5))
    assert torch.equal(parts, cube.view(n, n, 5).transpose(0, 1)[here(comm)])
    if n % len(transport.hosts) == 0 and len({len(host) for host in transport.hosts}) == 1:
        sharded(transport, n)


def sharded(transport, n):
    """The hierarchical average against W kron J in float64, and alike inside each machine."""
    local = n // len(transport.hosts)
    topology = build("ring", n, hierarchical={"local": local})
    comm = Communicator(topology, transport, timeout_s=TIMEOUT_S)
    full = StackedCopy(topology, 5003)
    x = comm.alloc(5003).copy_(full.x[here(comm)])
    assert isinstance(comm._plan_now(), ShardedPlan)
    comm.neighbor_average(x, out=x, rounds=2)
    # two sums of a few terms of size about 1 in float32
    torch.testing.assert_close(x.double(), full.average(2)[here(comm)], rtol=0, atol=1e-6)
    rows = comm.all_gather(x).view(-1, local, 5003)
    assert torch.equal(rows, rows[:, :1].expand_as(rows))


class StackedCopy:
    """All rows, and their averages in float64."""

    def __init__(self, topology, d):
        self.matrix = topology.round(0).matrix()
        stacked = Communicator(topology, StackedTransport())
        self.x = stacked.random("h").normal_(stacked.alloc(d))

    def average(self, rounds):
        return torch.from_numpy(np.linalg.matrix_power(self.matrix, rounds)) @ self.x.double()


def link(transport, d):
    """Print the bytes on this host's link of 4 rounds of each execution of one W."""
    n, d = transport.processes, int(d)
    machines = build("ring", n, hierarchical={"local": n // len(transport.hosts)})
    flat = build("custom", n, edges=machines.round, period=1)
    counter = Path("/sys/class/net/eth0/statistics/tx_bytes")
    found = {}
    for name, topology in (("flat", flat), ("sharded", machines)):
        comm = Communicator(topology, transport, timeout_s=TIMEOUT_S)
        x = comm.alloc(d) + comm.ranks.start
        comm.neighbor_average(x)  # plans are made and compared
        comm.barrier()
        begin, sent = time.perf_counter(), int(counter.read_text())
        for _ in range(4):
            comm.neighbor_average(x, out=x)
        comm.barrier()
        sent = int(counter.read_text()) - sent
        found[name] = {"bytes": sent / 4, "seconds": (time.perf_counter() - begin) / 4}
    if transport.process == 0:
        say(found)


def refused(transport_name, expected):
    """Ask for a transport that does not fit; the message is the same everywhere."""
    with pytest.raises(ConfigError, match=re.escape(expected)):
        open_transport(transport_name, timeout_s=TIMEOUT_S)


def fails(transport, how):
    """The last process is killed, or its host unplugged, in step 3; the rest say what they saw."""
    comm = Communicator(build("exponential", 8), transport, timeout_s=5)
    x = comm.alloc(1000)
    begin = time.monotonic()
    try:
        for comm.step in range(1_000_000):
            if comm.step == 3:
                begin = time.monotonic()
                if transport.process == transport.processes - 1:
                    if how == "kill":
                        os.kill(os.getpid(), signal.SIGKILL)
                    subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)
            comm.neighbor_average(x, out=x)
    except CommError as error:
        seconds = time.monotonic() - begin
        say({"type": type(error).__name__, "text": str(error), "seconds": seconds})
    os._exit(0)  # as a failing run does: nobody waits to say goodbye


def main():
    torch.set_num_threads(1)
    name, *arguments = sys.argv[1:]
    if name == "refused":
        return refused(*arguments)
    transport = open_transport(timeout_s=TIMEOUT_S)
    {"battery": battery, "link": link, "fails": fails}[name](transport, *arguments)
    transport.close()
    return None


if __name__ == "__main__":
    main()
