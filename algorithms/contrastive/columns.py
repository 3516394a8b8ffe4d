"""The columns of a batch: the embeddings that a rank's rows are compared with.

B examples give 2B columns: view 0 of all, then view 1 of all, each in ascending rank. Those of all
ranks, or of a rank and its neighbours in round t. What is differentiated of them goes back to the
ranks they came from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gossamer.runtime import Communicator, combine

__all__ = ["Columns", "Exchange", "exchange"]


@dataclass(frozen=True)
class Columns:
    """What one rank's rows are compared with.

    Attributes:
        z: (2B, dim) embeddings.
        ids: int64 (B,), the examples they are of.
        own: where the rank's own examples stand among the B.
    """

    z: Tensor
    ids: Tensor
    own: slice


class Exchange(ABC):
    """Brings embeddings to the ranks that compare with them, and gradients back."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm

    @abstractmethod
    def gather(self, z: Tensor, ids: Tensor) -> list[Columns]:
        """Return the columns of each hosted rank.

        Args:
            z: (local, 2, b, dim), the hosted ranks' embeddings.
            ids: int64 (local, b).
        """

    @abstractmethod
    def scatter(self, grads: list[Tensor], shape: torch.Size) -> Tensor:
        """Return the sums over ranks, in one order on all of them, of one's own columns' gradients.

        Args:
            grads: per hosted rank, (2B, dim), of the columns ``gather`` gave it.
            shape: of ``z``: (local, 2, b, dim).
        """


class _AllRanks(Exchange):
    """Every rank's columns: an all-gather, and a reduce-scatter back (arXiv:2404.10575)."""

    def gather(self, z: Tensor, ids: Tensor) -> list[Columns]:
        comm, (_, _, b, dim) = self._comm, z.shape
        rows = comm.all_gather(z.reshape(comm.local, -1)).view(comm.n, 2, b, dim)
        z_all = rows.transpose(0, 1).reshape(-1, dim)
        ids_all = comm.all_gather(ids).flatten()
        return [Columns(z_all, ids_all, slice(rank * b, rank * b + b)) for rank in comm.ranks]

    def scatter(self, grads: list[Tensor], shape: torch.Size) -> Tensor:
        comm, (_, _, b, dim) = self._comm, shape
        rows = [g.view(2, comm.n, b, dim).transpose(0, 1).reshape(-1) for g in grads]
        return comm.reduce_scatter(torch.stack(rows)).view(shape)


class _Neighbors(Exchange):
    """The columns of a rank and of those it hears in round t, and back along the same edges."""

    def __init__(self, comm: Communicator) -> None:
        super().__init__(comm)
        self._places: list[int] = []
        """Of each hosted rank's own block among those it hears, since the last ``gather``."""

    def gather(self, z: Tensor, ids: Tensor) -> list[Columns]:
        comm, (local, _, b, dim) = self._comm, z.shape
        heard, heard_ids = comm.neighbor_gather(z.reshape(local, -1)), comm.neighbor_gather(ids)
        columns, self._places = [], list[int]()
        for i, rank in enumerate(comm.ranks):
            mine = (heard.target == i).nonzero().flatten()
            place = int((heard.source[mine] < rank).sum())
            self._places.append(place)
            blocks = _inserted(heard.values[mine.to(z.device)], place, z[i].reshape(1, -1))
            columns.append(
                Columns(
                    z=blocks.view(-1, 2, b, dim).transpose(0, 1).reshape(-1, dim),
                    ids=_inserted(
                        heard_ids.values[mine.to(z.device)], place, ids[i : i + 1]
                    ).flatten(),
                    own=slice(place * b, place * b + b),
                )
            )
        return columns

    def scatter(self, grads: list[Tensor], shape: torch.Size) -> Tensor:
        comm, (_, _, b, dim) = self._comm, shape
        own, others = [], []  # messages are in the order of their targets, as the places are
        for grad, place in zip(grads, self._places, strict=True):
            blocks = grad.view(2, -1, b, dim).transpose(0, 1).reshape(-1, 2 * b * dim)
            own.append(blocks[place])
            others += [blocks[:place], blocks[place + 1 :]]
        back = comm.neighbor_gather_adjoint(torch.cat(others))
        return combine([(1.0, torch.stack(own)), (1.0, back)]).view(shape)


def _inserted(rows: Tensor, place: int, row: Tensor) -> Tensor:
    """Return rows (k, m) with ``row`` (1, m) at ``place``."""
    return torch.cat([rows[:place], row, rows[place:]])


def exchange(comm: Communicator, negatives: Literal["all", "neighbors"]) -> Exchange:
    """Return how the columns of ``all`` ranks or of ``neighbors`` travel."""
    return _AllRanks(comm) if negatives == "all" else _Neighbors(comm)
