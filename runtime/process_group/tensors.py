"""Tensors as torch's callers pass them, and flat ones as the collectives take them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

__all__ = ["OLD_NAMES", "by_device", "cut", "flatten", "write_all_back", "write_back"]

OLD_NAMES = {
    "all_gather_single": "_allgather_base",
    "all_gather_single_coalesced": "allgather_into_tensor_coalesced",
    "reduce_scatter_single": "_reduce_scatter_base",
    "reduce_scatter_single_coalesced": "reduce_scatter_tensor_coalesced",
    "all_to_all_single": "alltoall_base",
}
"""What a group's methods are called before torch 2.13, its C++ included."""


def by_device(method: Callable[..., Any]) -> Callable[..., Any]:
    """Hand a group's calls with tensors of another device to ``group_of(device)``."""

    @wraps(method)
    def call(self: Any, *args: Any, **options: Any) -> Any:
        device = next((t.device for t in _tensors_of(args)), torch.device("cpu"))
        if device.type == "cpu":
            return method(self, *args, **options)
        group, name = self.group_of(device), method.__name__
        if not hasattr(group, name):
            name = OLD_NAMES[name]
        return getattr(group, name)(*args, **options)

    return call


def flatten(x: Tensor) -> Tensor:
    """Return all elements in a row: a view where ``x`` is contiguous, else a copy.

    Raises:
        ValueError: the tensor is sparse.
    """
    if x.layout != torch.strided:
        raise ValueError(f"backend gossamer moves dense tensors, got {x.layout}; use to_dense()")
    return x.contiguous().view(-1)


def write_back(x: Tensor, flat: Tensor) -> None:
    """Let ``x`` have the elements of ``flatten(x)``, which was written."""
    if not x.is_contiguous():
        x.copy_(flat.view(x.shape))


def write_all_back(xs: Sequence[Tensor], flats: Sequence[Tensor]) -> None:
    """As ``write_back``, one by one."""
    for x, flat in zip(xs, flats, strict=True):
        write_back(x, flat)


def cut(x: Tensor, splits: Sequence[int], size: int) -> list[Tensor]:
    """Return the flat parts of ``x``, a view of it where it is contiguous.

    Args:
        x: what to cut.
        splits: rows of each part; none to cut evenly.
        size: number of parts.

    Raises:
        ValueError: it cannot be cut so.
    """
    flat = flatten(x)
    if not splits:
        if flat.numel() % size:
            raise ValueError(
                f"backend gossamer: {flat.numel()} elements cannot be cut into {size} equal parts"
            )
        return list(flat.view(size, -1)) if flat.numel() else [flat] * size
    if sum(splits) != x.shape[0] or len(splits) != size:
        raise ValueError(
            f"all_to_all: split sizes {list(splits)} do not cut {x.shape[0]} rows for {size} ranks"
        )
    width = flat.numel() // x.shape[0] if x.shape[0] else 0
    return list(flat.split([count * width for count in splits]))


def _tensors_of(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors_of(value)
