"""What of a language model is trained: all of it, or a few parameters in or beside it.

A scheme changes a model of ``transformers`` in place and leaves `requires_grad` on what is trained:
this alone becomes a row. What is added beside a model is float32, whatever the rest is.
"""

# Shapes: B sequences, H heads, P virtual tokens, T tokens, D width of the embeddings or of a head.

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer.algorithms.low_rank.schemes import LowRank, ReLoRA, SLTrain, Sparse
from gossamer.algorithms.tasks.hub import load_package
from gossamer.algorithms.tasks.models import seeded
from gossamer.algorithms.tasks.scheme import Scheme
from gossamer.runtime.component import named
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.random import Random

__all__ = ["Full", "Head", "LoRA", "PrefixTuning", "PromptTuning", "Scheme", "SchemeField"]


class Full(Scheme):
    """Train every parameter."""

    name: Literal["full"] = "full"

    def apply(self, model: nn.Module, seed: int) -> nn.Module:
        """Return the model as it is."""
        return model


class Head(Scheme):
    """Train the last linear layer, from hidden vectors to logits.

    Where it shares the embedding's weight it gets a copy: embeddings stay.
    """

    name: Literal["head"] = "head"

    def apply(self, model: nn.Module, seed: int) -> nn.Module:
        """Freeze all but the layer."""
        model.requires_grad_(False)
        head = _of(model).get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ConfigError(
                "task.scheme: head needs a model whose last layer is linear; use full"
            )
        if head.weight is _of(model).get_input_embeddings().weight:
            head.weight = nn.Parameter(head.weight.detach().clone())
            _of(model).config.tie_word_embeddings = False
        head.requires_grad_(True)
        return model


class LoRA(Scheme):
    """Add (alpha / r) B A to weights of each layer (LoRA, arXiv:2106.09685), by the package peft.

    A is uniform by Kaiming's rule (a = sqrt 5) and B zero, so that the start is the model itself.
    """

    name: Literal["lora"] = "lora"
    r: int = Field(8, ge=1, strict=True)
    """Rank of B A."""
    alpha: float = Field(16.0, gt=0)
    """Times 1 / r: the scale of B A."""
    targets: tuple[str, ...] | None = None
    """Names, or their ends, of the layers; None: queries and values, by what peft knows of the
    model's type (GPT-2: `c_attn`, which makes keys too)."""

    def apply(self, model: nn.Module, seed: int) -> nn.Module:
        """Put the layers in."""
        peft = load_package("peft")
        transposed = load_package("transformers.pytorch_utils").Conv1D
        model.requires_grad_(False)
        try:
            config = peft.LoraConfig(
                r=self.r,
                lora_alpha=self.alpha,
                lora_dropout=0.0,
                target_modules=None if self.targets is None else list(self.targets),
                fan_in_fan_out=any(isinstance(m, transposed) for m in model.modules()),
            )
            with seeded(seed):
                peft.inject_adapter_in_model(config, model)
        except ValueError as error:
            raise ConfigError(
                f"task.scheme.targets: {error}; name linear layers of the model, such as q_proj"
            ) from error
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.float()
        return model


class PrefixTuning(Scheme):
    """Put keys and values of one's own before each layer's (arXiv:2101.00190), not reparametrised.

    Every token sees them, and the tokens' own positions stay. They start as what the layers make of
    `length` random tokens of the vocabulary (arXiv:2305.17333, Appendix E.5).
    """

    name: Literal["prefix"] = "prefix"
    length: int = Field(5, ge=1, strict=True)
    """Keys and values per layer and head."""

    @torch.no_grad()
    def apply(self, model: nn.Module, seed: int) -> nn.Module:
        """Give each attention a parameter `prefix` (2, H, P, D), float32: its keys, its values."""
        utils = load_package("transformers.modeling_utils")
        masks = load_package("transformers.masking_utils")
        if not _of(model)._can_set_attn_implementation():
            raise ConfigError(
                "task.scheme: prefix needs a model whose attention transformers can exchange, "
                f"{type(model).__name__}'s is not; use lora or prompt"
            )
        model.requires_grad_(False)
        utils.ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _attend_to_prefix)
        masks.ALL_MASK_ATTENTION_FUNCTIONS.register(_ATTENTION, _whole_mask)
        _of(model).set_attn_implementation(_ATTENTION)
        tokens = _random_tokens(model, self.length, seed)
        training = model.training
        # The attentions see no prefix yet, and take what they see.
        model.eval()(input_ids=tokens[None], attention_mask=torch.ones(1, self.length).long())
        model.train(training)
        return model


class PromptTuning(Scheme):
    """Put embeddings of one's own before the tokens' (arXiv:2104.08691), like real tokens.

    They start as the embeddings of `length` random tokens of the vocabulary.
    """

    name: Literal["prompt"] = "prompt"
    length: int = Field(10, ge=1, strict=True)
    """Virtual tokens."""

    @property
    def extra_tokens(self) -> int:
        """Virtual tokens take positions."""
        return self.length

    @torch.no_grad()
    def apply(self, model: nn.Module, seed: int) -> nn.Module:
        """Wrap the model."""
        model.requires_grad_(False)
        embed = _of(model).get_input_embeddings()
        return _Prompted(model, embed(_random_tokens(model, self.length, seed)).float())


_SCHEMES: dict[str, type[Scheme]] = {
    "full": Full,
    "lora": LoRA,
    "prefix": PrefixTuning,
    "prompt": PromptTuning,
    "head": Head,
    "sltrain": SLTrain,
    "low-rank": LowRank,
    "sparse": Sparse,
    "relora": ReLoRA,
}


SchemeField = Annotated[
    Full | LoRA | PrefixTuning | PromptTuning | Head | SLTrain | LowRank | Sparse | ReLoRA,
    named(_SCHEMES, "task.scheme"),
]
"""A scheme: its name, or a section with a name and fields."""


class _Prompted(nn.Module):
    """A language model that sees virtual tokens before the given ones."""

    def __init__(self, model: nn.Module, start: Tensor) -> None:
        super().__init__()
        self.model, self.prompt = model, nn.Parameter(start)
        self.config: Any = model.config

    def forward(self, *, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """Return the model's output, with logits (B, T, V) at the given tokens alone."""
        given = _of(self.model).get_input_embeddings()(input_ids)
        virtual = self.prompt.to(given).expand(len(given), -1, -1)
        seen = attention_mask.new_ones(virtual.shape[:2])
        output = self.model(
            inputs_embeds=torch.cat([virtual, given], dim=1),
            attention_mask=torch.cat([seen, attention_mask], dim=1),
        )
        output.logits = output.logits[:, virtual.shape[1] :]
        return output


_ATTENTION = "gossamer_prefix"


def _attend_to_prefix(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend to the module's prefix too; a module without one takes the keys and values as such.

    Args:
        module: the attention.
        query: (B, H, T, D).
        key: (B, H', T, D); H' may be less, for groups of heads.
        value: (B, H', T, D).
        attention_mask: bool, true where seen, or added to the logits; (B, 1, T, T).
        options: of ``transformers``' own function.
    """
    attend = load_package("transformers.integrations.sdpa_attention").sdpa_attention_forward
    if not hasattr(module, "prefix"):
        module.prefix = nn.Parameter(torch.stack([key[0], value[0]]).float())
    else:
        assert attention_mask is not None, "the mask function never skips"
        prefix = module.prefix
        assert isinstance(prefix, Tensor)
        before = prefix.to(key)[:, None].expand(-1, len(key), -1, -1, -1)
        key, value = (torch.cat(pair, dim=2) for pair in zip(before, (key, value), strict=True))
        seen = (
            attention_mask.new_ones
            if attention_mask.dtype == torch.bool
            else (attention_mask.new_zeros)
        )
        shape = (*attention_mask.shape[:-1], before.shape[-2])
        attention_mask = torch.cat([seen(shape), attention_mask], dim=-1)
    found: tuple[Tensor, Tensor | None] = attend(
        module, query, key, value, attention_mask, **options
    )
    return found


def _whole_mask(*arguments: Any, **options: Any) -> Tensor | None:
    """Return the mask that ``transformers`` makes for torch's attention, never left out."""
    make = load_package("transformers.masking_utils").sdpa_mask
    options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor | None = make(*arguments, **options)
    return mask


def _random_tokens(model: nn.Module, count: int, seed: int) -> Tensor:
    """Return int64 (count,), on the model's device."""
    (drawn,) = (
        Random(seed).stream("task/virtual-tokens").integers(_of(model).config.vocab_size, count)
    )
    found: Tensor = drawn.to(next(model.parameters()).device)
    return found


def _of(model: nn.Module) -> Any:
    """Return a model of ``transformers``, whose methods have no types."""
    return model
