"""Images of files and of datasets: decoded as they are asked for, and brought to one size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.algorithms.problems import Dataset
from gossamer.algorithms.tasks.arrays import TensorDataset
from gossamer.algorithms.tasks.hub import load_package
from gossamer.runtime.errors import ConfigError

__all__ = ["Decoded", "find_images", "in_memory", "open_image"]

_KEPT_BYTES = 1 << 30
"""Images that take no more are decoded once."""
_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Decoded:
    """A dataset of images that are decoded when they are asked for.

    Attributes:
        count: of images.
        open: place -> image of Pillow.
        size: pixels of the sides of what is given: the largest central square of an image, resized.
    """

    count: int
    open: Callable[[int], Any]
    size: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, ...]:
        """Return uint8 (m, 3, size, size)."""
        images = torch.empty(len(indices), 3, self.size, self.size, dtype=torch.uint8)
        fit = load_package("PIL.ImageOps", "contrastive").fit
        for image, place in zip(images, indices.tolist(), strict=True):
            square = fit(self.open(place).convert("RGB"), (self.size, self.size))
            image.copy_(torch.from_numpy(np.array(square)).permute(2, 0, 1))
        return (images,)


def in_memory(dataset: Decoded) -> Dataset:
    """Return the dataset, decoded once where it takes at most a gibibyte."""
    if dataset.count * 3 * dataset.size**2 > _KEPT_BYTES:
        return dataset
    return TensorDataset(dataset[torch.arange(len(dataset))])


def open_image(path: Path, field: str) -> Any:
    """Return an image of Pillow.

    Raises:
        ConfigError: there is no such file, or it is no image, or is damaged.
    """
    try:
        image = load_package("PIL.Image", "contrastive").open(path)
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"{field}: cannot read the image {path} ({reason}); correct or remove the file"
        ) from error
    return image


def find_images(
    folder: Path, field: str, classes: Sequence[str] | None = None
) -> tuple[list[Path], np.ndarray | None, list[str]]:
    """Return the images of a folder, their classes, and the classes' names.

    The layout is that of torchvision's ImageFolder: a folder for each class, with images anywhere
    below. One that holds nothing but images has no classes.

    Args:
        folder: to look in.
        field: where the user named it, for the message.
        classes: the names it must have; None: any.

    Raises:
        ConfigError: there is no image, or not of each class, or the classes are others.
    """
    if not folder.is_dir():
        raise ConfigError(f"{field}: {folder} is a file, not a folder of images; give its folder")
    alone = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    if alone and names:
        raise ConfigError(
            f"{field}: {folder} holds images beside folders, so that it is neither one class nor "
            "several; move the former"
        )
    if alone and not classes:
        return alone, None, []
    if classes is not None and names != list(classes):
        raise ConfigError(
            f"{field}: {folder} has the classes {', '.join(names) or 'none'}, and those to train "
            f"on are {', '.join(classes) or 'none'}; they must be the same"
        )
    each = [
        sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in _SUFFIXES)
        for name in names
    ]
    if not each or not all(each):
        empty = next((n for n, found in zip(names, each, strict=True) if not found), None)
        raise ConfigError(
            f"{field}: no image in {folder / empty if empty else folder}; it must hold a folder of "
            f"images for each class, or images alone ({', '.join(sorted(_SUFFIXES))})"
        )
    paths = [path for found in each for path in found]
    labels = np.repeat(np.arange(len(each)), [len(found) for found in each])
    return paths, labels.astype(np.int64), names
