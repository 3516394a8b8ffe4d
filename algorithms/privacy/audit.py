"""Auditing privacy in one run: canaries, guesses, and the epsilon they prove (arXiv:2305.08846).

Each of m canaries is in the training set by its own fair coin. Whoever sees the model guesses for
some of them which way the coin fell. Under (epsilon, delta)-DP hardly more than a share
e^epsilon / (1 + e^epsilon) of the guesses can be right; if more are, epsilon is larger than that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor, nn

from gossamer.algorithms.problems import Problem
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.random import Random

__all__ = ["Canaries", "count_right", "epsilon_lower_bound"]

_LARGEST = 64.0
"""No epsilon beyond it is looked for."""


def epsilon_lower_bound(
    right: int, guesses: int, canaries: int, delta: float, confidence: float = 0.95
) -> float:
    """Return the largest epsilon that the guesses refute; 0 where they refute none.

    A mechanism that is (epsilon, delta)-DP has a smaller one with probability 1 - ``confidence`` at
    most (arXiv:2305.08846, theorem 5.2 with its appendix D for delta).

    Args:
        right: guesses that were right.
        guesses: how many were made; the others are abstentions.
        canaries: m.
        delta: of the guarantee under test.
        confidence: in (0, 1).

    Example:
        >>> round(epsilon_lower_bound(right=95, guesses=100, canaries=1000, delta=0.0), 3)
        2.155
    """
    if not 0 <= right <= guesses <= canaries:
        raise ConfigError(f"guesses: {right} right of {guesses} about {canaries} canaries")
    low, high = 0.0, _LARGEST
    if _p_value(right, guesses, canaries, 0.0, delta) > 1 - confidence:
        return 0.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        refuted = _p_value(right, guesses, canaries, middle, delta) <= 1 - confidence
        low, high = (middle, high) if refuted else (low, middle)
    return low


def _p_value(right: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """Return the most likely so many right guesses can be under (epsilon, delta)-DP."""
    share = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(right - 1, guesses, share))
    # What delta may add: the best way to spend it moves the count by i with odds 1 / i.
    below = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, share))
    worst = float((below / np.arange(1, right + 1)).max(initial=0.0))
    return min(1.0, tail + 2 * canaries * delta * worst)


def count_right(scores: Tensor, included: Tensor, guesses: int) -> int:
    """Return how many are right of: the upper half of ``guesses`` is in, the lower half out.

    Args:
        scores: (m,), larger for a canary that was more likely in.
        included: bool (m,), how the coins fell.
        guesses: how many to make, about the extreme scores; at most m.
    """
    order = torch.argsort(scores)
    half = guesses // 2
    outside, inside = order[:half], order[len(order) - (guesses - half) :]
    return int((~included[outside]).sum() + included[inside].sum())


@dataclass(frozen=True)
class Canaries:
    """Examples of a linear model whose gradients are orthogonal, and beyond any clip norm.

    Canary k pulls weight k and no other; every other example, and a canary that is out, has the
    gradient 0, which adds to a clipped sum what a missing example adds: nothing. So the audited run
    has the examples, the shards, the rates, and the accounting of the run it stands for.

    Attributes:
        problem: to train on.
        included: bool (m,), secret of the audit.
    """

    problem: Problem
    included: Tensor

    @classmethod
    def hidden_in(cls, shards: tuple[np.ndarray, ...], count: int, seed: int) -> Canaries:
        """Put ``count`` canaries at random places of a training set with these shards.

        Raises:
            ConfigError: fewer examples than canaries.
        """
        total = sum(map(len, shards))
        if not 2 <= count <= total:
            raise ConfigError(
                f"canaries: {count} must be between 2 and the {total} examples of the run"
            )
        random = Random(seed)
        order = random.stream("audit places").permutation(total)[0]
        places = torch.from_numpy(np.concatenate(shards))[order[:count]]
        included = random.stream("audit coins").integers(2, count)[0].bool()
        owner = torch.full((int(max(map(np.max, shards))) + 1,), -1)
        owner[places[included]] = torch.arange(count)[included]
        module = nn.Linear(count, 1, bias=False)
        nn.init.zeros_(module.weight)
        return cls(Problem(module, _OneHot(owner, count), shards, _pull), included)

    def scores(self, weights: Tensor) -> Tensor:
        """Return how far each canary's weight was pulled, (m,), of the model's row (d,)."""
        return weights[: len(self.included)].double().cpu()


@dataclass(frozen=True)
class _OneHot:
    """Attributes: owner, int64 (examples,), an example's canary or -1; width, how many there are.

    Rows are made when they are looked up: all of them would be a square of the canaries.
    """

    owner: Tensor
    width: int

    def __len__(self) -> int:
        return len(self.owner)

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, ...]:
        owner = self.owner[indices]
        rows = torch.zeros(len(owner), self.width)
        mine = owner >= 0
        rows[mine.nonzero()[:, 0], owner[mine]] = _PULL
        return (rows,)


_PULL = 1e3
"""Norm of a canary's gradient: clipped to C by every rule that clips."""


def _pull(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    pulled: Tensor = module(inputs[0])
    return -pulled.mean()
