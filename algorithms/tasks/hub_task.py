"""What tasks of a Hugging Face model and dataset have in common: fields, and how they load."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import nn

from gossamer.algorithms.tasks.hub import (
    load_model,
    load_splits,
    load_tokenizer,
    require_length,
)
from gossamer.algorithms.tasks.partition import ShardedTask
from gossamer.runtime.errors import ConfigError, nearest

__all__ = ["HubTask"]


class HubTask(ShardedTask, ABC):
    """A task whose model and data have names on the hub, or lie in local files."""

    model: str
    """Name on the hub, or folder of a saved model."""
    pretrained: bool = True
    """Start from the checkpoint's weights; false: from fresh ones, a function of the seed."""
    tokenizer: str | None = None
    """Name or folder of the tokenizer; None: the model's."""
    dataset: str
    """Name on the hub, folder (of `save_to_disk`, or of data files), or one file: .json, .jsonl,
    .csv, .tsv, .txt or .parquet. A relative path is looked for here and in GOSSAMER_DATA."""
    subset: str | None = None
    """Which configuration of the dataset, such as `wikitext-2-raw-v1`."""
    header: tuple[str, ...] = ()
    """Names of the columns, where .csv or .tsv files have no line of them; each file of a folder is
    then the split of its name."""
    train_split: str = "train"
    """Which split to train on; a single file is `train`."""
    test_split: str | None = None
    """Which split to test on; None: examples held out of the training split."""
    rows: int | None = Field(None, ge=1, strict=True)
    """Use only the first so many rows of each split; None: all."""

    def load_tokenizer(self) -> Any:
        """Return the tokenizer.

        Raises:
            ConfigError: it cannot be found or read.
        """
        field = "task.tokenizer" if self.tokenizer else "task.model"
        return load_tokenizer(self.tokenizer or self.model, field)

    def load_splits(self) -> dict[str, Any]:
        """Return the splits of the dataset by name.

        Raises:
            ConfigError: it cannot be found or read.
        """
        return load_splits(self.dataset, self.subset, self.header)

    def choose_rows(
        self,
        splits: Mapping[str, Any],
        split: str,
        field: str,
        columns: Mapping[str, Iterable[str]],
    ) -> Any:
        """Return the first ``rows`` rows of a split.

        Args:
            splits: as of ``load_splits``.
            split: which.
            field: where the user named it.
            columns: field -> the columns it asks for.

        Raises:
            ConfigError: there is no such split, or a column is missing.
        """
        if split not in splits:
            raise ConfigError(
                f"{field}: '{self.dataset}' has no split '{split}'{nearest(split, splits)}"
            )
        rows = splits[split]
        for column_field, wanted in columns.items():
            for column in wanted:
                if column not in rows.column_names:
                    raise ConfigError(
                        f"{column_field}: '{self.dataset}' has no column '{column}'"
                        f"{nearest(column, rows.column_names)}"
                    )
        return rows.select(range(min(self.rows or len(rows), len(rows))))

    def load_model(
        self,
        auto: str,
        tokenizer: Any,
        seed: int,
        tokens: int,
        dtype: torch.dtype = torch.float32,
        **config: Any,
    ) -> nn.Module:
        """Return the model.

        Args:
            auto: the class of ``transformers`` that chooses the model's.
            tokenizer: whose tokens it is to know.
            seed: of fresh weights.
            tokens: length of its longest input.
            dtype: of the weights.
            config: changes to its configuration.

        Raises:
            ConfigError: it cannot be found or read, its inputs are shorter, or it knows fewer
                tokens than the tokenizer.
        """
        model = load_model(
            auto, self.model, pretrained=self.pretrained, seed=seed, dtype=dtype, **config
        )
        settings: Any = model.config
        settings.pad_token_id = tokenizer.pad_token_id
        require_length(settings, self.model, tokens)
        if len(tokenizer) > settings.vocab_size:
            raise ConfigError(
                f"task.tokenizer: has {len(tokenizer)} tokens, but '{self.model}' knows "
                f"{settings.vocab_size}; use the model's own"
            )
        return model
