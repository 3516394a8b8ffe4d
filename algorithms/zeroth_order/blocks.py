"""Partitions of a model's tensors, by their names."""

from __future__ import annotations

from typing import Literal

from gossamer.runtime import RowLayout

__all__ = ["Partition", "blocks_of", "is_layer"]

Partition = Literal["none", "layer", "sublayer", "module"]


def blocks_of(layout: RowLayout, partition: Partition) -> list[frozenset[int] | None]:
    """Return the blocks in the order of the model, as sets of tensor ids; None: all tensors.

    ``layer``: a numbered part of the model (``model.layers.3``, ``blocks.0``) is a block, so is any
    module outside them that owns parameters; ``sublayer``: what is directly inside a numbered part
    (its attention, its MLP, its norms); ``module``: every module that owns parameters.
    """
    if partition == "none":
        return [None]
    found: dict[str, set[int]] = {}
    for s in layout.slices:
        found.setdefault(_block_name(s.name, partition), set()).add(s.tensor)
    return [frozenset(tensors) for tensors in found.values()]


def is_layer(module: str) -> bool:
    """Say whether a module's name is that of a numbered part of the model, of no other inside."""
    *outer, last = module.split(".")
    return last.isdigit() and not any(part.isdigit() for part in outer)


def _block_name(name: str, partition: Partition) -> str:
    owner = name.rpartition(".")[0].split(".")
    numbered = next((k for k, part in enumerate(owner) if part.isdigit()), None)
    if partition == "module" or numbered is None:
        return ".".join(owner)
    return ".".join(owner[: numbered + (1 if partition == "layer" else 2)])
