"""Pairs of an image and a caption: arrays, JSON lines, and datasets of the hub."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from gossamer.algorithms.problems import Dataset
from gossamer.algorithms.tasks.arrays import TensorDataset
from gossamer.algorithms.tasks.files import locate, read_bytes, suffix_of
from gossamer.algorithms.tasks.hub import load_splits
from gossamer.algorithms.tasks.image_files import Decoded, in_memory, open_image
from gossamer.algorithms.tasks.image_sources import (
    images_of,
    pictures_of,
    read_arrays,
    rows_of,
)
from gossamer.algorithms.tasks.tokenizers import open_tokenizer
from gossamer.runtime.component import Component
from gossamer.runtime.errors import ConfigError, nearest

__all__ = ["HubPairs", "PairData", "PairSource", "Pairs"]

Count = Annotated[int, Field(ge=1, strict=True)]

_ROWS = (".json", ".jsonl")


class PairData(NamedTuple):
    """Images and what is said of them.

    Attributes:
        dataset: gives (images, tokens): images as ``Images`` has them, tokens int64 (m, T), -1
            after a caption's last one.
        vocabulary: number of tokens.
        context: T.
    """

    dataset: Dataset
    vocabulary: int
    context: int


class Zipped:
    """Two datasets of equal length, side by side."""

    def __init__(self, first: Dataset, second: Dataset) -> None:
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first)

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, ...]:
        return (*self._first[indices], *self._second[indices])


class PairSource(Component, ABC):
    """Names images with a caption each, and reads them."""

    tokenizer: str = "bytes"
    """`bytes`, 256 of them, or a tokenizer of `transformers`, by name or folder."""
    context: int = Field(default=64, ge=1, strict=True)
    """Tokens of a caption at most; what is longer is cut."""

    @abstractmethod
    def sides(self) -> tuple[Dataset, Sequence[str]]:
        """Return images and captions in the order of the source.

        Raises:
            ConfigError: a file or package is missing, or something is broken.
        """

    def read(self) -> PairData:
        """Return images and tokens in the order of the source.

        Raises:
            ConfigError: as of ``sides``, or the tokenizer cannot be loaded.
        """
        images, captions = self.sides()
        tokenizer = open_tokenizer(self.tokenizer)
        encoded = tokenizer.encode_alone([c.encode() for c in captions], self.context)
        tokens = np.full((len(captions), self.context), -1, np.int64)
        for row, ids in zip(tokens, encoded, strict=True):
            row[: len(ids)] = ids
        dataset = Zipped(images, TensorDataset((torch.from_numpy(tokens),)))
        return PairData(dataset, tokenizer.vocabulary, self.context)


class Pairs(PairSource):
    """An .npz file with `images` and `captions` (text), or JSON lines that name image files.

    These are paths beside the file of lines, or absolute.
    """

    name: Literal["pairs"] = "pairs"
    path: str
    """Of the .npz, .jsonl or .jsonl.gz file; a relative one is looked for here and in
    GOSSAMER_DATA."""
    image: str = "image"
    """Field of the JSON lines with the image's path."""
    caption: str = "caption"
    """Field of the JSON lines with the caption."""
    size: Count | None = None
    """Pixels of the sides that image files are brought to, from their largest central square;
    required for JSON lines, without effect on arrays."""

    def sides(self) -> tuple[Dataset, Sequence[str]]:
        """Return them in the order of the file."""
        field = "task.data.path"
        path = locate(self.path, field)
        return self._rows(path) if suffix_of(path) in _ROWS else self._arrays(path, field)

    def _arrays(self, path: Path, field: str) -> tuple[Dataset, Sequence[str]]:
        if self.size is not None:
            raise ConfigError("task.data.size: has no effect on arrays; leave it out")
        arrays = read_arrays(str(path), field)
        images, captions = (arrays.get(name) for name in ("images", "captions"))
        if images is None or captions is None or captions.dtype.kind != "U":
            raise ConfigError(
                f"{field}: {path} must hold 'images' and 'captions' (text), has "
                f"{', '.join(arrays) or 'none'}"
            )
        if captions.shape != (len(images),):
            raise ConfigError(
                f"{field}: {path} has {len(images)} images and captions of shape {captions.shape}; "
                "give one to each"
            )
        return TensorDataset((images_of(images, "images", field),)), captions.tolist()

    def _rows(self, path: Path) -> tuple[Dataset, Sequence[str]]:
        if self.size is None:
            raise ConfigError(
                "task.data.size: missing (pixels of the sides that image files are brought to); "
                "add 'size: ...'"
            )
        rows = [
            self._row(line, f"task.data.path: line {number} of {path}")
            for number, line in enumerate(read_bytes(path, "task.data.path").splitlines(), 1)
            if line.strip()
        ]
        files = [path.parent / image for image, _ in rows]
        images = Decoded(len(files), lambda k: open_image(files[k], "task.data.path"), self.size)
        return in_memory(images), [caption for _, caption in rows]

    def _row(self, line: bytes, where: str) -> tuple[str, str]:
        try:
            row: Any = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{where} is no JSON ({error}); correct it") from error
        known = row if isinstance(row, dict) else {}
        for field, name in (("image", self.image), ("caption", self.caption)):
            if not isinstance(known.get(name), str):
                raise ConfigError(
                    f"{where} has no text '{name}'; set task.data.{field}, or correct the file"
                )
        return known[self.image], known[self.caption]


class HubPairs(PairSource):
    """Images and captions of a dataset of the package `datasets`, by name or from disk."""

    name: Literal["dataset-pairs"] = "dataset-pairs"
    dataset: str
    """Name on the hub, or a folder (of `save_to_disk`, or of data files)."""
    subset: str | None = None
    """Which configuration of the dataset."""
    split: str = "train"
    """Which split to train on."""
    image: str = "image"
    """Column of the images."""
    caption: str = "caption"
    """Column of the captions; of a list of them, the first is taken."""
    size: Count
    """Pixels of the sides that images are brought to, from their largest central square."""

    def sides(self) -> tuple[Dataset, Sequence[str]]:
        """Return them in the order of the split."""
        splits = load_splits(self.dataset, self.subset, field="task.data.dataset")
        rows = rows_of(splits, self.split, "task.data.split", self.dataset)
        images = pictures_of(rows, self.image, self.dataset, self.size)
        if self.caption not in rows.column_names:
            raise ConfigError(
                f"task.data.caption: '{self.dataset}' has no column '{self.caption}'"
                f"{nearest(self.caption, rows.column_names)}"
            )
        captions = [c[0] if isinstance(c, list) and c else c for c in rows[self.caption]]
        for number, caption in enumerate(captions, 1):
            if not isinstance(caption, str):
                raise ConfigError(
                    f"task.data.caption: row {number} of '{self.dataset}' has no text in "
                    f"'{self.caption}', but {caption!r}; name another column, or mend the data"
                )
        return images, captions
