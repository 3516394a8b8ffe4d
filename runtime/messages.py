"""What ranks receive from their neighbours, kept apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from gossamer.runtime.native import Terms, weighted_sum

__all__ = ["Edge", "Messages", "RaggedMessages"]

Edge = tuple[int, int]
"""(source, target), two ranks."""


@dataclass(frozen=True)
class Messages:
    """Neighbours' rows, kept apart: one per in-edge of the hosted ranks, by target then source.

    Attributes:
        values: (edges, m), what the neighbour sent.
        source: int64 (edges,), the neighbour's rank.
        target: int64 (edges,), the hosted row that received it.
        weight: float64 (edges,), W(t)[target, source].
    """

    values: Tensor
    source: Tensor
    target: Tensor
    weight: Tensor

    def weighted_sum(self, values: Tensor, out: Tensor) -> Tensor:
        """Write ``out[i] = sum over edges into i of weight * values[edge]``, ascending source.

        Args:
            values: (edges, d), what became of ``self.values`` (decoded, clipped, ...).
            out: (local, d).
        """
        counts = np.bincount(self.target.numpy(), minlength=out.shape[0])
        indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        columns = np.arange(len(self.target), dtype=np.int64)
        return weighted_sum([values], Terms(indptr, columns, self.weight.numpy()), out)


@dataclass(frozen=True)
class RaggedMessages:
    """Neighbours' messages of different lengths; otherwise as ``Messages``.

    Attributes:
        values: one tensor (m,) per in-edge; not to be written to, as ranks may share it.
        source: int64 (edges,), the neighbour's rank.
        target: int64 (edges,), the hosted row that received it.
        weight: float64 (edges,), W(t)[target, source].
    """

    values: Sequence[Tensor]
    source: Tensor
    target: Tensor
    weight: Tensor
