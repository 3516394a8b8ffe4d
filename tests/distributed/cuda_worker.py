"""What the processes of test_native_cuda.py do, each with rows on the GPU that they share."""

import os
import random

import pytest
import torch

from gossamer.launch.bench.device import check_averages
from gossamer.runtime import Communicator, StackedTransport, open_transport
from gossamer.runtime.device_memory import DeviceMemory
from gossamer.runtime.errors import CommError
from gossamer.topologies import build

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
GRAPHS = ["ring", "exponential", "one_peer_exponential", "star", "complete", "directed_ring"]


def join():
    torch.set_num_threads(1)
    transport = open_transport("auto", timeout_s=60)
    assert transport.name == "native"
    assert isinstance(transport.shared, DeviceMemory)
    return transport


def dawdle(device, own):
    """Keep the stream busy for up to some milliseconds, on some processes."""
    if device.type == "cuda" and own.random() < 0.5:
        torch.cuda._sleep(own.randrange(10_000_000))


def same_as_the_cpu():
    """Every dtype, graph and operation, to the bit."""
    transport = join()
    check_averages(transport)
    transport.close()
    return 0


def ahead(n, operations):
    """Average rows that are overwritten as soon as the call returns, with streams that are late."""
    transport = join()
    chosen, own = random.Random(0), random.Random(transport.process)
    device, logs, kept = transport.device, [], {}
    streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else [None]
    for k in range(operations):
        comm = kept.setdefault(
            graph := chosen.choice(GRAPHS), Communicator(build(graph, n), transport, timeout_s=60)
        )
        stacked = Communicator(build(graph, n), StackedTransport())
        comm.round = stacked.round = chosen.randrange(3)
        here = slice(comm.ranks.start, comm.ranks.stop)
        dtype, d = chosen.choice(DTYPES), chosen.choice([3, 1000, 300_001])
        in_place, private, stream = chosen.random() < 0.4, own.random() < 0.3, k % len(streams)
        key = (d, dtype, private, stream)
        with torch.cuda.stream(streams[stream]):
            if key not in kept:
                make = torch.zeros if private else None
                rows = [
                    make(comm.local, d, dtype=dtype, device=device)
                    if make
                    else comm.alloc(d, dtype)
                    for _ in range(2)
                ]
                kept[key] = rows
            x, out = kept[key]
            out = x if in_place else out
            full = stacked.random("x", draw=k).normal_(torch.empty(n, d)).to(dtype)
            dawdle(device, own)
            x.copy_(full[here])
            comm.neighbor_average(x, out=out, axpy=(0.5, x))
            logs.append((k, out.clone(), stacked.neighbor_average(full, axpy=(0.5, full))[here]))
            x.fill_(1e4)
            out.fill_(1e4)
            if chosen.random() < 0.3:
                total = comm.all_reduce(x.copy_(full[here]), "mean")
                x.fill_(1e4)
                logs.append((k, total, stacked.all_reduce(full, "mean")))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wrong = [k for k, found, expected in logs if not torch.equal(found.cpu(), expected)]
    assert not wrong, f"process {transport.process}: operations {wrong} of {operations}"
    transport.close()
    return 0


def asynchronous(n):
    """An average that another thread queues."""
    transport = join()
    comm = Communicator(build("ring", n), transport, timeout_s=60)
    stacked = Communicator(build("ring", n), StackedTransport())
    full = stacked.random("x").normal_(stacked.alloc(10_000))
    x = comm.alloc(10_000).copy_(full[comm.ranks.start : comm.ranks.stop])
    work = comm.neighbor_average_async(x, out=x)
    expected = stacked.neighbor_average(full)[comm.ranks.start : comm.ranks.stop]
    assert torch.equal(work.wait().cpu(), expected)
    comm.close()
    return 0


def one_dies():
    """Process 1 is gone; the others end, naming it."""
    transport = join()
    comm = Communicator(build("complete", transport.processes), transport, timeout_s=10)
    x = comm.alloc(1000)
    comm.neighbor_average(x)
    comm.barrier()
    if transport.process == 1:
        os._exit(0)

    def average():
        for _ in range(3):
            comm.neighbor_average(x)

    with pytest.raises(CommError, match="neighbor_average"):
        average()
    # Work may be queued that waits for the dead process for ever: nothing may wait for it here.
    os._exit(0)
