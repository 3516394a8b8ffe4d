"""Loading Hugging Face models, tokenizers and datasets, with errors that say what to do.

The packages are imported when first asked for: they are an extra, and slow to import.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from gossamer.algorithms.tasks.files import find_data, suffix_of
from gossamer.algorithms.tasks.models import seeded
from gossamer.runtime.errors import ConfigError

__all__ = [
    "Logits",
    "explained",
    "load_model",
    "load_package",
    "load_splits",
    "load_tokenizer",
    "require_length",
]

_READERS: dict[str, tuple[str, dict[str, str]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"delimiter": "\t"}),
    ".txt": ("text", {}),
    ".parquet": ("parquet", {}),
}
_TABLES = {".csv", ".tsv"}


def load_splits(
    dataset: str,
    subset: str | None,
    header: Sequence[str] = (),
    *,
    streaming: bool = False,
    field: str = "task.dataset",
) -> dict[str, Any]:
    """Return the splits of a dataset by name; a single file is the split ``train``.

    Args:
        dataset: a name on the hub, a folder or a file.
        subset: which configuration of the dataset, where it has several.
        header: the columns of tables (.csv, .tsv) whose first line is a row already; each table of
            a folder is then the split of its name.
        streaming: read rows as they are asked for (``IterableDataset``), nothing before.
        field: where the user named it, for the message.

    Raises:
        ConfigError: it cannot be found or read, ``header`` goes with no table, or ``streaming``
            with what `save_to_disk` wrote.
    """
    datasets = load_package("datasets")
    path = find_data(dataset)
    with explained(field, dataset):
        if path is not None and (path.is_file() or header):
            files = {"train": path} if path.is_file() else _tables_of(path)
            suffixes = {suffix_of(file) for file in files.values()}
            for suffix in suffixes - set(_READERS):
                raise ValueError(
                    f"files must end in {', '.join(_READERS)}, or these with .gz, not in '{suffix}'"
                )
            if header and (len(suffixes) != 1 or not suffixes <= _TABLES):
                raise ConfigError(
                    f"task.header: '{dataset}' is no table, nor a folder of .csv or of .tsv files; "
                    "leave it out"
                )
            reader, options = _READERS[suffixes.pop()]
            names = {"column_names": list(header)} if header else {}
            places = {split: str(file) for split, file in files.items()}
            found = datasets.load_dataset(
                reader, data_files=places, streaming=streaming, **options, **names
            )
        elif header:
            raise ConfigError(f"task.header: '{dataset}' is no local file or folder; leave it out")
        elif path is not None and any(
            (path / name).exists() for name in ("dataset_dict.json", "state.json")
        ):
            if streaming:
                raise ConfigError(
                    f"task.streaming: '{dataset}' was written by save_to_disk, which is read from "
                    "disk as it is; leave it out"
                )
            found = datasets.load_from_disk(str(path))
        else:
            found = datasets.load_dataset(str(path or dataset), subset, streaming=streaming)
    return dict(found) if isinstance(found, dict) else {"train": found}


def load_tokenizer(name: str, field: str) -> Any:
    """Return a tokenizer that can pad.

    Raises:
        ConfigError: it cannot be found or read; names ``field``.
    """
    transformers = load_package("transformers")
    path = find_data(name)
    with explained(field, name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path or name))
    if tokenizer.pad_token is None:  # GPT-2: padding is masked, so that any token will do
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    auto: str,
    name: str,
    *,
    pretrained: bool,
    seed: int,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> nn.Module:
    """Return a model in training mode.

    Args:
        auto: the class of ``transformers`` that chooses the model's, ``AutoModelFor...``.
        name: on the hub, or a folder.
        pretrained: whether the weights are the checkpoint's; a new head's are always fresh.
        seed: of fresh weights.
        dtype: of the weights.
        config: changes to the model's configuration.

    Raises:
        ConfigError: it cannot be found or read, or has no such head.
    """
    transformers = load_package("transformers")
    place = str(find_data(name) or name)
    with explained("task.model", name), seeded(seed):
        settings = transformers.AutoConfig.from_pretrained(place, **config)
        make = getattr(transformers, auto)
        if pretrained:
            # safetensors alone: the other format is pickle, which runs code.
            model = make.from_pretrained(place, config=settings, dtype=dtype, use_safetensors=True)
        else:
            model = make.from_config(settings, dtype=dtype)
    for p in model.parameters():
        # Not model.to: the package keeps buffers in float32 that 8 bits would spoil, such as
        # rotary frequencies.
        p.data = p.data.to(dtype)
    assert isinstance(model, nn.Module)
    return model.train()


def require_length(config: Any, name: str, tokens: int) -> None:
    """Check that a model of this configuration takes so many tokens.

    Raises:
        ConfigError: it takes fewer.
    """
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        raise ConfigError(f"task.context: '{name}' takes at most {longest} tokens, got {tokens}")


class Logits(nn.Module):
    """A model of ``transformers`` as a function from tensors to its logits."""

    def __init__(self, model: nn.Module, inputs: tuple[str, ...] = ("input_ids",)) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, *tensors: Tensor) -> Tensor:
        """Return the logits; ``tensors`` are the model's keyword arguments ``inputs``, in order."""
        given = dict(zip(self.inputs, tensors, strict=True))
        logits: Tensor = self.model(**given).logits
        return logits


def load_package(name: str, extra: str = "huggingface") -> Any:
    """Return a package of an extra.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"task: needs the package '{name}' ({error}); pip install 'gossamer[{extra}]'"
        ) from error


def _tables_of(folder: Path) -> dict[str, Path]:
    """Return the tables of a folder, each by its name without endings."""
    files = sorted(file for file in folder.iterdir() if suffix_of(file) in _TABLES)
    return {file.name.partition(".")[0]: file for file in files}


@contextmanager
def explained(field: str, name: str, row: int = 1) -> Iterator[None]:
    """Turn what the packages raise for a wrong name or a broken file into a ConfigError.

    Args:
        field: where the user named it.
        name: what was named.
        row: of a dataset, from 1: beyond the first one, it was found and opened.
    """
    try:
        yield
    except ConfigError:
        raise
    except (
        # TypeError: rows of a dataset whose columns change their type.
        *(OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError),
        load_package("datasets").exceptions.DatasetsError,
    ) as error:
        if row > 1:
            reason = shorten(str(error), 300) or type(error).__name__
            raise ConfigError(
                f"{field}: cannot read '{name}' from row {row} as read on ({reason}); mend the "
                "data, all rows of which must have the same columns"
            ) from error
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(
            f"{field}: cannot load '{name}' ({reason}); give a name on the hub (not with "
            "HF_HUB_OFFLINE=1, unless it is in the cache), or a local path"
        ) from error
