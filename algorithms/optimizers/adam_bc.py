"""DP-AdamBC (arXiv:2312.14334): Adam whose second moment is rid of the known noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from gossamer.algorithms.estimates import PLAIN, Origin
from gossamer.algorithms.optimizers.decay import Decaying
from gossamer.runtime.communicator import Communicator
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.rows import combine

__all__ = ["AdamBC", "AdamBCState"]


_LEAST = 1e-16
"""Of gradients known to have no noise: the square of Adam's eps."""


@dataclass
class AdamBCState:
    """The moments of the gradients since ``init``.

    Attributes:
        m: (local, d), moving average of gradients since the last restart.
        v: (local, d), moving average of their squares.
        noise: (local, 1) float64, moving average, as ``v``'s, of the variance of their noise.
        t: how many gradients went in.
    """

    m: Tensor
    v: Tensor
    noise: Tensor
    t: int = 0


class AdamBC(Decaying):
    """DP-AdamBC (arXiv:2312.14334): x -= lr * (m^ / sqrt(max(v^ - phi^, floor)) + decay * x).

    Noise of variance phi adds phi to the second moment of every parameter, and where it exceeds the
    gradient Adam's update shrinks to that of SGD. phi^ is the mean of the gradients' noise
    variances with the weights by which their squares stand in v^, so it holds where the variance
    changes from step to step: a filter's falls over its first steps, which v^ remembers. Known from
    the oracle; with gradients of which it is not, use adam.
    """

    name: Literal["adam-bc"] = "adam-bc"
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Share of the old first moment that stays."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Share of the old second moment that stays."""
    floor: float | None = Field(default=None, gt=0)
    """Least second moment after the subtraction (gamma' in the paper): the crucial knob, too small
    and single parameters jump. None: 3 phi^ sqrt(2 (1 - beta2) / (1 + beta2)), three standard
    deviations of v^ under noise alone."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decay of the parameters, times the learning rate; the moments do not see it."""

    def init(self, x: Tensor) -> AdamBCState:
        """Start with no gradient seen."""
        noise = torch.zeros(len(x), 1, dtype=torch.float64)
        return AdamBCState(m=torch.zeros_like(x), v=torch.zeros_like(x), noise=noise)

    def require_parts(self, origin: Origin = PLAIN) -> None:
        """Refuse those whose noise is not known, as it is of what dp releases.

        Raises:
            ConfigError: it is not.
        """
        if origin.noise_var is not None:
            return
        raise ConfigError(
            "optimizer.name: adam-bc subtracts the known variance of the gradients' noise, and "
            "gradients in parts (of random directions, or layer by layer) come without; put dp "
            "into oracle: backprop and leave algorithm.per_layer out, or use adam"
        )

    def rule(
        self, state: AdamBCState, x: Tensor, grad: Tensor, comm: Communicator, origin: Origin
    ) -> Tensor:
        """Move the moments and return their corrected ratio, plus the decay.

        Raises:
            ConfigError: the gradient comes without the variance of its noise.
        """
        if origin.noise_var is None:
            raise ConfigError(
                "optimizer.name: adam-bc subtracts the known variance of the gradients' noise, and "
                "that of these is not known; put dp into the oracle, choose an algorithm whose "
                "optimizer gets the oracle's own gradients (all-reduce, dsgd), or use adam"
            )
        if origin.restart:
            state.m.zero_()  # v and t stay, and m^ grows to its size: why, see Adam
        state.t += 1
        combine([(self.beta1, state.m), (1.0 - self.beta1, grad)], out=state.m)
        combine([(self.beta2, state.v), (1.0 - self.beta2, grad * grad)], out=state.v)
        state.noise.mul_(self.beta2).add_((1.0 - self.beta2) * origin.noise_var)
        ratio = self._ratio(state)
        return self.decayed(x, ratio, out=ratio)

    def _ratio(self, state: AdamBCState) -> Tensor:
        correction = 1.0 - self.beta2**state.t
        noise = state.noise / correction
        floor = torch.full_like(noise, self.floor or 0.0)
        if self.floor is None:
            spread = math.sqrt(2.0 * (1.0 - self.beta2) / (1.0 + self.beta2))
            floor = (3.0 * spread * noise).clamp_(min=_LEAST)
        least = (state.v / correction).sub_(noise.to(state.v)).clamp_(min=floor.to(state.v))
        return (state.m / (1.0 - self.beta1**state.t)).div_(least.sqrt_())
