"""How much public gradients weigh at a step, and when public training has done what it can."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.algorithms.problems import Batch, Dataset, Problem
from gossamer.algorithms.protocols import Oracle
from gossamer.runtime import Communicator

__all__ = ["Mix", "Patience", "mean_loss", "public_weight"]

Mix = Literal["switch", "dpmd", "sample", "only-public", "only-private"]

_CHUNK = 512
"""Examples of one forward pass, at most."""


def public_weight(mix: Mix, step: int, steps: int | None, public: int, private: int) -> float:
    """Return alpha_t: the gradient is alpha_t of the public one, the rest of the private one.

    The family of arXiv:2402.18752. ``dpmd`` is 1 - cos(pi t / 2K) (arXiv:2112.00193)
    with K = T, the steps of the run: it begins private and ends public. ``sample`` is the public
    share of the examples, so that the two means make the mean over all of them.

    Args:
        mix: any but ``switch``, whose weight is 1 before the switch and 0 from it on.
        step: t, from 0.
        steps: T; only ``dpmd`` needs it.
        public: number of public examples that train.
        private: number of private ones.
    """
    if mix == "dpmd":
        assert steps is not None, "refused at the start"
        return 1.0 - math.cos(math.pi * step / (2 * steps))
    if mix == "sample":
        return public / (public + private)
    assert mix != "switch", "decided in the run"
    return 1.0 if mix == "only-public" else 0.0


@dataclass
class Patience:
    """Losses seen so far.

    Attributes:
        last: the newest; NaN before the first.
        best: the lowest.
        stale: how many came after the lowest.
    """

    last: float = math.nan
    best: float = math.inf
    stale: int = 0

    def take(self, loss: float) -> None:
        """Count one more; a loss that is not a number is no improvement."""
        self.last = loss
        if loss < self.best:
            self.best, self.stale = loss, 0
        else:
            self.stale += 1


def mean_loss(
    comm: Communicator,
    problem: Problem,
    oracle: Oracle,
    x: Tensor,
    parts: Sequence[np.ndarray],
) -> float:
    """Return the mean loss over all ranks' parts, each at its rank's own row; no dropout.

    Every process calls it; two numbers travel, and are added in ascending rank.

    Args:
        comm: the ranks.
        problem: has the examples; they may be public ones only.
        oracle: after ``setup``; gives the losses.
        x: (local, d), the hosted ranks' parameters; kept.
        parts: per rank, int64 places of at least one example.
    """
    hosted = [parts[rank] for rank in comm.ranks]
    count = -(-max(map(len, parts)) // _CHUNK)
    sums = torch.zeros(comm.local, 2, dtype=torch.float64)
    with _evaluating(problem.module):
        for places in zip(*(np.array_split(part, count) for part in hosted), strict=True):
            train = cast(Dataset, problem.train)
            batches = [Batch(train[torch.from_numpy(chunk)]) for chunk in places]
            weights = torch.tensor([problem.weigh(b.inputs) for b in batches], dtype=torch.float64)
            sums[:, 0] += oracle.loss(x, batches).cpu() * weights
            sums[:, 1] += weights
    total = comm.all_reduce(sums.to(comm.device), "sum")[0]
    return float(total[0] / total[1])


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Switch dropout off, and back on."""
    modes = [(layer, layer.training) for layer in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode
