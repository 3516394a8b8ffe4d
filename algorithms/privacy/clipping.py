"""Bounds on the gradient of a single example.

``factors`` says what each example's gradient is multiplied by; the sum of the products moves by at
most ``sensitivity`` when one example comes or goes. Norms are over all trainable parameters; an
example whose gradient is not finite gets 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gossamer.algorithms.estimates import Clip

__all__ = ["AdaptiveClip", "AutoClip", "ClipKind", "FlatClip", "LayerClip", "make_clip"]

ClipKind = Literal["flat", "auto-s", "auto-v", "per-layer", "reparametrised", "global", "adaptive"]

_STABILITY = 1e-6
"""Added to norms, as in Opacus: dividing by a norm that was rounded down would exceed C."""
_ZERO = 1e-12
"""Shorter gradients count as zero where they would be normalised: their squares may underflow."""


@dataclass
class FlatClip:
    """min(1, C / norm), times ``scale`` (arXiv:1607.00133); or all or nothing (arXiv:2106.07830).

    Attributes:
        norm: C.
        scale: 1 / C is the reparametrised form of arXiv:2402.18752, of sensitivity 1.
        drops: whether an example beyond C counts as zero instead.
    """

    norm: float
    scale: float = 1.0
    drops: bool = False

    @property
    def sensitivity(self) -> float:
        """The most that one example adds to the sum."""
        return self.norm * self.scale

    def factors(self, squares: Tensor) -> Tensor:
        """Return (examples, 1)."""
        norms = _norms(squares)
        if self.drops:
            factors = (norms <= self.norm).to(norms.dtype)
        else:
            factors = (self.norm / (norms + _STABILITY)).clamp(max=1.0)
        return _finite(factors * self.scale, norms)


@dataclass
class AutoClip:
    """C / (norm + gamma): normalised instead of clipped (arXiv:2206.07136).

    Attributes:
        norm: C; it only rescales the learning rate.
        gamma: AUTO-S for gamma > 0, AUTO-V for 0.
    """

    norm: float
    gamma: float

    @property
    def sensitivity(self) -> float:
        """The most that one example adds to the sum."""
        return self.norm

    def factors(self, squares: Tensor) -> Tensor:
        """Return (examples, 1); a zero gradient stays zero."""
        norms = _norms(squares)
        return _finite(torch.where(norms > _ZERO, self.norm / (norms + self.gamma), 0.0), norms)


@dataclass
class LayerClip:
    """Each parameter tensor by itself, to C / sqrt(tensors) or to the norms given.

    Attributes:
        norms: C_l, one per tensor in the order of the layout.
    """

    norms: tuple[float, ...]

    @property
    def sensitivity(self) -> float:
        """The most that one example adds to the sum."""
        return math.sqrt(sum(norm * norm for norm in self.norms))

    def factors(self, squares: Tensor) -> Tensor:
        """Return (examples, tensors)."""
        bounds = torch.tensor(self.norms, dtype=squares.dtype, device=squares.device)
        factors = (bounds / (squares.clamp(min=0).sqrt() + _STABILITY)).clamp(max=1.0)
        return _finite(factors, _norms(squares))


@dataclass
class AdaptiveClip:
    """Flat clipping whose C follows a quantile of the norms (arXiv:1905.03871).

    Attributes:
        norm: C_t; moved by ``move``.
        quantile: share of examples that stay unclipped in the end.
        rate: of the geometric update.
        unclipped: sum over the examples seen since ``move`` of +1/2 (unclipped) or -1/2, private.
    """

    norm: float
    quantile: float = 0.5
    rate: float = 0.2
    unclipped: float = 0.0

    @property
    def sensitivity(self) -> float:
        """The most that one example adds to the sum, at this step."""
        return self.norm

    def factors(self, squares: Tensor) -> Tensor:
        """Return (examples, 1); counts who stays unclipped."""
        norms = _norms(squares)
        self.unclipped += float((norms <= self.norm).sum()) - 0.5 * len(norms)
        return FlatClip(self.norm).factors(squares)

    def move(self, noisy_sum: float, expected: float) -> None:
        """Move C by what the noisy sum of ``unclipped`` says about a batch of ``expected``."""
        share = min(1.0, max(0.0, noisy_sum / expected + 0.5))
        self.norm *= math.exp(-self.rate * (share - self.quantile))
        self.unclipped = 0.0


AnyClip = FlatClip | AutoClip | LayerClip | AdaptiveClip


def make_clip(kind: ClipKind, norm: float, gamma: float, tensors: int) -> AnyClip:
    """Return the rule called ``kind``.

    Args:
        kind: its name.
        norm: C.
        gamma: of AUTO-S.
        tensors: how many parameter tensors there are.
    """
    rules: dict[ClipKind, AnyClip] = {
        "flat": FlatClip(norm),
        "auto-s": AutoClip(norm, gamma),
        "auto-v": AutoClip(norm, 0.0),
        "per-layer": LayerClip((norm / math.sqrt(tensors),) * tensors),
        "reparametrised": FlatClip(norm, scale=1 / norm),
        "global": FlatClip(norm, drops=True),
        "adaptive": AdaptiveClip(norm),
    }
    return rules[kind]


def _norms(squares: Tensor) -> Tensor:
    return squares.clamp(min=0).sum(dim=1, keepdim=True).sqrt()


def _finite(factors: Tensor, norms: Tensor) -> Tensor:
    return torch.where(torch.isfinite(norms), factors, 0.0)


_: type[Clip] = FlatClip
