"""What classifiers minimise, and how they are scored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ClassificationLoss", "count_right"]


@dataclass(frozen=True)
class ClassificationLoss:
    """The mean loss over the examples, plus penalties on all parameters.

    One output per example means the logistic loss log(1 + exp(-b a)), a the output and b = +-1 the
    label; several mean the cross-entropy of the class.

    Attributes:
        l2: adds ``l2 * sum x^2``.
        nonconvex: adds ``nonconvex * sum x^2 / (1 + x^2)``.
    """

    l2: float = 0.0
    nonconvex: float = 0.0

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return the loss, ().

        Args:
            module: features (B, ...), one tensor or several -> outputs (B, C).
            inputs: the features, and last the labels (B,): int64 classes, or +-1 where C = 1.
        """
        *features, labels = inputs
        outputs = module(*features)
        if outputs.shape[-1] == 1:
            # logsigmoid keeps its accuracy at both ends; softplus turns linear beyond 20.
            loss = -F.logsigmoid(labels * outputs[..., 0]).mean()
        else:
            loss = F.cross_entropy(outputs, labels)
        for p in module.parameters():
            if self.l2:
                loss = loss + self.l2 * p.square().sum()
            if self.nonconvex:
                square = p.square()
                loss = loss + self.nonconvex * (square / (1 + square)).sum()
        return loss


def count_right(module: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Return ``{"accuracy": how many of the examples get the right class}``."""
    *features, labels = inputs
    outputs = module(*features)
    if outputs.shape[-1] == 1:
        right = labels * outputs[..., 0] > 0
    else:
        right = outputs.argmax(dim=-1) == labels
    return {"accuracy": right.sum(dtype=torch.float64)}
