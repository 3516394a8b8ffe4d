"""The same operations three ways: ours, and what a user would write without Gossamer.

Buffers are made once, outside the timed calls, and plain sums and broadcasts work in place: what
could be held against the plain ways is left out of their time.
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from gossamer.runtime import Communicator
from gossamer.topologies import Round

__all__ = ["Ours", "PlainBuffers", "PlainMPI", "PlainTorch", "Way"]


class Way(Protocol):
    """The operations on one rank's buffers.

    Attributes:
        name: in messages and rows.
        x: (1, d), this rank's row.
        out: (1, d), or (n, d) for ``all_gather``: where results are written. ``broadcast`` and a
            plain ``all_reduce`` work in place on it.
    """

    name: str
    x: Tensor
    out: Tensor

    def average(self) -> object:
        """Write W x."""
        ...

    def all_reduce(self) -> object:
        """Write the sum over ranks."""
        ...

    def broadcast(self) -> object:
        """Write rank 0's row."""
        ...

    def all_gather(self) -> object:
        """Write all rows."""
        ...


class Ours:
    """Gossamer's calls, on rows from ``alloc``."""

    name = "gossamer"

    def __init__(self, comm: Communicator, count: int, dtype: torch.dtype, rows: int) -> None:
        self._comm = comm
        self.x = comm.alloc(count, dtype)
        if rows == 1:
            self.out = comm.alloc(count, dtype)
        else:
            self.out = torch.empty(rows, count, dtype=dtype, device=comm.device)

    def average(self) -> object:
        """Average over the graph."""
        return self._comm.neighbor_average(self.x, out=self.out)

    def all_reduce(self) -> object:
        """Sum over ranks."""
        return self._comm.all_reduce(self.x, out=self.out)

    def broadcast(self) -> object:
        """Broadcast in place."""
        return self._comm.broadcast(self.out, out=self.out)

    def all_gather(self) -> object:
        """Gather into one tensor."""
        return self._comm.all_gather(self.x, out=self.out)


class PlainBuffers:
    """One rank's rows, shared by the plain ways: ordinary memory.

    Attributes:
        x: (1, d).
        out: (1, d) or (n, d).
        targets: ranks that want x.
        received: rank, weight and buffer (1, d) of each row that is wanted.
    """

    def __init__(self, x: Tensor, rows: int, round_: Round | None, rank: int) -> None:
        """Make them beside ``x``; without a round nothing is sent or received."""
        self.x, self.out = x, torch.empty(rows, x.shape[1], dtype=x.dtype, device=x.device)
        self.targets: list[int] = []
        self.received: list[tuple[int, float, Tensor]] = []
        if round_ is not None:
            self.targets = round_.send(rank)[0].tolist()
            self.received = [
                (source, weight, torch.empty_like(x))
                for source, weight in zip(*(a.tolist() for a in round_.recv(rank)), strict=True)
            ]
            self._own = float(round_.self_weight[rank])

    def add_up(self) -> None:
        """Write the weighted sum of x and what was received."""
        torch.mul(self.x, self._own, out=self.out)
        for _, weight, row in self.received:
            self.out.add_(row, alpha=weight)


class PlainTorch:
    """torch.distributed's default group: batch_isend_irecv and a sum in torch; its collectives."""

    def __init__(self, buffers: PlainBuffers) -> None:
        # The new name, all_gather_single, is not in torch 2.11.
        warnings.filterwarnings("ignore", ".*all_gather_into_tensor", FutureWarning)
        self.name = str(dist.get_backend())
        self._buffers, self.x, self.out = buffers, buffers.x, buffers.out

    def average(self) -> None:
        """Exchange rows with the neighbours, then add them up."""
        b = self._buffers
        operations = [dist.P2POp(dist.irecv, row, source) for source, _, row in b.received]
        operations += [dist.P2POp(dist.isend, b.x, target) for target in b.targets]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        b.add_up()

    def all_reduce(self) -> None:
        """Sum in place."""
        dist.all_reduce(self.out)

    def broadcast(self) -> None:
        """Broadcast in place."""
        dist.broadcast(self.out, 0)

    def all_gather(self) -> None:
        """Gather into one tensor."""
        dist.all_gather_into_tensor(self.out, self.x)


class PlainMPI:
    """mpi4py's world: Irecv, Isend and a sum in torch; the library's collectives.

    bfloat16, which MPI does not know, travels as bytes; sums of it are not possible.
    """

    name = "mpi4py"

    def __init__(self, buffers: PlainBuffers) -> None:
        from mpi4py import MPI

        self._mpi, self._comm = MPI, MPI.COMM_WORLD
        self._buffers, self.x, self.out = buffers, buffers.x, buffers.out
        self._x, self._out = _array(buffers.x), _array(buffers.out)
        self._received = [(_array(row), source) for source, _, row in buffers.received]

    def average(self) -> None:
        """Exchange rows with the neighbours, then add them up."""
        requests = [self._comm.Irecv(row, source) for row, source in self._received]
        requests += [self._comm.Isend(self._x, target) for target in self._buffers.targets]
        self._mpi.Request.Waitall(requests)
        self._buffers.add_up()

    def all_reduce(self) -> None:
        """Sum into ``out``."""
        self._comm.Allreduce(self._x, self._out)

    def broadcast(self) -> None:
        """Broadcast in place."""
        self._comm.Bcast(self._out, 0)

    def all_gather(self) -> None:
        """Gather into one array."""
        self._comm.Allgather(self._x, self._out)


def _array(rows: Tensor) -> Any:
    return rows.view(torch.uint8).numpy() if rows.dtype == torch.bfloat16 else rows.numpy()
