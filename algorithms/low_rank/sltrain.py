"""SLTrain (arXiv:2406.02214) on any model: put its layers in, take plain ones out again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.algorithms.low_rank.layer import RestartedLinear, SparseLowRankLinear
from gossamer.algorithms.low_rank.product import Plan
from gossamer.algorithms.low_rank.support import count_elements, draw_support, shape_only
from gossamer.runtime.errors import ConfigError

__all__ = [
    "ATTENTION_AND_MLP",
    "count_parameters",
    "layers_of",
    "replace_layers",
    "to_dense",
    "wrap",
]

ATTENTION_AND_MLP = ("attn", "attention", "mlp")
"""Parts of the names of a transformer's layers that SLTrain takes."""


def wrap(
    model: nn.Module,
    *,
    rank: int,
    alpha: float | None = None,
    density: float = 0.03,
    targets: Sequence[str] = ATTENTION_AND_MLP,
    seed: int = 0,
    support: int = 0,
    freeze_a: bool = False,
    train_scale: bool = False,
    plan: Plan | Literal["auto"] = "auto",
    who: str = "sltrain",
) -> nn.Module:
    """Replace linear layers by scale B A + S, freshly drawn: their weights are dropped.

    Layer k, in the order of ``named_modules()``, has the support and the start of (seed, k):
    the same on every rank and in every process.

    Args:
        model: changed in place; its layers are torch's Linear, or transformers' Conv1D.
        rank: r; 0 for S alone.
        alpha: the scale is alpha / r; None: 1.
        density: share of a matrix's elements that S has, int(density d p); 0 for B A alone, which
            then does not learn, as B is 0 in every layer: see the scheme ``low-rank``.
        targets: layers with one of these in their dotted names.
        seed: of supports and parameters.
        support: which of the seed's supports.
        freeze_a: do not train A: then the mean of B and v over ranks is that of the weights.
        train_scale: scale by tanh of a parameter instead.
        plan: how to compute; auto: by shape and device.
        who: asks, for messages: a section of a configuration, say.

    Returns:
        The model.

    Raises:
        ConfigError: a number is out of its range, no layer has such a name, or one is too large or
            would be without parameters.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.ModuleDict({"mlp": nn.Linear(8, 6), "head": nn.Linear(6, 2)})
        >>> wrap(model, rank=2, density=0.25)["mlp"]
        SparseLowRankLinear(in_features=8, out_features=6, rank=2, elements=12, scale=1, bias=True)
    """
    if rank < 0 or not 0 <= density <= 1 or (alpha is not None and alpha <= 0):
        raise ConfigError(
            f"{who}: needs rank >= 0, 0 <= density <= 1 and alpha > 0, got rank "
            f"{rank}, density {density}, alpha {alpha}"
        )
    if plan not in ("auto", "factored", "materialised"):
        raise ConfigError(f"{who}: unknown plan '{plan}'; use auto, factored or materialised")
    if freeze_a and train_scale:
        raise ConfigError(
            f"{who}: with freeze_a the mean of parameters is that of weights, which a trained "
            "scale of each rank's own is not; leave out train_scale, or freeze_a"
        )
    if not rank and (freeze_a or train_scale):
        raise ConfigError(f"{who}: freeze_a and train_scale have no effect at rank 0")
    if train_scale and alpha is not None:
        raise ConfigError(f"{who}: alpha has no effect where the scale is trained; leave one out")
    scale = 1.0 if alpha is None or rank == 0 else alpha / rank

    def make(weight: Tensor, bias: Tensor | None, layer: int) -> SparseLowRankLinear:
        d, p = weight.shape
        if not rank and not count_elements((d, p), density):
            raise ConfigError(
                f"{who}.density: {density} of a {d} x {p} layer is no element, and rank 0 leaves "
                "nothing to train there; use more of either"
            )
        if weight.is_meta:
            places = shape_only((d, p), density)
        else:
            places = draw_support((d, p), density, seed, layer, support).to(weight.device)
        made = SparseLowRankLinear(
            places,
            rank=rank,
            scale=scale,
            bias=bias is not None,
            train_scale=train_scale,
            plan=plan,
            like=weight,
        ).reset_(seed, layer)
        if made.A is not None:
            made.A.requires_grad_(not freeze_a)
        return made

    return replace_layers(model, targets, make, who)


def replace_layers(
    model: nn.Module,
    targets: Sequence[str],
    make: Callable[[Tensor, Tensor | None, int], SparseLowRankLinear],
    who: str,
) -> nn.Module:
    """Replace each target by ``make(weight (d, p), bias, number)``; return the model.

    Raises:
        ConfigError: no linear layer has one of ``targets`` in its name, one has 2^31 elements, or
            shares its weight.
    """
    targets = [targets] if isinstance(targets, str) else targets
    linear = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if name and _is_linear(module)
    ]
    found = [(name, module) for name, module in linear if any(t in name for t in targets)]
    if not found:
        some = [name for name, _ in linear]
        raise ConfigError(
            f"{who}.targets: no linear layer has {' or '.join(targets)} in its name; they are "
            f"called {', '.join(some[:4]) or 'nothing: there is none'}"
        )
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    weight: Any
    for name, module in found:
        weight = module.weight
        if weight.numel() >= 2**31:
            raise ConfigError(
                f"{who}.targets: '{name}' has {weight.numel()} elements, 2^31 or more"
            )
        if uses[id(weight)] > 1:
            raise ConfigError(
                f"{who}.targets: the weight of '{name}' is used elsewhere too, and would not be "
                "any more; choose other layers"
            )
    names = [name for name, _ in found]
    del linear, found, module, weight  # each is given back when its layer is replaced
    for layer, name in enumerate(names):
        old: Any = model.get_submodule(name)
        transposed = not isinstance(old, nn.Linear)
        weight = old.weight.detach().t() if transposed else old.weight.detach()
        made = make(weight, old.bias, layer).train(old.training)
        made.transposed = transposed
        _put(model, name, made)
        del old, weight
    return model


@torch.no_grad()
def to_dense(model: nn.Module) -> nn.Module:
    """Replace each such layer by a plain one with the same weight; return the model.

    A model of ``transformers`` is then one that ``save_pretrained`` writes and any other program
    loads.
    """
    for name, layer in list(layers_of(model)):
        weight = layer.dense_weight()
        plain: Any
        if layer.transposed:
            from transformers.pytorch_utils import Conv1D

            make: Any = Conv1D  # without types
            plain = make(layer.out_features, layer.in_features)
            weight = weight.t().contiguous()
        else:
            plain = nn.Linear(
                layer.in_features, layer.out_features, layer.bias is not None, device="meta"
            )
        plain.weight = nn.Parameter(weight)
        if layer.bias is not None:
            plain.bias = layer.bias
        _put(model, name, plain.train(layer.training))
    return model


def layers_of(model: nn.Module) -> Iterator[tuple[str, SparseLowRankLinear]]:
    """Yield the names and the layers that ``wrap`` put in."""
    for name, module in model.named_modules():
        if isinstance(module, SparseLowRankLinear):
            yield name, module


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Return how many parameters are ``low_rank`` (A, B), ``sparse`` (v), and ``base``, the rest.

    Those that are trained; ``frozen`` are the others, the frozen weights of ReLoRA among them.
    """
    counts = {"base": 0, "low_rank": 0, "sparse": 0, "frozen": 0}
    parts: dict[int, str] = {}
    for _, layer in layers_of(model):
        counts["frozen"] += layer.base.numel() if isinstance(layer, RestartedLinear) else 0
        parts |= {id(layer.A): "low_rank", id(layer.B): "low_rank", id(layer.v): "sparse"}
    for parameter in model.parameters():
        part = parts.get(id(parameter), "base") if parameter.requires_grad else "frozen"
        counts[part] += parameter.numel()
    return counts


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (
        type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    )


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
