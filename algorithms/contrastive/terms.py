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
    scale, w = weights.scale / len(rows.z), weights.columns
    met, columns, recalled = torch.zeros_like(rows.z), None, dict[int, Tensor]()
    if w is not None:
        met += w @ rows.columns.z
        columns = (anchors.T @ w).T.contiguous()  # w is read along its rows
    if not isinstance(weights.attracts, float) or weights.attracts:
        attracts = torch.as_tensor(weights.attracts).to(rows.z).view(-1, 1)
        columns = torch.zeros_like(rows.columns.z) if columns is None else columns
        met -= attracts * rows.columns.z[rows.positives]
        columns[rows.positives] -= attracts * anchors  # each row has a positive of its own
    for others in weights.others:
        met += others.weights @ others.z
        if others.recalled is not None:
            recalled[others.recalled] = scale * (others.weights.T @ anchors)
    # The sum over r and k of w_rk <z_r, z_k> is that over r of <z_r, what r met>.
    loss = scale * (rows.z * met).double().sum().cpu()
    met = met if shares is None else shares[:, None] * met
    return Terms(loss, met * scale, None if columns is None else columns * scale, recalled)


def figures_of(rows: Sequence[Rows], weights: Sequence[Weights]) -> Metrics:
    """Return figures of the batch for the log, (local,) each.

    - ``positive_cosine``, ``negative_cosine``: means over rows, and over their negatives; 0 where
      there are none;
    - what the loss adds.
    """
    every = [
        {
            "positive_cosine": float(r.cosines.gather(1, r.positives[:, None]).mean()),
            "negative_cosine": float(
                torch.where(r.valid, r.cosines, 0.0).sum() / r.negatives.sum().clamp_min(1)
            ),
            **w.figures,
        }
        for r, w in zip(rows, weights, strict=True)
    ]
    names = every[0]
    return {n: torch.tensor([e[n] for e in every], dtype=torch.float64) for n in names}
