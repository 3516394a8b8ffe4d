"""A task whose loss is measured in other units: built by ``task: {name: custom, build: ...}``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from gossamer.algorithms.problems import Loss, Problem, Task
from gossamer.algorithms.registry import find
from gossamer.runtime.component import validate

__all__ = ["scaled"]


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
