"""Streaming least squares: the synthetic problem of the D-NASA code (arXiv:2402.08821)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from gossamer.algorithms.problems import Problem, Task, default_dtype
from gossamer.algorithms.tasks.arrays import TensorDataset
from gossamer.algorithms.tasks.models import seeded
from gossamer.runtime.random import Random

__all__ = ["LeastSquares", "LinearStream", "half_squared_error"]

_SPIKE = 100.0


@dataclass(frozen=True)
class LinearStream:
    """Examples (a, b) with b = a . beta + noise, fresh at every draw and on every rank.

    Attributes:
        beta: (d,), what is to be found.
        scale: (d,), standard deviations of the features.
        noise: standard deviation of the noise on b.
    """

    beta: Tensor
    scale: Tensor
    noise: float

    def draw(self, seed: int, rank: int, step: int, draw: int, count: int) -> tuple[Tensor, ...]:
        """Return a (count, d) and b (count,)."""
        d = len(self.beta)
        normals = torch.empty(1, count * (d + 1), dtype=self.beta.dtype)
        Random(seed).stream("task/stream", ids=[rank], step=step, draw=draw).normal_(normals)
        table = normals.view(count, d + 1)
        features = table[:, :d] * self.scale
        return features, features @ self.beta + self.noise * table[:, d]


def half_squared_error(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Return the mean of (module(a) - b)^2 / 2."""
    features, targets = inputs
    return 0.5 * F.mse_loss(module(features)[..., 0], targets)


class LeastSquares(Task):
    """Find beta from a stream of (a, b = a . beta + noise), a ~ N(0, I); loss (a . x - b)^2 / 2.

    No epoch and no shards: every rank draws fresh examples at every step.
    """

    name: str = "least-squares"
    features: int = Field(100, ge=1, strict=True)
    """Length d of beta and of a."""
    density: float = Field(0.3, gt=0, le=1)
    """Share of beta's elements that are not zero; those are standard normal."""
    noise: float = Field(0.1, ge=0)
    """Standard deviation of the noise on b; the code uses 0.1 to 0.2."""
    spike: bool = False
    """Scale the first feature by 100: the condition number becomes 10^4, and a step size that suits
    one coordinate no longer suits the rest."""
    test_examples: int = Field(1000, ge=1, strict=True)
    """Examples of the fixed test set, drawn like the others."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of examples and parameters."""

    def build(self, n: int, seed: int) -> Problem:
        """Draw beta and the test set; x0 = 0."""
        dtype = default_dtype(self.dtype)
        random = Random(seed)
        nonzero = max(1, round(self.density * self.features))
        beta = random.stream("task/beta").normal_(torch.empty(1, self.features, dtype=dtype))[0]
        places = random.stream("task/support").permutation(self.features)[0]
        beta[places[nonzero:]] = 0
        scale = torch.ones(self.features, dtype=dtype)
        if self.spike:
            scale[0] = _SPIKE
        stream = LinearStream(beta, scale, self.noise)
        with seeded(seed):
            module = nn.Linear(self.features, 1, bias=False, dtype=dtype)
        nn.init.zeros_(module.weight)
        # Rank n does not train: its examples are the test set.
        test = TensorDataset(stream.draw(seed, n, 0, 0, self.test_examples))
        return Problem(
            module=module,
            train=stream,
            shards=(),
            loss=half_squared_error,
            test=test,
        )
