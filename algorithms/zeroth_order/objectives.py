"""What a zeroth-order estimate descends on: the loss, a score, any function of the outputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gossamer.algorithms.problems import Loss, Problem
from gossamer.algorithms.registry import import_object
from gossamer.runtime.errors import ConfigError, nearest

__all__ = ["find_objective", "negative_f1"]


@torch.no_grad()
def find_objective(name: str, problem: Problem, field: str) -> Loss:
    """Return what is minimised.

    Args:
        name: ``loss``; one of the task's scores, which is maximised; ``f1``, of classes where the
            task has no score of that name; or ``package.module:function``, (module, inputs) -> a
            number to minimise.
        problem: the task's.
        field: begins a message.

    Raises:
        ConfigError: there is no such score or function.
    """
    if name == "loss":
        return problem.loss
    if ":" in name:
        return _as_tensor(import_object(name, field))
    inputs = _example(problem)
    scores = list(problem.score(problem.module, inputs)) if problem.score is not None else []
    if name == "f1" and name not in scores:
        try:
            negative_f1(problem.module, inputs)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"{field}: f1 is of classes, and the examples of this task have none; use "
                f"{' or '.join(['loss', *scores])}"
            ) from error
        return negative_f1
    if name not in scores:
        known = ["loss", "f1", *scores]
        raise ConfigError(
            f"{field}: the task has no score '{name}'{nearest(name, known)} "
            "(your own: 'package.module:function')"
        )
    score, weigh = problem.score, problem.weigh
    assert score is not None
    return lambda module, inputs: -score(module, inputs)[name] / weigh(inputs)


def negative_f1(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Return minus the mean over classes of their F1 on the examples, (), float64.

    F1 = 2 hits / (predicted + actual); a class that neither is predicted nor occurs is left out.

    Args:
        module: features (B, ...), one tensor or several -> outputs (B, C); C = 1: its sign.
        inputs: the features, and last the labels (B,): int64 classes, or +-1 where C = 1.
    """
    *features, labels = inputs
    outputs = module(*features)
    if outputs.shape[-1] == 1:
        labels, found, classes = (labels > 0).long(), (outputs[..., 0] > 0).long(), 2
    else:
        found, classes = outputs.argmax(dim=-1), outputs.shape[-1]
    hits = torch.bincount(labels[found == labels], minlength=classes).double()
    counts = torch.bincount(labels, minlength=classes) + torch.bincount(found, minlength=classes)
    return -(2 * hits[counts > 0] / counts[counts > 0]).mean()


def _example(problem: Problem) -> tuple[Tensor, ...]:
    """Return one example, on the module's device."""
    device = next(problem.module.parameters()).device
    return tuple(t.to(device) for t in problem.examples(1))


def _as_tensor(function: Callable[[nn.Module, tuple[Tensor, ...]], object]) -> Loss:
    def loss(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return torch.as_tensor(function(module, inputs), dtype=torch.float64)

    return loss
