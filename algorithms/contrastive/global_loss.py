"""The loss that contrastive learning estimates, with all other examples as negatives: exactly.

arXiv:2404.10575, equation (1): the mean over rows r of log sum_k exp(beta <z_r, z_k>) less
beta <z_r, z_r+>, where k runs over the rows of all other examples (of a pair: their other sides)
and r+ is the other view of r's example. The positive is not in the sum.
"""

# Shapes: 2 views, N examples, k of them here, D elements of an embedding.

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["GlobalLoss"]

_BLOCK = 256
"""Examples whose scores with all others are held at once."""


@dataclass(frozen=True)
class GlobalLoss:
    """The loss of given embeddings and its gradient, in blocks of the Gram matrix.

    Nothing here is sent: who holds all embeddings computes the part of some anchors.

    Attributes:
        beta: inverse temperature.
        pairs: views are the two sides of a pair, and a side is contrasted with the other alone.
    """

    beta: float
    pairs: bool = False

    def num_negatives(self, examples: int) -> int:
        """Return m: how many rows one is contrasted with."""
        return (examples - 1) * (1 if self.pairs else 2)

    def collapsed(self, examples: int) -> float:
        """Return log m, the loss where all embeddings are equal."""
        return math.log(self.num_negatives(examples))

    def negatives(self, z_2ND: Tensor, own: range) -> Tensor:
        """Return what the negatives of both rows of each of some examples come to, (2, 2, k).

        Of view v, ``[v, 0]`` is log sum_k exp(beta <z_r, z_k>), and ``[v, 1]`` the highest score
        beta <z_r, z_k>.
        """
        found = z_2ND.new_empty(2, 2, len(own))
        for view, at, _, scores in self._blocks(z_2ND, own):
            here = slice(at.start - own.start, at.stop - own.start)
            found[view, 0, here], found[view, 1, here] = scores.logsumexp(1), scores.amax(1)
        return found

    def value(self, z_2ND: Tensor, log_sums_2N: Tensor) -> float:
        """Return the loss, given the log sums of all examples."""
        return float((log_sums_2N - self._positives(z_2ND)).mean())

    def first(self, z_2ND: Tensor, highest_2N: Tensor) -> float:
        """Return the share of rows that score higher with their positive than any negative."""
        return float((self._positives(z_2ND) > highest_2N).double().mean())

    def gradient(self, z_2ND: Tensor, log_sums_2N: Tensor, own: range) -> Tensor:
        """Return dL/dz of both rows of each of some examples, (2, k, D).

        A row counts as an anchor, by its softmax p_r over its negatives, and as a negative of
        theirs, by p_k(r); the scores of both are the same, so that no row needs another's block.
        """
        found = z_2ND.new_empty(2, len(own), z_2ND.shape[2])
        for view, at, negatives, scores in self._blocks(z_2ND, own):
            as_anchor = (scores - log_sums_2N[view, at.start : at.stop, None]).exp()
            others = log_sums_2N[1 - view] if self.pairs else log_sums_2N.flatten()
            as_negative = (scores - others).exp()
            positives = z_2ND[1 - view, at.start : at.stop]
            rows = (as_anchor + as_negative) @ negatives - 2 * positives
            found[view, at.start - own.start : at.stop - own.start] = rows
        return found * (self.beta / (2 * z_2ND.shape[1]))

    def pairwise_cosine(self, z_2ND: Tensor) -> float:
        """Return the mean <z_r, z_k> over all rows r and their negatives k."""
        n = z_2ND.shape[1]
        sums = z_2ND.sum(dim=1)
        if self.pairs:
            total = sums[0] @ sums[1] - (z_2ND[0] * z_2ND[1]).sum()
            return float(total) / (n * (n - 1))
        total = sums.sum(dim=0).square().sum() - z_2ND.sum(dim=0).square().sum()
        return float(total) / (2 * n * self.num_negatives(n))

    def _positives(self, z_2ND: Tensor) -> Tensor:
        """Return the scores of the positives, (N,)."""
        return self.beta * (z_2ND[0] * z_2ND[1]).sum(dim=1)

    def _blocks(self, z_2ND: Tensor, own: range) -> Iterator[tuple[int, range, Tensor, Tensor]]:
        """Yield (view, examples, candidates, scores): -inf where a candidate is no negative."""
        n = z_2ND.shape[1]
        for view in (0, 1):
            candidates = z_2ND[1 - view] if self.pairs else z_2ND.flatten(0, 1)
            for start in range(own.start, own.stop, _BLOCK):
                at = range(start, min(start + _BLOCK, own.stop))
                scores = self.beta * (z_2ND[view, at.start : at.stop] @ candidates.T)
                rows = torch.arange(len(at), device=scores.device)
                for columns in range(0, len(candidates), n):
                    scores[rows, columns + start + rows] = -torch.inf
                yield view, at, candidates, scores
