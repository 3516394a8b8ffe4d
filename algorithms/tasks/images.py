"""Where images come from: arrays, each with the class where it is known."""

# Shapes: N examples, C channels, H x W pixels.

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from sklearn.datasets import load_sample_images
from torch import Tensor

from gossamer.algorithms.problems import Dataset
from gossamer.algorithms.tasks.arrays import Subset, TensorDataset
from gossamer.algorithms.tasks.bundled import read_digits
from gossamer.algorithms.tasks.classification import Table
from gossamer.algorithms.tasks.mnist import read_mnist
from gossamer.runtime.component import Component
from gossamer.runtime.random import Random

__all__ = ["DigitImages", "ImageData", "ImageSource", "Images", "MNISTImages", "PhotographImages"]


@dataclass(frozen=True)
class Images:
    """Images of one size.

    Attributes:
        dataset: gives (images,), uint8 in 0..255 or floating in 0..1, (m, C, H, W).
        labels: int64 (N,), classes 0..C-1; None where they are not known.
    """

    dataset: Dataset
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, rows: slice) -> Images:
        places = torch.arange(len(self))[rows]
        return Images(
            Subset(self.dataset, places), None if self.labels is None else self.labels[rows]
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.dataset[torch.zeros(1, dtype=torch.int64)][0].shape[1:]
        return channels, height, width


class ImageData(NamedTuple):
    """What a source has.

    Attributes:
        train: to train on.
        test: held out, for probes; None: nothing is.
        probe: labelled ones that probes learn from; None: those of ``train``.
    """

    train: Images
    test: Images | None = None
    probe: Images | None = None


class ImageSource(Component, ABC):
    """Names images and reads them."""

    @abstractmethod
    def read(self) -> ImageData:
        """Return them in the order of the source.

        Raises:
            ConfigError: a file or package is missing, or something is broken.
        """


class DigitImages(ImageSource):
    """Handwritten digits of scikit-learn: 1,797 of 8x8, the last 357 held out."""

    name: Literal["digits"] = "digits"

    def read(self) -> ImageData:
        """Return them in the order of the file, scaled by 1/16."""
        table = read_digits()
        kept = len(table) - 357
        return ImageData(_of(table[:kept]), _of(table[kept:]))


class MNISTImages(ImageSource):
    """Handwritten digits of 28x28 from IDX files, held out as task `mnist` does."""

    name: Literal["mnist"] = "mnist"
    path: str = "mnist10k"
    """Folder of the IDX files; a relative one is looked for here and in GOSSAMER_DATA."""

    def read(self) -> ImageData:
        """Return them in the order of the files, scaled by 1/255."""
        train, test = read_mnist(self.path, "task.data.path")
        return ImageData(_of(train), _of(test))


class PhotographImages(ImageSource):
    """Squares cut at random places out of scikit-learn's two photographs, in turn.

    They are the same whatever the run's seed; the class is the photograph.
    """

    name: Literal["photographs"] = "photographs"
    count: int = Field(default=2000, ge=2, strict=True)
    """How many squares."""
    size: int = Field(default=64, ge=1, le=427, strict=True)
    """Pixels of their sides; the photographs are 427 high and 640 wide."""

    def read(self) -> ImageData:
        """Return them as uint8."""
        photographs = torch.tensor(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)
        places = torch.empty(self.count, 2)
        Random(0).stream("task/photographs", range(self.count)).uniform_(places)
        free = torch.tensor(photographs.shape[2:]) - self.size + 1
        corners = (places * free).long().tolist()
        labels = np.arange(self.count) % len(photographs)
        squares = [
            photographs[label, :, top : top + self.size, left : left + self.size]
            for label, (top, left) in zip(labels, corners, strict=True)
        ]
        return ImageData(Images(TensorDataset((torch.stack(squares),)), labels))


def _of(table: Table) -> Images:
    images: Tensor = torch.from_numpy(np.ascontiguousarray(table.features)).float().unsqueeze(1)
    return Images(TensorDataset((images,)), table.labels)
