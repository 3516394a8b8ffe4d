"""LLaMA models of any shape with fresh weights, among them those of GaLore and SLTrain.

Shapes of arXiv:2403.03507 and arXiv:2406.02214: RMSNorm (eps 1e-6), SwiGLU, rotary positions
(base 10000), no biases, a head of its own, dense weights from N(0, 0.02^2).
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import nn

from gossamer.algorithms.tasks.hub import load_package
from gossamer.algorithms.tasks.models import seeded
from gossamer.runtime.component import Component

__all__ = ["LLAMA", "SLTRAIN", "Factors", "LlamaShape", "build_llama"]

Count = Annotated[int, Field(ge=1, strict=True)]


class LlamaShape(Component):
    """The sizes of a LLaMA model, its vocabulary aside."""

    hidden: Count
    """Width of the hidden vectors."""
    layers: Count
    """Blocks of attention and MLP."""
    heads: Count
    """Attention heads; `hidden` divides into so many of even width."""
    ffn: Count
    """Width inside the MLP."""

    @field_validator("heads")
    @classmethod
    def _heads_have_an_even_width(cls, heads: int, info: ValidationInfo) -> int:
        hidden = info.data.get("hidden", 2 * heads)
        if hidden % (2 * heads):
            raise ValueError(f"must divide hidden, {hidden}, into heads of even width")
        return heads

    def parameters(self, vocabulary: int) -> int:
        """Return how many parameters the model has: 2 V h + (2 L + 1) h + L (4 h^2 + 3 h f)."""
        h = self.hidden
        base = 2 * vocabulary * h + (2 * self.layers + 1) * h
        return base + self.layers * (4 * h * h + 3 * h * self.ffn)


LLAMA = {
    "llama-60m": LlamaShape(hidden=512, layers=8, heads=8, ffn=1376),
    "llama-130m": LlamaShape(hidden=768, layers=12, heads=12, ffn=2048),
    "llama-350m": LlamaShape(hidden=1024, layers=24, heads=16, ffn=2736),
    "llama-1b": LlamaShape(hidden=2048, layers=24, heads=32, ffn=5461),
    "llama-7b": LlamaShape(hidden=4096, layers=32, heads=32, ffn=11008),
}
"""By name; the papers give all a vocabulary of 32,000 tokens and a context of 256."""


class Factors(NamedTuple):
    """Of a scheme ``sltrain``."""

    rank: int
    alpha: float
    density: float


SLTRAIN = {
    "llama-60m": Factors(128, 32.0, 0.03),
    "llama-130m": Factors(256, 16.0, 0.03),
    "llama-350m": Factors(256, 16.0, 0.03),
    "llama-1b": Factors(512, 8.0, 0.03),
    "llama-7b": Factors(1024, 8.0, 0.05),
}
"""Those of arXiv:2406.02214, by model."""


def build_llama(
    shape: LlamaShape,
    *,
    vocabulary: int = 32000,
    context: int = 256,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> nn.Module:
    """Return a ``LlamaForCausalLM`` of the package transformers, in training mode.

    Args:
        shape: its sizes.
        vocabulary: number of tokens.
        context: length of its longest input.
        dtype: of the parameters; the rotary frequencies stay float32.
        device: ``cpu``, or ``meta`` for a model without storage, to count with.
        seed: of the weights.

    Raises:
        ConfigError: the package is not installed.
    """
    transformers = load_package("transformers")
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.ffn,
        max_position_embeddings=context,
        rms_norm_eps=1e-6,
        initializer_range=0.02,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        use_cache=False,  # of keys and values, for generation alone
        # A token that is no text must not lose its embedding to padding.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.device(device), seeded(seed):
        model: nn.Module = transformers.LlamaForCausalLM(config)
    for p in model.parameters():
        # Not model.to: frequencies of 8 bits would turn far tokens by the wrong angle.
        p.data = p.data.to(dtype)
    return model.train()
