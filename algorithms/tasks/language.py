"""What language-model tasks share: windows of tokens, hidden tokens, and losses per token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.runtime.random import Random

__all__ = [
    "PaddedDocuments",
    "Windows",
    "count_masked_tokens",
    "count_next_tokens",
    "count_padded_tokens",
    "mask_tokens",
    "masked_token_loss",
    "next_token_loss",
    "padded_token_loss",
]

_IGNORED = -100
"""The target of a token that is not predicted: torch's own default."""


@dataclass(frozen=True)
class Windows:
    """Windows of ``context`` tokens and the token after them, which the next one starts with.

    Attributes:
        tokens: any integer dtype (tokens,).
        context: predictions per window; window k starts at token k * context.
    """

    tokens: Tensor
    context: int

    def __len__(self) -> int:
        return max(len(self.tokens) - 1, 0) // self.context

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, ...]:
        places = (indices * self.context)[:, None] + torch.arange(self.context + 1)
        return (self.tokens[places].long(),)


@dataclass(frozen=True)
class PaddedDocuments:
    """A document per example: its first tokens, and padding on the right.

    An example is its tokens, int64 (context,), and its labels: the same, but -100 for padding.

    Attributes:
        tokens: any integer dtype (tokens,), of all documents.
        offsets: int64 (documents + 1,): document k has tokens[offsets[k] : offsets[k + 1]].
        context: tokens of an example.
        pad: the token to fill up with.
    """

    tokens: Tensor
    offsets: Tensor
    context: int
    pad: int = 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, ...]:
        places = self.offsets[indices][:, None] + torch.arange(self.context)
        inside = places < self.offsets[indices + 1][:, None]
        found = self.tokens[places.clamp(max=len(self.tokens) - 1)].long()
        return found.where(inside, self.pad), found.where(inside, _IGNORED)


def next_token_loss(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Return the mean negative log likelihood of the tokens but the first, in nats.

    Args:
        module: tokens (B, T) -> logits (B, T, V).
        inputs: tokens (B, T + 1).
    """
    (tokens,) = inputs
    logits = _wide(module(tokens[..., :-1]))
    return F.cross_entropy(logits.flatten(0, -2), tokens[..., 1:].flatten())


def count_next_tokens(inputs: tuple[Tensor, ...]) -> float:
    """Return how many tokens ``next_token_loss`` predicts."""
    batch, length = inputs[0].shape
    return float(batch * (length - 1))


def padded_token_loss(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Return the mean negative log likelihood of the labels but each document's first, in nats.

    The module is not told what is padding: it stands on the right, where no token before it looks.

    Args:
        module: tokens (B, T) -> logits (B, T, V), causal.
        inputs: tokens (B, T), and labels (B, T): tokens, or -100 where nothing is predicted.

    Returns:
        (); zero where nothing is predicted at all.
    """
    tokens, labels = inputs
    logits, targets = _wide(module(tokens[..., :-1])), labels[..., 1:].flatten()
    total = F.cross_entropy(logits.flatten(0, -2), targets, ignore_index=_IGNORED, reduction="sum")
    return total / (targets != _IGNORED).sum().clamp(min=1)


def count_padded_tokens(inputs: tuple[Tensor, ...]) -> float:
    """Return how many tokens ``padded_token_loss`` predicts."""
    return float((inputs[1][..., 1:] != _IGNORED).sum())


def mask_tokens(
    blocks: Tensor, rate: float, mask: int, vocabulary: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Hide a share of each block's tokens, once for the whole run (BERT, arXiv:1810.04805, 3.1).

    Of the tokens to predict 80 % become the mask, 10 % a random token, and 10 % stay.

    Args:
        blocks: int64 (blocks, T).
        rate: share of T to predict, at least one token.
        mask: the mask's token.
        vocabulary: number of tokens.
        seed: of the choice.

    Returns:
        the blocks with tokens hidden, and the targets: the tokens to predict, -100 elsewhere.
    """
    count, length = blocks.shape
    chosen = max(1, round(rate * length))
    random = Random(seed)
    keys = random.stream("task/mask").uniform_(torch.empty(1, count * length))
    places = keys.view(count, length).argsort(dim=1, stable=True)[:, :chosen]
    fate = random.stream("task/mask-fate").uniform_(torch.empty(1, count * chosen))
    fate = fate.view(count, chosen)
    strangers = random.stream("task/mask-token").integers(vocabulary, count * chosen)
    tokens = blocks.gather(1, places)
    shown = torch.where(fate < 0.9, strangers.view(count, chosen), tokens)
    shown = torch.where(fate < 0.8, mask, shown)
    targets = torch.full_like(blocks, _IGNORED).scatter(1, places, tokens)
    return blocks.scatter(1, places, shown), targets


def masked_token_loss(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Return the mean negative log likelihood of the hidden tokens, in nats.

    Args:
        module: tokens (B, T) -> logits (B, T, V).
        inputs: tokens (B, T), and targets (B, T) as of ``mask_tokens``.
    """
    tokens, targets = inputs
    logits = module(tokens)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=_IGNORED)


def count_masked_tokens(inputs: tuple[Tensor, ...]) -> float:
    """Return how many tokens ``masked_token_loss`` predicts."""
    return float((inputs[1] != _IGNORED).sum())


def _wide(logits: Tensor) -> Tensor:
    """Return logits in float32 at least: 8 bits cannot tell a loss of 4.00 from one of 4.02."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
