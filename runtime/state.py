"""States as flat names: any dataclass of tensors, numbers, nested states, lists and dicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gossamer.runtime.errors import ConfigError

__all__ = ["Scalar", "flatten", "restore"]

Scalar = int | float | bool | str | None


def flatten(state: Any, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Scalar]]:
    """Return the tensors and the numbers of ``state`` by dotted name.

    Raises:
        TypeError: a field is none of tensor, number, text, None, dataclass, list, tuple or dict.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Scalar] = {}
    for name, value, _ in _leaves(state, prefix):
        if isinstance(value, Tensor):
            tensors[name] = value
        else:
            scalars[name] = value
    return tensors, scalars


def restore(
    state: Any, tensors: dict[str, Tensor], scalars: dict[str, Scalar], prefix: str = ""
) -> None:
    """Copy tensors and numbers back into ``state``, whose tensors keep their memory.

    Raises:
        ConfigError: a name is missing, or a tensor has another shape or dtype: the checkpoint is
            another algorithm's or another model's.
    """
    for name, value, put in list(_leaves(state, prefix)):
        found: Any = tensors.get(name) if isinstance(value, Tensor) else scalars.get(name, _MISSING)
        if (found is None and isinstance(value, Tensor)) or found is _MISSING:
            raise ConfigError(
                f"resume: the checkpoint has no '{name}'; it was written by another algorithm, "
                "optimizer or model; resume with the configuration of its run"
            )
        if not isinstance(value, Tensor):
            put(found)
        elif found.shape != value.shape or found.dtype != value.dtype:
            raise ConfigError(
                f"resume: '{name}' is {tuple(found.shape)} {found.dtype} in the checkpoint and "
                f"{tuple(value.shape)} {value.dtype} in this run; the model must be the same"
            )
        else:
            with torch.no_grad():
                value.copy_(found)


_MISSING = object()


def _leaves(state: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, value, setter) of every leaf."""
    if dataclasses.is_dataclass(state) and not isinstance(state, type):
        children = [
            (f.name, getattr(state, f.name), _attribute_setter(state, f.name))
            for f in dataclasses.fields(state)
        ]
    elif isinstance(state, dict):
        children = [(str(k), v, _item_setter(state, k)) for k, v in state.items()]
    elif isinstance(state, list | tuple):
        children = [(str(k), v, _item_setter(state, k)) for k, v in enumerate(state)]
    else:
        raise TypeError(f"state: {prefix or 'it'} is {type(state).__name__}, not a dataclass")
    for name, value, put in children:
        full = f"{prefix}.{name}" if prefix else name
        if value is None or isinstance(value, Tensor | int | float | bool | str):
            yield full, value, put
        else:
            yield from _leaves(value, full)


def _attribute_setter(owner: Any, name: str) -> Any:
    return lambda value: setattr(owner, name, value)


def _item_setter(owner: Any, key: Any) -> Any:
    def put(value: Any) -> None:
        owner[key] = value

    return put
