"""``simclr`` and ``dcl``: the negatives are those of the batch, each weighed by its softmax."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gossamer.algorithms.contrastive.losses import ContrastiveLoss, Rows, Visit, Weights

__all__ = ["DCL", "SimCLR"]


class SimCLR(ContrastiveLoss):
    """Cross-entropy over the other 2B - 1 columns, the positive's among them (arXiv:2002.05709)."""

    name: Literal["simclr"] = "simclr"

    def weigh(self, visit: Visit) -> list[Weights]:
        """Return softmax over negatives and positive."""
        weights = []
        for rows in visit.rows:
            columns = rows.valid.clone()
            columns[torch.arange(len(columns)), rows.positives] = True
            weights.append(Weights(_softmax(self.beta, rows, columns), self.beta))
        return weights


class DCL(ContrastiveLoss):
    """Softmax over the batch's negatives alone (arXiv:2110.06848): SimCLR but for the positive.

    Its bias against (1) is that of too few negatives, no more.
    """

    name: Literal["dcl"] = "dcl"

    def weigh(self, visit: Visit) -> list[Weights]:
        """Return softmax over negatives."""
        return [Weights(_softmax(self.beta, r, r.valid), self.beta) for r in visit.rows]


def _softmax(beta: float, rows: Rows, columns: Tensor) -> Tensor:
    scores = torch.where(columns, beta * rows.cosines, -torch.inf)
    return torch.softmax(scores, dim=1).nan_to_num_(nan=0.0)  # a row without a column: no weight
