"""Pairs of an image and a caption: arrays, JSON lines, and datasets of the hub."""

from __future__ import annotations

import json
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
from gossamer.algorithms.tasks.image_files import Decoded, in_memory, open_image
from gossamer.algorithms.tasks.image_sources import images_of, read_arrays
from gossamer.algorithms.tasks.tokenizers import open_tokenizer
from gossamer.runtime.component import Component
from gossamer.runtime.errors import ConfigError

__all__ = ["PairData", "Pairs"]

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


class Pairs(Component):
    """Images with a caption each.

    An .npz file with `images` and `captions` (text), or JSON lines that name image files: paths
    beside the file, or absolute.
    """

    name: Literal["pairs"] = "pairs"
    path: str
    """Of the .npz, .jsonl or .jsonl.gz file; a relative one is looked for here and in
    GOSSAMER_DATA."""
    image: str = "image"
    """Field of the JSON lines with the image's path."""
    caption: str = "caption"
    """Field of the JSON lines with the caption."""
    size: Annotated[int, Field(ge=1, strict=True)] | None = None
    """Pixels of the sides that image files are brought to, from their largest central square;
    required for JSON lines, without effect on arrays."""
    tokenizer: str = "bytes"
    """`bytes`, 256 of them, or a tokenizer of `transformers`, by name or folder."""
    context: int = Field(default=64, ge=1, strict=True)
    """Tokens of a caption at most; what is longer is cut."""

    def read(self) -> PairData:
        """Return them in the order of the file.

        Raises:
            ConfigError: a file is missing or broken, or captions and images differ in number.
        """
        field = "task.data.path"
        path = locate(self.path, field)
        images, captions = (
            self._rows(path) if suffix_of(path) in _ROWS else self._arrays(path, field)
        )
        tokenizer = open_tokenizer(self.tokenizer)
        encoded = tokenizer.encode_alone([c.encode() for c in captions], self.context)
        tokens = np.full((len(captions), self.context), -1, np.int64)
        for row, ids in zip(tokens, encoded, strict=True):
            row[: len(ids)] = ids
        dataset = Zipped(images, TensorDataset((torch.from_numpy(tokens),)))
        return PairData(dataset, tokenizer.vocabulary, self.context)

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
