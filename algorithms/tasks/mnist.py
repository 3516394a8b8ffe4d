"""MNIST from its IDX files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from gossamer.algorithms.tasks.classification import ClassificationTask, Model, Table
from gossamer.algorithms.tasks.files import locate, read_bytes
from gossamer.runtime.errors import ConfigError

__all__ = ["MNIST", "read_mnist"]


class MNIST(ClassificationTask):
    """Handwritten digits: images of 28x28 pixels in 0..1, ten classes.

    The folder holds either the four files of the full set (`train-images-idx3-ubyte`,
    `train-labels-idx1-ubyte`, `t10k-...`), or one pair whose last fifth becomes the test set
    (`images-idx3-ubyte`, or the `t10k-...` alone: 8,000 and 2,000). Each may end in `.gz`.
    """

    name: str = "mnist"
    model: Model = "cnn"
    """`linear` (with a bias), `mlp` (`hidden`), `cnn` (LeNet), or `convnet` (see `channels`)."""
    path: str = "mnist10k"
    """Folder of the IDX files; a relative one is looked for here and in GOSSAMER_DATA."""

    def read(self) -> tuple[Table, Table | None]:
        """Return training and test images, scaled by 1/255.

        Raises:
            ConfigError: a file is missing, damaged or cut short, or images and labels differ.
        """
        return read_mnist(self.path, "task.path")


def read_mnist(path: str, field: str) -> tuple[Table, Table]:
    """Return training and test images of a folder of IDX files, scaled by 1/255.

    Args:
        path: of the folder, see ``MNIST``.
        field: where the user wrote it, for the message.

    Raises:
        ConfigError: a file is missing, damaged or cut short, or images and labels differ.
    """
    folder = locate(path, field)
    if _find(folder, "train-images-idx3-ubyte"):
        return _read_pair(folder, "train-", field), _read_pair(folder, "t10k-", field)
    both = _read_pair(folder, "" if _find(folder, "images-idx3-ubyte") else "t10k-", field)
    kept = len(both) - len(both) // 5
    return both[:kept], both[kept:]


def _find(folder: Path, name: str) -> Path | None:
    candidates = (folder / name, folder / f"{name}.gz")
    return next((path for path in candidates if path.exists()), None)


def _read_pair(folder: Path, prefix: str, field: str) -> Table:
    images = _read_idx(folder, f"{prefix}images-idx3-ubyte", 3, field)
    labels = _read_idx(folder, f"{prefix}labels-idx1-ubyte", 1, field)
    if len(images) != len(labels):
        raise ConfigError(
            f"{field}: {folder} has {len(images)} {prefix}images but {len(labels)} labels; "
            "fetch both files again"
        )
    return Table(images.astype(np.float32) / 255, labels.astype(np.int64))


def _read_idx(folder: Path, name: str, dimensions: int, field: str) -> np.ndarray:
    """Return the bytes of an IDX file in its shape: magic 0, 0, 8, dimensions; sizes; content."""
    path = _find(folder, name)
    if path is None:
        raise ConfigError(f"{field}: no file '{name}' or '{name}.gz' in {folder}; add it")
    content, header = read_bytes(path, field), 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < header:
        raise ConfigError(
            f"{field}: {path} is not an IDX file of {dimensions} dimensions; fetch it again"
        )
    shape = tuple(np.frombuffer(content, ">u4", dimensions, offset=4).tolist())
    if len(content) != header + math.prod(shape):
        raise ConfigError(
            f"{field}: {path} is truncated or damaged: {shape} bytes announced, "
            f"{len(content) - header} found; fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
