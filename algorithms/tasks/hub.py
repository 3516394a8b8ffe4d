"""Loading Hugging Face models, tokenizers and datasets, with errors that say what to do.

The packages are imported when first asked for: they are an extra, and slow to import.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError
from torch import nn

from gossamer.algorithms.tasks.files import find_data
from gossamer.algorithms.tasks.models import seeded
from gossamer.runtime.errors import ConfigError

__all__ = ["load_model", "load_splits", "load_tokenizer"]

_READERS: dict[str, tuple[str, dict[str, str]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"delimiter": "\t"}),
    ".txt": ("text", {}),
    ".parquet": ("parquet", {}),
}


def load_splits(dataset: str, subset: str | None) -> dict[str, Any]:
    """Return the splits of a dataset by name; a single file is the split ``train``.

    Args:
        dataset: a name on the hub, a folder or a file.
        subset: which configuration of the dataset, where it has several.

    Raises:
        ConfigError: it cannot be found or read.
    """
    datasets = _package("datasets")
    path = find_data(dataset)
    with _explained("task.dataset", dataset):
        if path is not None and path.is_file():
            suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
            if suffix not in _READERS:
                raise ValueError(f"files must end in {', '.join(_READERS)}, or these with .gz")
            reader, options = _READERS[suffix]
            found = datasets.load_dataset(reader, data_files={"train": str(path)}, **options)
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
    transformers = _package("transformers")
    path = find_data(name)
    with _explained(field, name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path or name))
    if tokenizer.pad_token is None:  # GPT-2: padding is masked, so that any token will do
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(auto: str, name: str, *, pretrained: bool, seed: int, **config: Any) -> nn.Module:
    """Return a float32 model in training mode.

    Args:
        auto: the class of ``transformers`` that chooses the model's, ``AutoModelFor...``.
        name: on the hub, or a folder.
        pretrained: whether the weights are the checkpoint's; a new head's are always fresh.
        seed: of fresh weights.
        config: changes to the model's configuration.

    Raises:
        ConfigError: it cannot be found or read, or has no such head.
    """
    transformers = _package("transformers")
    place = str(find_data(name) or name)
    with _explained("task.model", name), seeded(seed):
        settings = transformers.AutoConfig.from_pretrained(place, **config)
        make = getattr(transformers, auto)
        if pretrained:
            # safetensors alone: the other format is pickle, which runs code.
            model = make.from_pretrained(place, config=settings, use_safetensors=True)
        else:
            model = make.from_config(settings)
    model = model.float().train()
    assert isinstance(model, nn.Module)
    return model


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"task.name: huggingface needs the package '{name}' ({error}); "
            "pip install 'gossamer[huggingface]'"
        ) from error


@contextmanager
def _explained(field: str, name: str) -> Iterator[None]:
    """Turn what the packages raise for a wrong name or a broken file into a ConfigError."""
    try:
        yield
    except (
        *(OSError, ValueError, KeyError, RuntimeError, SafetensorError),
        _package("datasets").exceptions.DatasetsError,
    ) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(
            f"{field}: cannot load '{name}' ({reason}); give a name on the hub (not with "
            "HF_HUB_OFFLINE=1, unless it is in the cache), or a local path"
        ) from error
