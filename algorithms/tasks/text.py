"""Byte-level language modelling on any text, with a small transformer."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, ValidationInfo, field_validator

from gossamer.algorithms.problems import Problem, default_dtype
from gossamer.algorithms.tasks.arrays import hold_out
from gossamer.algorithms.tasks.files import expand, read_bytes, standard_library
from gossamer.algorithms.tasks.language import Windows, count_next_tokens, next_token_loss
from gossamer.algorithms.tasks.models import seeded
from gossamer.algorithms.tasks.partition import ShardedTask
from gossamer.algorithms.tasks.transformer import Transformer

__all__ = ["Text"]

Count = Annotated[int, Field(ge=1, strict=True)]

_BYTES = 256


class Text(ShardedTask):
    """Predict the next byte of a text. An example is a window of `context` bytes.

    A window's label, for `sorted` and `dirichlet`, is the file it starts in.
    """

    name: str = "text"
    path: str | tuple[str, ...] = ()
    """Files (also `.gz`), folders (all files below) or patterns such as `docs/**/*.md`; relative
    ones are looked for here and in GOSSAMER_DATA. Without any, the Python standard library's own
    source."""
    context: Count = 128
    """Bytes that a prediction can see, at most."""
    layers: Count = 2
    """Blocks of the transformer."""
    width: Count = 128
    """Length of its hidden vectors."""
    heads: Count = 4
    """Attention heads; a divisor of `width`."""
    tied: bool = True
    """Share one matrix between the embedding and the output layer."""
    test_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the windows held out as the test set, chosen by the seed."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of the parameters."""

    @field_validator("path")
    @classmethod
    def _one_path_is_a_list_of_one(cls, path: str | tuple[str, ...]) -> tuple[str, ...]:
        return (path,) if isinstance(path, str) else path

    @field_validator("heads")
    @classmethod
    def _heads_divide_the_width(cls, heads: int, info: ValidationInfo) -> int:
        width = info.data.get("width", heads)
        if width % heads:
            raise ValueError(f"must divide width, {width}")
        return heads

    def build(self, n: int, seed: int) -> Problem:
        """Read the files, hold windows out, split the others, and build the transformer.

        Raises:
            ConfigError: a file is missing or damaged, or there are fewer windows than ranks.
        """
        tokens, owner = self._read()
        train, test = hold_out(Windows(tokens, self.context), self.test_fraction, seed)
        with seeded(seed):
            module = Transformer(
                vocabulary=_BYTES,
                context=self.context,
                layers=self.layers,
                width=self.width,
                heads=self.heads,
                tied=self.tied,
            )
        return Problem(
            module=module.to(default_dtype(self.dtype)),
            train=train,
            shards=self.split(owner[train.places.numpy() * self.context], n, seed),
            loss=next_token_loss,
            test=test,
            weigh=count_next_tokens,
            objective="examples",
        )

    def _read(self) -> tuple[torch.Tensor, np.ndarray]:
        """Return the bytes of all files, uint8, and for each the number of its file."""
        files = standard_library()
        if self.path:
            files = [file for path in self.path for file in expand(path, "task.path")]
        parts = [np.frombuffer(read_bytes(file, "task.path"), np.uint8) for file in files]
        owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        return torch.from_numpy(np.concatenate(parts)), owner
