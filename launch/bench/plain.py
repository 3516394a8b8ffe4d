"""The plain way to write the same exchanges: what a user would write without Gossamer.

Buffers are made once, outside the timed calls, which favours these over a first version.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from gossamer.topologies import Round

__all__ = ["Plain", "PlainMPI", "PlainTorch", "plain_for"]


class Plain(Protocol):
    """The same operations without Gossamer; one rank per process."""

    name: str

    def neighbor_average(self, x: Tensor, out: Tensor) -> object:
        """Write W x to ``out``."""
        ...

    def all_reduce(self, x: Tensor, out: Tensor) -> object:
        """Write the sum over ranks to ``out``."""
        ...


def plain_for(transport: str, round_: Round, rank: int, like: Tensor) -> Plain:
    """Return the plain way beside the transport of this name."""
    return (PlainMPI if transport == "mpi" else PlainTorch)(round_, rank, like)


class _Neighbours:
    def __init__(self, round_: Round, rank: int, like: Tensor) -> None:
        sources, weights = round_.recv(rank)
        self.targets: list[int] = round_.send(rank)[0].tolist()
        self.received = [
            (source, weight, torch.empty_like(like))
            for source, weight in zip(sources.tolist(), weights.tolist(), strict=True)
        ]
        self.own = float(round_.self_weight[rank])

    def add_up(self, x: Tensor, out: Tensor) -> None:
        torch.mul(x, self.own, out=out)
        for _, weight, row in self.received:
            out.add_(row, alpha=weight)


class PlainTorch(_Neighbours):
    """torch.distributed: batch_isend_irecv and a sum in torch; all_reduce."""

    name = "torch.distributed"

    def neighbor_average(self, x: Tensor, out: Tensor) -> None:
        """Exchange rows with the neighbours, then add them up."""
        operations = [dist.P2POp(dist.irecv, row, source) for source, _, row in self.received]
        operations += [dist.P2POp(dist.isend, x, target) for target in self.targets]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        self.add_up(x, out)

    def all_reduce(self, x: Tensor, out: Tensor) -> None:
        """Reduce with the library's own collective."""
        dist.all_reduce(out.copy_(x))


class PlainMPI(_Neighbours):
    """mpi4py: Irecv, Isend and a sum in torch; Allreduce."""

    name = "mpi4py"

    def __init__(self, round_: Round, rank: int, like: Tensor) -> None:
        from mpi4py import MPI

        super().__init__(round_, rank, like)
        self._mpi, self._comm = MPI, MPI.COMM_WORLD

    def neighbor_average(self, x: Tensor, out: Tensor) -> None:
        """Exchange rows with the neighbours, then add them up."""
        requests = [self._comm.Irecv(_buffer(row), source) for source, _, row in self.received]
        requests += [self._comm.Isend(_buffer(x), target) for target in self.targets]
        self._mpi.Request.Waitall(requests)
        self.add_up(x, out)

    def all_reduce(self, x: Tensor, out: Tensor) -> None:
        """Reduce with the library's own collective."""
        self._comm.Allreduce(x.numpy(), out.numpy())


def _buffer(row: Tensor) -> Any:
    return row.view(torch.uint8).numpy() if row.dtype == torch.bfloat16 else row.numpy()
