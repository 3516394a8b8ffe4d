"""Images of one's own: arrays, folders, and datasets of the hub."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from gossamer.algorithms.tasks.arrays import TensorDataset
from gossamer.algorithms.tasks.files import locate
from gossamer.algorithms.tasks.hub import explained, load_splits
from gossamer.algorithms.tasks.image_files import Decoded, find_images, in_memory, open_image
from gossamer.algorithms.tasks.images import ImageData, Images, ImageSource
from gossamer.runtime.errors import ConfigError, nearest

__all__ = ["ArrayImages", "FolderImages", "HubImages", "images_of", "read_arrays"]

Size = Annotated[int, Field(ge=1, strict=True)]


class ArrayImages(ImageSource):
    """Images in a file of numpy: .npy, or .npz with `images`, and perhaps `labels`.

    An .npz file may hold `test_images` and `test_labels`, too.
    """

    name: Literal["arrays"] = "arrays"
    path: str
    """Of the file; a relative one is looked for here and in GOSSAMER_DATA. Images are (N, H, W) or
    (N, H, W, C), uint8, or floating in 0..1; labels are (N,), classes from 0 on."""

    def read(self) -> ImageData:
        """Return them in the order of the file; uint8 stays."""
        field = "task.data.path"
        arrays = read_arrays(self.path, field)
        if "images" not in arrays:
            raise ConfigError(
                f"{field}: {self.path} has no array 'images', but {', '.join(arrays) or 'none'}; "
                "rename one"
            )
        train, test = (self._part(arrays, prefix, field) for prefix in ("", "test_"))
        assert train is not None
        return ImageData(train, test)

    def _part(self, arrays: Mapping[str, np.ndarray], prefix: str, field: str) -> Images | None:
        if f"{prefix}images" not in arrays:
            return None
        images = images_of(arrays[f"{prefix}images"], f"{prefix}images", field)
        labels = arrays.get(f"{prefix}labels")
        if labels is not None:
            if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or min(labels) < 0:
                raise ConfigError(
                    f"{field}: {prefix}labels must be {len(images)} classes, integers from 0 on, "
                    f"got {labels.dtype} of shape {labels.shape}"
                )
            labels = labels.astype(np.int64)
        return Images(TensorDataset((images,)), labels)


class FolderImages(ImageSource):
    """Images in a folder for each class, or in one folder where classes are not known.

    Each is cut to its largest central square, resized, and made RGB.
    """

    name: Literal["folder"] = "folder"
    path: str
    """The folder of the classes' folders; a relative one is looked for here and in
    GOSSAMER_DATA."""
    test_path: str | None = None
    """Such a folder of the test images."""
    size: Size
    """Pixels of the sides that images are brought to."""

    def read(self) -> ImageData:
        """Return them class by class, sorted by name; decoded now if they take a gibibyte."""
        train, names = self._part(self.path, "task.data.path", None)
        if self.test_path is None:
            return ImageData(train)
        return ImageData(train, self._part(self.test_path, "task.data.test_path", names)[0])

    def _part(self, path: str, field: str, classes: list[str] | None) -> tuple[Images, list[str]]:
        paths, labels, names = find_images(locate(path, field), field, classes)
        decoded = Decoded(len(paths), lambda k: open_image(paths[k], field), self.size)
        return Images(in_memory(decoded), labels), names


class HubImages(ImageSource):
    """Images of a dataset of the package `datasets`, by name or from disk."""

    name: Literal["dataset"] = "dataset"
    dataset: str
    """Name on the hub, such as clane9/imagenet-100, or a folder (of `save_to_disk`, or of data
    files)."""
    subset: str | None = None
    """Which configuration of the dataset."""
    train_split: str = "train"
    """Which split to train on; its labels, where it has some, serve the evaluation alone."""
    test_split: str | None = None
    """Which split to test probes on, such as test or validation."""
    probe_split: str | None = None
    """Which split probes learn from, where that to train on has no labels; None: the latter."""
    image: str = "image"
    """Column of the images."""
    label: str = "label"
    """Column of the classes; a split without it, or where all are -1, has none."""
    size: Size
    """Pixels of the sides that images are brought to, from their largest central square."""

    def read(self) -> ImageData:
        """Return them in the order of the splits; decoded now if they take a gibibyte."""
        splits = load_splits(self.dataset, self.subset, field="task.data.dataset")
        train = self._part(splits, self.train_split, "task.data.train_split")
        test, probe = (
            None if split is None else self._part(splits, split, f"task.data.{field}")
            for field, split in (("test_split", self.test_split), ("probe_split", self.probe_split))
        )
        return ImageData(train, test, probe)

    def _part(self, splits: Mapping[str, Any], split: str, field: str) -> Images:
        if split not in splits:
            raise ConfigError(
                f"{field}: '{self.dataset}' has no split '{split}'{nearest(split, splits)}"
            )
        rows = splits[split]
        if self.image not in rows.column_names:
            raise ConfigError(
                f"task.data.image: '{self.dataset}' has no column '{self.image}'"
                f"{nearest(self.image, rows.column_names)}"
            )
        pictures = rows.select_columns([self.image])

        def picture(place: int) -> Any:
            with explained("task.data.dataset", self.dataset, place + 1):
                found = pictures[place][self.image]
            if not hasattr(found, "convert"):
                raise ConfigError(
                    f"task.data.image: column '{self.image}' of '{self.dataset}' holds no images, "
                    f"but {type(found).__name__}; name another"
                )
            return found

        labels = self._labels(rows, split) if self.label in rows.column_names else None
        return Images(in_memory(Decoded(len(rows), picture, self.size)), labels)

    def _labels(self, rows: Any, split: str) -> np.ndarray | None:
        try:
            labels = np.array(rows[self.label], dtype=np.int64)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"task.data.label: column '{self.label}' of '{self.dataset}' holds no classes "
                f"({error}); name another"
            ) from error
        if labels.max(initial=-1) < 0:
            return None
        if labels.min() < 0:
            raise ConfigError(
                f"task.data.label: some of split '{split}' are negative, and others are not; use "
                "another split"
            )
        return labels


def read_arrays(path: str, field: str) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file by name; of an .npy file, ``images``.

    Raises:
        ConfigError: there is no such file, or it is damaged, or holds pickled objects.
    """
    found: Path = locate(path, field)
    try:
        content = np.load(found, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return {"images": content}
        with content:
            return {name: content[name] for name in content.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"{field}: cannot read {found} ({reason}); give an .npy or .npz file without pickled "
            "objects"
        ) from error


def images_of(array: np.ndarray, name: str, field: str) -> Tensor:
    """Return images as (N, C, H, W), uint8 or float32.

    Raises:
        ConfigError: another shape or dtype, or values outside of 0..1.
    """
    if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[3] > 4):
        raise ConfigError(
            f"{field}: {name} must be (N, H, W) or (N, H, W, C) with at most 4 channels, got shape "
            f"{array.shape}; transpose it"
        )
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise ConfigError(f"{field}: {name} must be uint8 or floating, got {array.dtype}")
    if array.dtype != np.uint8:
        low, high = array.min(initial=0), array.max(initial=0)
        if not (low >= 0 and high <= 1):
            raise ConfigError(
                f"{field}: floating {name} must lie in 0..1, got {low:.4g}..{high:.4g}; scale them"
            )
        array = array.astype(np.float32, copy=False)
    images = torch.from_numpy(array)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return images.contiguous()
