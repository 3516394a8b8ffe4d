"""The random support of a sparse matrix: a pure function of (seed, layer)."""

from __future__ import annotations

import math

import numpy as np
import torch

from gossamer.runtime.native import Support
from gossamer.runtime.random import Random

__all__ = ["count_elements", "draw_support", "no_support", "shape_only"]


def count_elements(shape: tuple[int, int], density: float) -> int:
    """Return int(density * (d * p)), as SLTrain counts (arXiv:2406.02214)."""
    d, p = shape
    return int(density * (d * p))


def draw_support(
    shape: tuple[int, int], density: float, seed: int, layer: int, draw: int = 0
) -> Support:
    """Draw a uniform subset of all places, without replacement over the whole matrix.

    The first distinct ones of a counted sequence of places (of what is left out, above half), so
    that memory goes with the subset and every rank draws the same, whatever its generators do.

    Args:
        shape: (d, p), fewer than 2^31 places.
        density: share of places in the subset, in [0, 1].
        seed: of the run.
        layer: number of the layer.
        draw: which of the supports of (seed, layer).
    """
    d, p = shape
    places, count = d * p, count_elements(shape, density)
    if count <= places - count:
        chosen = np.sort(_first_distinct(shape, count, seed, layer, draw))
    else:
        is_in = np.ones(places, dtype=bool)
        is_in[_first_distinct(shape, places - count, seed, layer, draw)] = False
        chosen = np.flatnonzero(is_in)
    return Support.of(shape, torch.from_numpy(chosen))


def shape_only(shape: tuple[int, int], density: float) -> Support:
    """Return a support on the meta device, without places."""
    sizes = (count_elements(shape, density), shape[0] + 1)
    return Support(shape, *(torch.empty(n, dtype=torch.int32, device="meta") for n in sizes))


def no_support(shape: tuple[int, int], device: torch.device) -> Support:
    """Return the support of a matrix of zeros."""
    sizes = (0, shape[0] + 1)
    return Support(shape, *(torch.zeros(n, dtype=torch.int32, device=device) for n in sizes))


def _first_distinct(
    shape: tuple[int, int], count: int, seed: int, layer: int, draw: int
) -> np.ndarray:
    """Return the first ``count`` distinct places of the sequence, at most half of all, int64."""
    d, p = shape
    if count == 0:
        return np.empty(0, dtype=np.int64)
    random = Random(seed)
    # As many draws as find so many on average, and some more.
    draws = int(-d * p * math.log1p(-count / (d * p)) + 6 * math.sqrt(count)) + 16
    while True:
        # Row and column apart: 32 bits choose one of so few almost evenly.
        rows, columns = (
            random.stream(f"sparse/{name}", [layer], draw=draw).integers(size, draws)[0].numpy()
            for name, size in (("row", d), ("column", p))
        )
        found, first = np.unique(rows * p + columns, return_index=True)
        if len(found) >= count:
            return found[np.argsort(first)[:count]]
        draws *= 2
