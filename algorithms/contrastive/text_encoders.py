"""Encoders of captions, and the module that holds both sides of a pair."""

# Shapes: B captions, T tokens (-1 where there is none), W width of a representation.

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from gossamer.algorithms.contrastive.encoders import Projected, divisor_of_hidden
from gossamer.algorithms.tasks.hub import load_package
from gossamer.runtime.component import Component, named

__all__ = ["Bag", "PairModule", "TextEncoder", "TextField", "Transformer"]

Count = Annotated[int, Field(ge=1, strict=True)]


class TextEncoder(Component, ABC):
    """An encoder of captions, with fresh weights."""

    @abstractmethod
    def build(self, vocabulary: int, context: int, dim: int) -> Projected:
        """Return the module for tokens (B, context), drawn from torch's generator.

        Args:
            vocabulary: number of tokens.
            context: length of the longest caption.
            dim: elements of an embedding, as many as of an image's.

        Raises:
            ConfigError: a package is missing.
        """


class Bag(TextEncoder):
    """The mean of the tokens' vectors, in no order; for small problems."""

    name: Literal["bag"] = "bag"
    width: Count = 128
    """Of a token's vector."""

    def build(self, vocabulary: int, context: int, dim: int) -> Projected:
        """Return it; every length fits."""
        return Projected(_Mean(vocabulary, self.width), nn.Linear(self.width, dim))


class Transformer(TextEncoder):
    """A BERT without dropout; the representation is the mean of its last layer over the tokens."""

    name: Literal["transformer"] = "transformer"
    hidden: Count = 512
    """Width of the tokens, a multiple of `heads`."""
    layers: Count = 12
    """Blocks of attention and perceptron, the latter four times as wide inside."""
    heads: Count = 8
    """Attention heads."""

    @field_validator("heads")
    @classmethod
    def _heads_divide_hidden(cls, heads: int, info: ValidationInfo) -> int:
        return divisor_of_hidden(heads, info)

    def build(self, vocabulary: int, context: int, dim: int) -> Projected:
        """Return it."""
        transformers = load_package("transformers")
        config = transformers.BertConfig(
            vocab_size=vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.hidden,
            max_position_embeddings=context,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=None,  # a mask says what is none
        )
        model = transformers.BertModel(config, add_pooling_layer=False)
        return Projected(_Contextual(model), nn.Linear(self.hidden, dim))


class PairModule(nn.Module):
    """An encoder for each side of a pair: of its image, and of its caption."""

    def __init__(self, image: Projected, text: Projected) -> None:
        super().__init__()
        self.image, self.text = image, text

    def side(self, view: int) -> Projected:
        """Return the encoder of the images (0) or of the captions (1)."""
        return self.text if view else self.image


class _Mean(nn.Module):
    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Embedding(vocabulary, width)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return _mean(self.vectors(tokens_BT.clamp_min(0)), tokens_BT >= 0)


class _Contextual(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, tokens_BT: Tensor) -> Tensor:
        known_BT = tokens_BT >= 0
        found = self.model(input_ids=tokens_BT.clamp_min(0), attention_mask=known_BT.long())
        return _mean(found.last_hidden_state, known_BT)


def _mean(vectors_BTW: Tensor, known_BT: Tensor) -> Tensor:
    """Return the mean over the known tokens, (B, W); zero where there is none."""
    kept = torch.where(known_BT[..., None], vectors_BTW, 0.0)
    return kept.sum(dim=1) / known_BT.sum(dim=1, keepdim=True).clamp_min(1)


_TEXT_ENCODERS: dict[str, type[TextEncoder]] = {"bag": Bag, "transformer": Transformer}

TextField = Annotated[
    Bag | Transformer,
    named(_TEXT_ENCODERS, "task.text"),
]
"""An encoder of captions: its name, or a section with a name and fields."""
