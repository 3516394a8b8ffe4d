"""EMC^2's chain over a few negatives, where every law can be written down (float64)."""

# Shapes: m negatives.

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from gossamer.runtime.native import chain_moves

__all__ = [
    "distances_from_the_mode",
    "expected_shares",
    "in_batch_bias",
    "mean_log_mean_exps",
    "sampled_shares",
    "second_eigenvalue",
    "sogclr_bias",
    "transition",
]


def transition(p: Tensor) -> Tensor:
    """Return K (m, m) of uniform proposals: K_ij = min(1, p_j / p_i) / m off the diagonal."""
    m = len(p)
    moves = (p / p[:, None]).clamp(max=1.0) / m
    moves.fill_diagonal_(0.0)
    return moves + torch.diag(1.0 - moves.sum(dim=1))


def second_eigenvalue(p: Tensor) -> float:
    """Return the second largest eigenvalue of K; diag(sqrt p) K diag(1 / sqrt p) is symmetric."""
    root = p.sqrt()
    return float(torch.linalg.eigvalsh(root[:, None] * transition(p) / root)[-2])


def distances_from_the_mode(p: Tensor, steps: int) -> Tensor:
    """Return the total variation between p and K^t from its mode, t = 0..steps."""
    kernel = transition(p)
    law = torch.zeros_like(p)
    law[p.argmax()] = 1.0
    found = []
    for _ in range(steps + 1):
        found.append(0.5 * (law - p).abs().sum())
        law = law @ kernel
    return torch.stack(found)


def expected_shares(p: Tensor, start: int, burn_in: int, records: int) -> Tensor:
    """Return E w (m,): the mean of the chain's law over moves burn_in + 1 .. burn_in + records."""
    kernel = transition(p)
    law = torch.zeros_like(p)
    law[start] = 1.0
    law = law @ torch.linalg.matrix_power(kernel, burn_in)
    total = torch.zeros_like(p)
    for _ in range(records):
        law = law @ kernel
        total += law
    return total / records


def sampled_shares(
    scores: Tensor, start: int, burn_in: int, records: int, chains: int, seed: int
) -> Tensor:
    """Return w (2 * chains, m) of chains run by the kernel, each offered independent negatives.

    Args:
        scores: (m,), of the negatives.
        start: the state that a chain holds at first.
        burn_in: moves before the first that is recorded.
        records: moves that are; with ``burn_in`` an even number.
        chains: pairs of them.
        seed: of proposals and of U.
    """
    m, moves, rows = len(scores), burn_in + records, 2 * chains
    generator = torch.Generator().manual_seed(seed)
    offered = torch.randint(m, (rows, moves), generator=generator)
    exponentials = torch.empty(rows, moves).exponential_(generator=generator)
    values = scores.float()
    found = chain_moves(
        values[offered],
        exponentials,
        torch.arange(-chains, 0),  # nobody's columns are its own
        torch.arange(moves // 2),
        values[start].expand(rows).contiguous(),
        burn_in=torch.full((rows,), burn_in, dtype=torch.int32),
    )
    shares = torch.zeros(rows, m, dtype=torch.float64)
    shares.scatter_add_(1, offered, found.counts.double())
    shares[:, start] += found.held
    return shares / records


def in_batch_bias(scores: Tensor, values: Tensor, size: int) -> float:
    """Return the mean over all subsets of sum_k softmax_k f_k, less that over all negatives."""
    subsets = _subsets(len(scores), size)
    found = (scores[subsets].softmax(dim=1) * values[subsets]).sum(dim=1).mean()
    return float(found - scores.softmax(dim=0) @ values)


def sogclr_bias(scores: Tensor, values: Tensor, size: int) -> float:
    """Return the same with exp(score) / (u * size) for the softmax, u the mean over all."""
    subsets = _subsets(len(scores), size)
    weights = scores.exp() / scores.exp().mean() / size
    found = (weights[subsets] * values[subsets]).sum(dim=1).mean()
    return float(found - scores.softmax(dim=0) @ values)


def mean_log_mean_exps(scores: Tensor) -> Tensor:
    """Return the mean over all subsets of size b of log mean exp, b = 1..m."""
    m = len(scores)
    sums = [scores[_subsets(m, b)].logsumexp(dim=1).mean() for b in range(1, m + 1)]
    return torch.stack(sums) - torch.arange(1, m + 1, dtype=scores.dtype).log()


def _subsets(m: int, size: int) -> Tensor:
    """Return all subsets of 0..m-1 of one size, int64 (k, size)."""
    return torch.tensor(list(itertools.combinations(range(m), size)))
