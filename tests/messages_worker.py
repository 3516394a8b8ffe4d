"""Messages of a length of their own, and the way back of gathered ones, against one process.

``torchrun messages_worker.py TRANSPORT`` compares all of them to the bit.
"""

import sys

import torch

from gossamer.runtime import Communicator, StackedTransport, open_transport
from gossamer.topologies import build

N = 6
GRAPHS = ["ring", "one_peer_exponential", "directed_ring", "star", "complete"]


def message(source, target, step=0):
    """Some are empty; those of a pair differ from step to step."""
    length = (source * target + step) % 4 * 300
    return torch.arange(length, dtype=torch.int32) + 100 * source + target


def every_pair(transport):
    """All ranks to all, several times, on whatever hosts them."""
    comm = Communicator(build("ring", N), transport, timeout_s=60)
    before = comm.traffic.bytes_sent.copy()
    for step in range(3):
        sent = [[message(rank, j, step) for j in range(N)] for rank in comm.ranks]
        received = comm.all_to_all_ragged(sent)
        for rank, row in zip(comm.ranks, received, strict=True):
            assert len(row) == N
            for source, found in enumerate(row):
                assert torch.equal(found, message(source, rank, step))
    counted = [
        sum(8 + message(rank, j, step).nbytes for j in range(N) if j != rank for step in range(3))
        for rank in comm.ranks
    ]
    assert (comm.traffic.bytes_sent - before).tolist() == counted


def there_and_back(transport, graph, dtype=torch.float32):
    """The adjoint, with the bits and the bytes of one process that hosts all ranks."""
    comm = Communicator(build(graph, N), transport, timeout_s=60)
    stacked = Communicator(build(graph, N), StackedTransport())
    full = stacked.random("x").normal_(stacked.alloc(37)).to(dtype)
    here = slice(comm.ranks.start, comm.ranks.stop)
    for comm.round in range(3):
        stacked.round = comm.round
        values, every = comm.neighbor_gather(full[here]).values, stacked.neighbor_gather(full)
        returned = comm.neighbor_gather_adjoint(values.exp())
        assert torch.equal(returned, stacked.neighbor_gather_adjoint(every.values.exp())[here])
    assert comm.traffic.bytes_sent.tolist() == stacked.traffic.bytes_sent[here].tolist()
    assert comm.traffic.messages_sent.tolist() == stacked.traffic.messages_sent[here].tolist()


def main(name):
    torch.set_num_threads(1)
    transport = open_transport(name, timeout_s=60)
    assert transport.name == name
    every_pair(transport)
    for graph in GRAPHS:
        there_and_back(transport, graph)
    transport.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
