"""Which rank owns which example, with its pixels and what a method remembers of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["Owners", "strided_shards"]


class Owners:
    """Every process knows all of it; nothing is sent.

    Attributes:
        most: the greatest number of examples that a rank owns.
        examples: how many all own together.
        ids: per rank, int64, its examples in the order of their places.
        sizes: per rank, of each of its shards.
    """

    def __init__(self, shards: Sequence[np.ndarray], parts: int, total: int) -> None:
        """Look at the shards.

        Args:
            shards: of the ranks, ``parts`` consecutive ones for each.
            parts: shards of a rank.
            total: size of the training set.
        """
        self.ids = [np.concatenate(shards[k : k + parts]) for k in range(0, len(shards), parts)]
        lengths = [len(shard) for shard in shards]
        self.sizes = [lengths[k : k + parts] for k in range(0, len(shards), parts)]
        self.most = max(len(own) for own in self.ids)
        self.examples = sum(len(own) for own in self.ids)
        owner, place = np.full(total, -1), np.full(total, -1)
        for rank, own in enumerate(self.ids):
            owner[own], place[own] = rank, np.arange(len(own))
        self._owner, self._place = torch.from_numpy(owner), torch.from_numpy(place)

    def of(self, ids: Tensor) -> Tensor:
        """Return the ranks that own the examples ``ids`` (k,); -1: nobody does."""
        return self._owner[ids]

    def places(self, ids: Tensor) -> Tensor:
        """Return where each of ``ids`` (k,) stands among its owner's examples."""
        return self._place[ids]


def strided_shards(total: int, count: int) -> tuple[np.ndarray, ...]:
    """Return ``count`` shards of ``total`` examples: example g is in shard g mod count."""
    return tuple(np.arange(first, total, count) for first in range(count))
