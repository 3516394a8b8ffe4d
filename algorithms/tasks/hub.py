"""Loading Hugging Face models, tokenizers and datasets, with errors that say what to do.

The packages are imported when first asked for: they are an extra, and slow to import.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from gossamer.algorithms.tasks.files import find_data
from gossamer.algorithms.tasks.models import seeded
from gossamer.runtime.errors import ConfigError

__all__ = ["load_model", "load_package", "load_splits", "load_tokenizer"]

_READERS: dict[str, tuple[str, dict[str, str]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"delimiter": "\t"}),
    ".txt": ("text", {}),
    ".parquet": ("parquet", {}),
}
_TABLES = {".csv", ".tsv"}


def load_splits(dataset: str, subset: str | None, header: Sequence[str] = ()) -> dict[str, Any]:
    """Return the splits of a dataset by name; a single file is the split ``train``.

    Args:
        dataset: a name on the hub, a folder or a file.
        subset: which configuration of the dataset, where it has several.
        header: the columns of tables (.csv, .tsv) whose first line is a row already; each table of
            a folder is then the split of its name.

    Raises:
        ConfigError: it cannot be found or read, or ``header`` goes with no table.
    """
    datasets = load_package("datasets")
    path = find_data(dataset)
    with _explained("task.dataset", dataset):
        if path is not None and (path.is_file() or header):
            files = {"train": path} if path.is_file() else _tables_of(path)
            suffixes = {_suffix(file) for file in files.values()}
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
            found = datasets.load_dataset(reader, data_files=places, **options, **names)
        elif header:
            raise ConfigError(f"task.header: '{dataset}' is no local file or folder; leave it out")
        elif path is not None and any(
            (path / name).exists() for name in ("dataset_dict.json", "state.json")
        ):
            found = datasets.load_from_disk(str(path))
        else:
            found = datasets.load_dataset(str(path or dataset), subset)
    return dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}


def load_tokenizer(name: str, field: str) -> Any:
    """Return a tokenizer that can pad.

    Raises:
        ConfigError: it cannot be found or read; names ``field``.
    """
    transformers = load_package("transformers")
    path = find_data(name)
    with _explained(field, name):
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
    with _explained("task.model", name), seeded(seed):
        settings = transformers.AutoConfig.from_pretrained(place, **config)
        make = getattr(transformers, auto)
        if pretrained:
            # safetensors alone: the other format is pickle, which runs code.
            model = make.from_pretrained(place, config=settings, use_safetensors=True)
        else:
            model = make.from_config(settings)
    model = model.to(dtype).train()
    assert isinstance(model, nn.Module)
    return model


def load_package(name: str) -> Any:
    """Return a package of the extra ``huggingface``.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"task: needs the package '{name}' ({error}); pip install 'gossamer[huggingface]'"
        ) from error


def _tables_of(folder: Path) -> dict[str, Path]:
    """Return the tables of a folder, each by its name without endings."""
    files = sorted(file for file in folder.iterdir() if _suffix(file) in _TABLES)
    return {file.name.partition(".")[0]: file for file in files}


def _suffix(file: Path) -> str:
    return file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix


@contextmanager
def _explained(field: str, name: str) -> Iterator[None]:
    """Turn what the packages raise for a wrong name or a broken file into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except (
        *(OSError, ValueError, KeyError, RuntimeError, SafetensorError),
        load_package("datasets").exceptions.DatasetsError,
    ) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(
            f"{field}: cannot load '{name}' ({reason}); give a name on the hub (not with "
            "HF_HUB_OFFLINE=1, unless it is in the cache), or a local path"
        ) from error
