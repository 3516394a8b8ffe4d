"""What language-model tasks share: windows of a token sequence, and the loss per token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Windows", "count_next_tokens", "next_token_loss"]


@dataclass(frozen=True)
class Windows:
    """Windows of ``context`` tokens and the token after them, which the next one starts with.

    Attributes:
        tokens: any integer dtype (tokens,).
        context: predictions per window.
        windows: int64, which windows the dataset has; window k starts at token k * context.
    """

    tokens: Tensor
    context: int
    windows: Tensor

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, ...]:
        starts = self.windows[indices] * self.context
        return (self.tokens[starts[:, None] + torch.arange(self.context + 1)].long(),)


def next_token_loss(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Return the mean negative log likelihood of the tokens but the first, in nats.

    Args:
        module: tokens (B, T) -> logits (B, T, V).
        inputs: tokens (B, T + 1).
    """
    (tokens,) = inputs
    logits = module(tokens[..., :-1])
    return F.cross_entropy(logits.flatten(0, -2), tokens[..., 1:].flatten())


def count_next_tokens(inputs: tuple[Tensor, ...]) -> float:
    """Return how many tokens ``next_token_loss`` predicts."""
    batch, length = inputs[0].shape
    return float(batch * (length - 1))
