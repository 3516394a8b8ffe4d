"""Examples held in memory as tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["TensorDataset"]


@dataclass(frozen=True)
class TensorDataset:
    """A dataset of equally long tensors; example k is row k of each.

    Attributes:
        tensors: each (N, ...), on the CPU.
    """

    tensors: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        lengths = [len(t) for t in self.tensors]
        assert len(set(lengths)) == 1, f"columns of lengths {lengths}"

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.index_select(0, indices) for t in self.tensors)
