"""Examples held in memory as tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gossamer.algorithms.problems import Dataset
from gossamer.runtime.random import Random

__all__ = ["Subset", "TensorDataset", "hold_out"]


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


@dataclass(frozen=True)
class Subset:
    """Some examples of a dataset.

    Attributes:
        dataset: of all.
        places: int64, which of them.
    """

    dataset: Dataset
    places: Tensor

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, ...]:
        return self.dataset[self.places[indices]]


def hold_out(dataset: Dataset, fraction: float, seed: int) -> tuple[Subset, Subset | None]:
    """Divide a dataset into training and test examples, each in the order they were in.

    Args:
        dataset: to divide.
        fraction: share of the test examples, rounded down.
        seed: of the choice.

    Returns:
        training and test examples; None where ``fraction`` comes to no example.
    """
    order = Random(seed).stream("task/held-out").permutation(len(dataset))[0].numpy()
    count = int(fraction * len(dataset))
    test, train = (torch.from_numpy(np.sort(o)) for o in (order[:count], order[count:]))
    return Subset(dataset, train), Subset(dataset, test) if count else None
