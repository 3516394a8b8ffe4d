"""Adam (arXiv:1412.6980) and AdamW (arXiv:1711.05101)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from gossamer.algorithms.estimates import Origin
from gossamer.algorithms.optimizers.decay import Decaying
from gossamer.runtime.communicator import Communicator
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.rows import combine

__all__ = ["Adam", "AdamState", "AdamW", "adam_direction"]


@dataclass
class AdamState:
    """The moments of the gradients since ``init``.

    Attributes:
        m: (local, d), moving average of gradients.
        v: (local, d), moving average of their squares.
        t: how many gradients went in.
    """

    m: Tensor
    v: Tensor
    t: int = 0


class _Moments(Decaying):
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Share of the old first moment that stays."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Share of the old second moment that stays."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""

    def init(self, x: Tensor) -> AdamState:
        """Start with no gradient seen.

        Raises:
            ConfigError: rows of float16, in which squares of gradients underflow.
        """
        if x.dtype == torch.float16:
            raise ConfigError(
                f"optimizer.name: {self.name} keeps squares of gradients, which underflow in "
                "float16; use task.dtype bfloat16 or float32, or optimizer sgd"
            )
        return AdamState(m=torch.zeros_like(x), v=torch.zeros_like(x))

    def _ratio(self, state: AdamState, grad: Tensor, origin: Origin) -> Tensor:
        if origin.restart:
            # Not t, which v needs too, and no correction of m's new start: the update grows to its
            # size over 1 / (1 - beta1) steps, a warmup that keeps the first gradient of a noisier
            # source from being divided by the root of a v that has not seen its noise.
            state.m.zero_()
        combine([(self.beta1, state.m), (1.0 - self.beta1, grad)], out=state.m)
        combine([(self.beta2, state.v), (1.0 - self.beta2, grad * grad)], out=state.v)
        state.t += 1
        return adam_direction(state.m, state.v, self.beta1, self.beta2, self.eps, state.t)


class Adam(_Moments):
    """Adam (arXiv:1412.6980): x -= lr * m^ / (sqrt(v^) + eps).

    m and v are moving averages of g and g^2; m^ = m / (1 - beta1^t) and v^ = v / (1 - beta2^t) undo
    their start from zero. Equals ``torch.optim.Adam`` to rounding.
    """

    name: Literal["adam"] = "adam"

    def rule(
        self, state: AdamState, x: Tensor, grad: Tensor, comm: Communicator, origin: Origin
    ) -> Tensor:
        """Move the moments and return their ratio."""
        return self._ratio(state, self.decayed(x, grad), origin)


class AdamW(_Moments):
    """Adam with decoupled decay (arXiv:1711.05101): x -= lr * (m^ / (sqrt(v^) + eps) + decay * x).

    Equals ``torch.optim.AdamW`` to rounding.
    """

    name: Literal["adamw"] = "adamw"
    weight_decay: float = Field(default=0.01, ge=0)
    """Decay of the parameters, times the learning rate; the moments do not see it."""

    def rule(
        self, state: AdamState, x: Tensor, grad: Tensor, comm: Communicator, origin: Origin
    ) -> Tensor:
        """Move the moments and return their ratio plus the decay."""
        ratio = self._ratio(state, grad, origin)
        return self.decayed(x, ratio, out=ratio)


def adam_direction(m: Tensor, v: Tensor, beta1: float, beta2: float, eps: float, t: int) -> Tensor:
    """Return m^ / (sqrt(v^) + eps), bias-corrected for t gradients; m and v are kept."""
    denominator = (v / (1.0 - beta2**t)).sqrt_().add_(eps)
    return (m / (1.0 - beta1**t)).div_(denominator)
