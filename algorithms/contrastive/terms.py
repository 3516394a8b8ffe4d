"""The surrogate of one rank's rows, differentiated in closed form: a few products of matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.algorithms.contrastive.losses import Rows, Weights
from gossamer.algorithms.estimates import Metrics

__all__ = ["Terms", "differentiated", "figures_of"]


@dataclass(frozen=True)
class Terms:
    """l_i and its gradients along embeddings.

    Attributes:
        loss: (), float64.
        rows: (2b, dim), along the rank's own rows as anchors.
        columns: (2B, dim), along all columns; None: none has any.
        recalled: number of a recall -> (k, dim), along its embeddings.
    """

    loss: Tensor
    rows: Tensor
    columns: Tensor | None
    recalled: dict[int, Tensor]


def differentiated(rows: Rows, weights: Weights, shares: Tensor | None = None) -> Terms:
    """Return l_i = (s / 2b) sum_r [sum_k w_rk <z_r, z_k> - a_r <z_r, z_r+>] and its gradients.

    In the gradients row r counts ``shares[r]`` times, (2b,); None: once.
    """
    anchors = rows.z if shares is None else shares[:, None] * rows.z
    scale = weights.scale / len(rows.z)
    loss = torch.zeros((), dtype=torch.float64)
    grad, columns, recalled = torch.zeros_like(rows.z), None, dict[int, Tensor]()
    if weights.columns is not None or not isinstance(weights.attracts, float) or weights.attracts:
        w = torch.zeros_like(rows.cosines) if weights.columns is None else weights.columns.clone()
        w[torch.arange(len(w)), rows.positives] -= weights.attracts
        loss += (w * rows.cosines).sum().double().cpu()
        grad += scale * (w @ rows.columns.z)
        columns = scale * (w.T @ anchors)
    for others in weights.others:
        loss += (others.weights * (rows.z @ others.z.T)).sum().double().cpu()
        grad += scale * (others.weights @ others.z)
        if others.recalled is not None:
            recalled[others.recalled] = scale * (others.weights.T @ anchors)
    if shares is not None:
        grad *= shares[:, None]
    return Terms(scale * loss, grad, columns, recalled)


def figures_of(rows: Sequence[Rows], weights: Sequence[Weights]) -> Metrics:
    """Return figures of the batch for the log, (local,) each.

    - ``positive_cosine``, ``negative_cosine``: means over rows, and over their negatives; 0 where
      there are none;
    - what the loss adds.
    """
    every = [
        {
            "positive_cosine": float(r.cosines.gather(1, r.positives[:, None]).mean()),
            "negative_cosine": float(r.cosines[r.valid].sum() / r.valid.sum().clamp_min(1)),
            **w.figures,
        }
        for r, w in zip(rows, weights, strict=True)
    ]
    names = every[0]
    return {n: torch.tensor([e[n] for e in every], dtype=torch.float64) for n in names}
