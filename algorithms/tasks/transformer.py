"""A small decoder-only transformer: GPT-2's shape, pre-norm, learned positions."""

# Shapes: B batch, T tokens, D width, H heads, V vocabulary.

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["Transformer"]

_STD = 0.02
"""Standard deviation of GPT-2's initial weights."""


class Transformer(nn.Module):
    """Predicts each next token from those before it.

    Example:
        >>> import torch
        >>> model = Transformer(vocabulary=256, context=16, layers=2, width=32, heads=4, tied=True)
        >>> model(torch.zeros(3, 16, dtype=torch.int64)).shape
        torch.Size([3, 16, 256])
    """

    def __init__(
        self, *, vocabulary: int, context: int, layers: int, width: int, heads: int, tied: bool
    ) -> None:
        """Draw the weights from torch's global generator.

        Args:
            vocabulary: number of tokens V.
            context: longest input T.
            layers: blocks of attention and perceptron.
            width: D, a multiple of ``heads``.
            heads: attention heads H.
            tied: whether the output layer's weight is the embedding's.
        """
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, vocabulary, bias=False)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "norm" not in name:
                # Each block adds twice to the residual stream: keep its variance at any depth.
                residual = name.endswith("project.weight")
                nn.init.normal_(p, std=_STD * (2 * layers) ** -0.5 if residual else _STD)
        if tied:
            self.output.weight = self.tokens.weight

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return the logits (B, T, V) of the token after each of ``tokens_BT``, int64."""
        places = torch.arange(tokens_BT.shape[-1], device=tokens_BT.device)
        h_BTD = self.tokens(tokens_BT) + self.positions(places[None])
        logits: Tensor = self.output(self.norm(self.blocks(h_BTD)))
        return logits


class _Block(nn.Module):
    """h + attention(norm(h)), then h + perceptron(norm(h))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = _Perceptron(width)

    def forward(self, h_BTD: Tensor) -> Tensor:
        h_BTD = h_BTD + self.attention(self.attention_norm(h_BTD))
        result: Tensor = h_BTD + self.mlp(self.mlp_norm(h_BTD))
        return result


class _Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, h_BTD: Tensor) -> Tensor:
        shape = (*h_BTD.shape[:-1], 3, self.heads, h_BTD.shape[-1] // self.heads)
        query, key, value = self.qkv(h_BTD).view(shape).transpose(-4, -2).unbind(dim=-3)
        # torch 2.13 cannot batch its fused CPU kernel: vmap would go example by example.
        with sdpa_kernel(SDPBackend.MATH) if h_BTD.is_cpu else nullcontext():
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        result: Tensor = self.project(mixed.transpose(-3, -2).flatten(-2))
        return result


class _Perceptron(nn.Module):
    """Two layers with a GELU between, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 4 * width)
        self.project = nn.Linear(4 * width, width)

    def forward(self, h_BTD: Tensor) -> Tensor:
        result: Tensor = self.project(F.gelu(self.expand(h_BTD)))
        return result
