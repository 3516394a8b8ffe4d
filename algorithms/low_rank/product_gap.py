"""How far the mean of the ranks' products is from the product of their means."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gossamer.algorithms.low_rank.layer import SparseLowRankLinear
from gossamer.algorithms.low_rank.sltrain import layers_of
from gossamer.algorithms.problems import Figures
from gossamer.runtime.collectives import RankGroup
from gossamer.runtime.rows import RowLayout, Slice

__all__ = ["product_gap"]


def product_gap(model: nn.Module) -> Figures:
    """Return what computes ``product_gap`` at the ranks' rows.

    |mean_i(B_i A_i) - mean(B) mean(A)| / |mean(B) mean(A)|, norms of Frobenius over all layers
    whose A and B are both trained. The difference is the mean of (B_i - mean B)(A_i - mean A)
    exactly, so that it vanishes with the square of the distance from consensus. Where a layer
    trains its scale, B counts with it.
    """
    trained = [layer for _, layer in layers_of(model) if _is_trained(layer)]

    def figures(comm: RankGroup, layout: RowLayout, rows: Tensor, mean: Tensor) -> dict[str, float]:
        """Compute it of rows (local, d); every process calls it."""
        slices = zip(layout.slices, layout.parameters(model), strict=True)
        where = {id(parameter): s for s, parameter in slices}
        apart = whole = 0.0
        for layer in trained:
            b, a = (_of_all_ranks(comm, where[id(factor)], rows) for factor in (layer.B, layer.A))
            if layer.gain is not None:
                b = b * _of_all_ranks(comm, where[id(layer.gain)], rows).tanh()[..., None]
            b_mean, a_mean = b.mean(0), a.mean(0)
            gap = torch.einsum("nir,nrj->ij", b - b_mean, a - a_mean).div_(comm.n)
            apart += gap.square().sum().item()
            whole += (b_mean @ a_mean).square().sum().item()
        return {"product_gap": math.sqrt(apart / whole) if whole else 0.0} if trained else {}

    return figures


def _is_trained(layer: SparseLowRankLinear) -> bool:
    return layer.A is not None and layer.A.requires_grad


def _of_all_ranks(comm: RankGroup, where: Slice, rows: Tensor) -> Tensor:
    """Return a parameter of every rank, (n, *shape) float64."""
    columns = rows[:, where.begin : where.end].contiguous()
    return comm.all_gather(columns, count=False).double().view(-1, *where.shape)
