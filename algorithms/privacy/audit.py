"""What a mechanism reveals at least: a lower bound on epsilon from one run (arXiv:2305.08846).

Each of m canaries is in the data or not, by a fair coin that the mechanism does not know. From what
was released each gets a score; the highest are guessed to be in, the lowest to be out. Under
(epsilon, delta)-DP so many right guesses as there were may be too unlikely to believe in it.

A bound below the reported epsilon proves nothing; one above it proves that the report is wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor, nn

from gossamer.algorithms.problems import Problem
from gossamer.algorithms.tasks.arrays import TensorDataset

__all__ = ["Guesses", "canaries", "epsilon_at_least", "guess", "probability"]

_HALVINGS = 40


@dataclass(frozen=True)
class Guesses:
    """How an attack on canaries went.

    Attributes:
        canaries: m, in or out by fair coins.
        made: about how many of them a guess was made; the choice may depend on the scores.
        right: of those made.
    """

    canaries: int
    made: int
    right: int


def guess(scores: Tensor, included: Tensor, made: int) -> Guesses:
    """Guess the ``made // 2`` canaries of highest score to be in, as many of the lowest to be out.

    Args:
        scores: (m,), large for those in.
        included: (m,) bool, the coins.
        made: at most m, chosen before the scores are looked at.
    """
    half = made // 2
    order = scores.argsort(descending=True)
    right = included[order[:half]].sum() + (~included[order[len(order) - half :]]).sum()
    return Guesses(canaries=len(scores), made=2 * half, right=int(right))


def probability(guesses: Guesses, epsilon: float, delta: float) -> float:
    """Return the most that so many right guesses can be likely under (epsilon, delta)-DP.

    arXiv:2305.08846, Theorem 5.2: P[right >= v] <= f(v) + 2 m delta max_i (f(v - i) - f(v)) / i,
    f(v) = P[Binomial(made, e^epsilon / (1 + e^epsilon)) >= v].
    """
    made, right = guesses.made, guesses.right
    likely = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(right - 1, made, likely))
    i = np.arange(1, right + 1)
    between = np.cumsum(binom.pmf(right - i, made, likely))
    worst = float((between / i).max()) if right else 0.0
    return min(1.0, tail + 2 * guesses.canaries * delta * worst)


def epsilon_at_least(guesses: Guesses, delta: float, confidence: float = 0.95) -> float:
    """Return what epsilon is at least, at this delta: wrong with probability 1 - confidence.

    0 where the guesses could be those of a mechanism that reveals nothing.
    """
    believed = 1 - confidence
    low, high = 0.0, 1.0
    if probability(guesses, low, delta) >= believed:
        return 0.0
    while probability(guesses, high, delta) < believed:
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if probability(guesses, middle, delta) < believed:
            low = middle
        else:
            high = middle
    return low


def canaries(included: Tensor, n: int, clip_norm: float) -> Problem:
    """Return a problem of canaries alone, each with a coordinate of its own as its gradient.

    The strongest there are against a clipped sum: a gradient as long as the bound allows, that no
    other example disturbs, at every step. The score of canary k is how far parameter k went down.

    Args:
        included: (m,) bool: whether a canary is an example.
        n: ranks to deal the examples to.
        clip_norm: C, the length of each gradient.
    """
    rows = torch.eye(len(included))[included] * clip_norm
    module = nn.Linear(len(included), 1, bias=False)
    nn.init.zeros_(module.weight)
    shards = tuple(np.array_split(np.arange(len(rows)), n))

    def loss(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        outputs: Tensor = model(inputs[0])
        return outputs.mean()

    return Problem(module, TensorDataset((rows,)), shards, loss)
