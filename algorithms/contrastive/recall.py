"""Embeddings of examples outside the batch, encoded by their owners for who asks.

Keys travel to the owners and embeddings back; gradients of these embeddings take the same way as
the keys did. An owner encodes each example once, whoever asks, and adds gradients in the order of
the ranks that asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.algorithms.contrastive.losses import Keys
from gossamer.algorithms.contrastive.owners import Owners
from gossamer.runtime import Communicator

__all__ = ["Encode", "Recalls"]

Encode = Callable[[int, Keys], list[tuple[Tensor, Tensor, range]]]
"""(hosted row, keys (k,)) -> groups of keys: their places among the k, their embeddings, and the
passes that made these."""


@dataclass
class _Part:
    """What a hosted rank encoded for others.

    Attributes:
        made: its passes, one range for each group of keys.
        groups: places of the groups among its different keys.
        asked: per rank, places among the different keys of what it asked for.
        count: how many different keys there are.
    """

    made: list[range]
    groups: list[Tensor]
    asked: list[Tensor]
    count: int


class Recalls:
    """The recalls of one call of the oracle.

    Attributes:
        open: numbers of those whose embeddings get a gradient.
    """

    def __init__(
        self,
        comm: Communicator,
        owners: Owners,
        like: Tensor,
        encode: Encode,
        backward: Callable[[range, Tensor], None],
    ) -> None:
        """Get ready.

        Args:
            comm: the ranks.
            owners: of the examples.
            like: embeddings (..., dim), on the device and of the dtype of all.
            encode: by a hosted row's parameters, with a gradient to come.
            backward: (passes, gradient of their embeddings) -> adds to their row's gradient.
        """
        self._comm, self._owners, self._dim = comm, owners, like.shape[-1]
        self._like = like
        self._encode, self._backward = encode, backward
        self.open: list[int] = []
        self._parts: list[list[_Part]] = []
        self._orders: list[list[tuple[Tensor, list[int]]]] = []

    def __call__(self, keys: Sequence[Keys], gradient: bool = True) -> tuple[int, list[Tensor]]:
        """Return the number of this recall, and embeddings (k_i, dim) of ``keys[i]`` (k_i,).

        ``gradient`` says whether they get one; on all processes alike. The number is -1 where the
        only rank there is asks for nothing.
        """
        comm, orders, requests = self._comm, [], []
        if comm.n == 1 and not len(keys[0]):
            return -1, [self._like.new_zeros(0, self._dim)]
        if gradient:
            self.open.append(len(self._parts))
        for wanted in keys:
            owners = self._owners.of(wanted.cpu() // 2)
            order = torch.argsort(owners, stable=True)
            counts = torch.bincount(owners, minlength=comm.n).tolist()
            orders.append((order.to(wanted.device), counts))
            requests.append(list(wanted[order.to(wanted.device)].split(counts)))
        parts, answers = [], []
        for i, asked in enumerate(comm.all_to_all_ragged(requests)):
            sizes = [len(a) for a in asked]
            different, places = torch.unique(torch.cat(asked), return_inverse=True)
            z = self._like.new_zeros(len(different), self._dim)
            made, groups = [], []
            for group, embedded, passes in self._encode(i, different) if len(different) else []:
                z[group] = embedded.to(z.dtype)
                groups.append(group)
                made.append(passes)
            of_ranks = list(places.split(sizes))
            parts.append(_Part(made, groups, of_ranks, len(different)))
            answers.append([z[p].flatten() for p in of_ranks])
        self._parts.append(parts)
        self._orders.append(orders)
        found = []
        for (order, _), rows in zip(orders, comm.all_to_all_ragged(answers), strict=True):
            z = self._like.new_empty(len(order), self._dim)
            z[order] = torch.cat(rows).view(-1, self._dim)
            found.append(z)
        return len(self._parts) - 1, found

    def backward(self, number: int, grads: Sequence[Tensor]) -> None:
        """Bring gradients (k_i, dim) of a recall's embeddings to their owners."""
        messages = [
            [part.flatten() for part in grad[order].split(counts)]
            for grad, (order, counts) in zip(grads, self._orders[number], strict=True)
        ]
        received = self._comm.all_to_all_ragged(messages)
        for part, rows in zip(self._parts[number], received, strict=True):
            total = self._like.new_zeros(part.count, self._dim)
            for places, row in zip(part.asked, rows, strict=True):
                total[places] += row.view(-1, self._dim)  # a rank's keys differ
            for group, made in zip(part.groups, part.made, strict=True):
                self._backward(made, total[group])
