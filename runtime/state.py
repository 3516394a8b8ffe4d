"""States as flat names: any dataclass of tensors, numbers, nested states, lists and dicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gossamer.runtime.errors import ConfigError

__all__ = ["Scalar", "adopt", "flatten", "part_of", "restore"]

Scalar = int | float | bool | str | None


def flatten(state: Any, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Scalar]]:
    """Return the tensors and the numbers of ``state`` by dotted name.

    Raises:
        TypeError: a field is none of tensor, number, text, None, dataclass, list, tuple or dict,
            or two have the same name.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Scalar] = {}
    for name, value, _ in _leaves(state, prefix):
        if name in tensors or name in scalars:
            raise TypeError(f"state: two fields are called '{name}'; rename a key")
        if isinstance(value, Tensor):
            tensors[name] = value
        else:
            scalars[name] = value
    return tensors, scalars


def restore(
    state: Any, tensors: dict[str, Tensor], scalars: dict[str, Scalar], prefix: str = ""
) -> None:
    """Copy tensors and numbers back into ``state``, whose tensors keep their memory.

    A field that is None in one and a tensor in the other (made at the first step, say) takes what
    was saved.

    Raises:
        ConfigError: a name is missing, or a tensor has another shape or dtype: the checkpoint is
            another algorithm's or another model's.
    """
    for name, value, put in list(_leaves(state, prefix)):
        found: Any = tensors.get(name, scalars.get(name, _MISSING))
        if found is _MISSING or (
            value is not None
            and found is not None
            and isinstance(value, Tensor) != isinstance(found, Tensor)
        ):
            raise ConfigError(
                f"resume: the checkpoint has no '{name}'; it was written by another algorithm, "
                "optimizer or model; resume with the configuration of its run"
            )
        if found is None or value is None or not isinstance(value, Tensor):
            put(found)
        elif found.shape != value.shape or found.dtype != value.dtype:
            raise ConfigError(
                f"resume: '{name}' is {tuple(found.shape)} {found.dtype} in the checkpoint and "
                f"{tuple(value.shape)} {value.dtype} in this run; the model must be the same"
            )
        else:
            with torch.no_grad():
                value.copy_(found)


def part_of(state: Any, d: int, begin: int, end: int) -> Any:
    """Return the state of columns begin..end: views of rows (local, d), copies of all else.

    Args:
        state: a dataclass of tensors and numbers, or None.
        d: length of a row.
        begin: first column.
        end: one past the last.
    """
    if state is None:
        return None
    parts = {
        name: value[:, begin:end]
        if _has_rows(value, d)
        else value.clone()
        if isinstance(value, Tensor)
        else value
        for name, value in _fields(state)
    }
    return dataclasses.replace(state, **parts)


def adopt(state: Any, part: Any, d: int) -> None:
    """Take over from the ``part_of`` state what is no row: what all parts move alike."""
    for name, value in _fields(state):
        if not _has_rows(value, d):
            setattr(state, name, getattr(part, name))


def _fields(state: Any) -> list[tuple[str, Any]]:
    if state is None:
        return []
    return [(f.name, getattr(state, f.name)) for f in dataclasses.fields(state)]


def _has_rows(value: Any, d: int) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == d


_MISSING = object()


def _leaves(state: Any, prefix: str, put_state: Any = None) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, value, setter) of every leaf; ``put_state`` replaces ``state`` in its owner."""
    if dataclasses.is_dataclass(state) and not isinstance(state, type):
        children = [
            (f.name, getattr(state, f.name), _attribute_setter(state, f.name))
            for f in dataclasses.fields(state)
        ]
    elif isinstance(state, dict):
        children = [(str(k), v, _item_setter(state, k)) for k, v in state.items()]
    elif isinstance(state, list):
        children = [(str(k), v, _item_setter(state, k)) for k, v in enumerate(state)]
    elif isinstance(state, tuple):
        children = [(str(k), v, put) for k, (v, put) in enumerate(_tuple_items(state, put_state))]
    else:
        raise TypeError(f"state: {prefix or 'it'} is {type(state).__name__}, not a dataclass")
    for name, value, put in children:
        full = f"{prefix}.{name}" if prefix else name
        if value is None or isinstance(value, Tensor | int | float | bool | str):
            yield full, value, put
        else:
            yield from _leaves(value, full, put)


def _tuple_items(state: tuple[Any, ...], put_state: Any) -> list[tuple[Any, Any]]:
    """Return (value, setter) of a tuple's items; a setter replaces the whole tuple."""
    items = list(state)
    make = getattr(type(state), "_make", tuple)  # a NamedTuple's or a plain one

    def put_at(k: int, value: Any) -> None:
        items[k] = value
        put_state(make(items))

    return [(value, partial(put_at, k)) for k, value in enumerate(state)]


def _attribute_setter(owner: Any, name: str) -> Any:
    return lambda value: setattr(owner, name, value)


def _item_setter(owner: Any, key: Any) -> Any:
    def put(value: Any) -> None:
        owner[key] = value

    return put
