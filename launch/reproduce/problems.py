"""Tasks of the experiments, built by ``task: {name: custom, build: ...}``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pydoc_data.topics import topics
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.algorithms.problems import Loss, Problem, Task
from gossamer.algorithms.registry import find
from gossamer.algorithms.tasks.arrays import TensorDataset
from gossamer.algorithms.tasks.models import mlp, seeded
from gossamer.algorithms.tasks.objectives import ClassificationLoss, count_right
from gossamer.runtime.component import validate
from gossamer.runtime.random import Random

__all__ = ["characters", "scaled"]


@dataclass(frozen=True)
class _Scaled:
    """The loss times a number."""

    loss: Loss
    scale: float

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return self.scale * self.loss(module, inputs)


def scaled(n: int, seed: int, *, task: Mapping[str, Any], scale: float) -> Problem:
    """Build the task of a section, its loss multiplied by ``scale``."""
    cls = find("task", str(task["name"]))
    problem = cast(Task, validate(cls, dict(task), "task.options.task")).build(n, seed)
    problem.loss = _Scaled(problem.loss, scale)
    return problem


class _OneHot(nn.Module):
    """Numbers (B, c) below ``classes`` as ones among zeros, (B, c * classes)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, numbers: Tensor) -> Tensor:
        return F.one_hot(numbers, self.classes).flatten(1).float()


@cache
def _codes(symbols: int) -> Tensor:
    """Return the text as numbers, int64, commonest symbols first."""
    text = "".join(topics[name] for name in sorted(topics))
    common = [symbol for symbol, _ in Counter(text).most_common(symbols)]
    number = {symbol: k for k, symbol in enumerate(common)}
    return torch.tensor([number.get(symbol, symbols) for symbol in text])


def characters(
    n: int,
    seed: int,
    *,
    windows: int = 200_000,
    context: int = 8,
    hidden: int = 64,
    symbols: int = 63,
) -> Problem:
    """Build the prediction of a character of Python's own documentation by those before it.

    One example is a window. Windows of the first nine tenths of the text train, all of the rest
    test; the list of symbols, which depends on the whole text, counts as public.

    Args:
        n: ranks.
        seed: of the choice of the windows, and of the model.
        windows: that train, at most as many as there are.
        context: characters before the predicted one.
        hidden: units of the one hidden layer.
        symbols: commonest characters that are told apart; all others are one more.
    """
    codes = _codes(symbols)
    cut = len(codes) * 9 // 10
    order = Random(seed).stream("task/windows").permutation(cut - context)[0][:windows]
    parts = [part.unfold(0, context + 1, 1) for part in (codes[:cut], codes[cut:])]
    train, test = (
        TensorDataset((part[:, :-1], part[:, -1])) for part in (parts[0][order], parts[1])
    )
    with seeded(seed):
        classes = symbols + 1
        module = nn.Sequential(_OneHot(classes), mlp(context * classes, [hidden], classes, "tanh"))
    return Problem(
        module=module,
        train=train,
        shards=tuple(np.array_split(np.arange(len(train)), n)),
        loss=ClassificationLoss(),
        test=test,
        score=count_right,
    )
