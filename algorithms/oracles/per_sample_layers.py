"""What a layer's input and output gradient say about the gradients of its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.algorithms.low_rank.layer import SparseLowRankLinear
from gossamer.algorithms.oracles.per_sample_terms import Dense, Lookup, Outer, Term, lengths_of
from gossamer.runtime.native import (
    normal_sums,
    position_sums,
    sampled_product,
    takes_positions,
)

__all__ = ["Terms", "terms_of"]

Terms = Callable[[nn.Module, Tensor, Tensor], dict[str, Term]]
"""(layer, input, gradient of the output) -> a term for each of the layer's own parameters."""


def terms_of(layer: nn.Module) -> Terms | None:
    """Return how to find the terms of a layer; None where only autograd knows."""
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):  # transformers': (in, out)
        return _transposed_linear
    if hasattr(layer, "variance_epsilon"):  # transformers' RMSNorm, of LLaMA and many others
        return _rms_norm_of_transformers
    if type(layer) is nn.Embedding and (layer.max_norm or layer.scale_grad_by_freq or layer.sparse):
        return None
    if isinstance(layer, nn.Conv1d | nn.Conv2d) and (
        layer.padding_mode != "zeros" or isinstance(layer.padding, str) or layer.transposed
    ):
        return None
    if isinstance(layer, SparseLowRankLinear) and layer.gain is not None:
        return None
    return _LAYERS.get(type(layer))


def _linear(layer: nn.Module, a: Tensor, e: Tensor) -> dict[str, Term]:
    a, e = _positions(a), _positions(e)
    return {"weight": Outer(a, e), "bias": _added(e)}


def _transposed_linear(layer: nn.Module, a: Tensor, e: Tensor) -> dict[str, Term]:
    a, e = _positions(a), _positions(e)
    return {"weight": Outer(e, a), "bias": _added(e)}


def _sparse_low_rank(layer: nn.Module, a: Tensor, e: Tensor) -> dict[str, Term]:
    assert isinstance(layer, SparseLowRankLinear)
    a, e = _positions(a), _positions(e)
    terms: dict[str, Term] = {"bias": _added(e)}
    if layer.A is not None and layer.B is not None:
        terms["A"] = Outer(a, (e @ layer.B) * layer.scale)
        terms["B"] = Outer((a @ layer.A.t()) * layer.scale, e)
    if layer.v is not None:
        pairs = zip(e.contiguous(), a.contiguous(), strict=True)
        values = torch.stack([sampled_product(layer.support, *pair) for pair in pairs])
        mass = (lengths_of(a) * lengths_of(e)).sum(1)
        terms["v"] = _rounded(values, mass, e)
    return terms


def _embedding(layer: nn.Module, a: Tensor, e: Tensor) -> dict[str, Term]:
    assert isinstance(layer, nn.Embedding)
    tokens, e = a.flatten(1), e.reshape(len(a), -1, e.shape[-1])
    if layer.padding_idx is not None:
        e = e.masked_fill((tokens == layer.padding_idx)[..., None], 0)
    return {"weight": Lookup(tokens, e)}


def _convolution(layer: nn.Module, a: Tensor, e: Tensor) -> dict[str, Term]:
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    padding = layer.padding
    assert not isinstance(padding, str)
    bias = _added(e.flatten(2).mT)
    if isinstance(layer, nn.Conv1d):  # a picture of height 1
        a, kernel = a[:, :, None], (1, *layer.kernel_size)
        geometry = [(1, *layer.dilation), (0, *padding), (1, *layer.stride)]
    else:
        kernel = layer.kernel_size
        geometry = [layer.dilation, padding, layer.stride]
    patches = F.unfold(a, kernel, *geometry)  # (m, channels * kernel, positions)
    e = e.flatten(2)
    if layer.groups == 1:
        return {"weight": Outer(patches.mT, e.mT), "bias": bias}
    g = layer.groups
    patches, e = patches.unflatten(1, (g, -1)), e.unflatten(1, (g, -1))
    return {"weight": Dense(torch.einsum("mgot,mgit->mgoi", e, patches)), "bias": bias}


def _layer_norm(layer: nn.Module, a: Tensor, e: Tensor) -> dict[str, Term]:
    assert isinstance(layer, nn.LayerNorm)
    return _norm(a, e, layer.normalized_shape, layer.eps, centred=True)


def _rms_norm(layer: nn.Module, a: Tensor, e: Tensor) -> dict[str, Term]:
    assert isinstance(layer, nn.RMSNorm)
    eps = torch.finfo(a.dtype).eps if layer.eps is None else layer.eps
    return _norm(a, e, layer.normalized_shape, eps, centred=False)


def _rms_norm_of_transformers(layer: nn.Module, a: Tensor, e: Tensor) -> dict[str, Term]:
    eps: Any = layer.variance_epsilon
    return _norm(a, e, a.shape[-1:], eps, centred=False)


def _norm(
    a: Tensor, e: Tensor, shape: tuple[int, ...], eps: float, *, centred: bool
) -> dict[str, Term]:
    """Return the terms of a scale and a shift behind (a - mean) / deviation over ``shape``."""
    size = torch.Size(shape).numel()
    a, e = a.reshape(len(a), -1, size), e.reshape(len(e), -1, size)
    if takes_positions(a, e):
        scale, shift = normal_sums(a, e, eps=eps, centred=centred)
        return {"weight": _rounded(*scale, e), "bias": _rounded(*shift, e)}
    normal = F.layer_norm(a, (size,), eps=eps) if centred else F.rms_norm(a, (size,), eps=eps)
    return {"weight": _added(e * normal), "bias": _added(e)}


def _group_norm(layer: nn.Module, a: Tensor, e: Tensor) -> dict[str, Term]:
    assert isinstance(layer, nn.GroupNorm)
    normal = F.group_norm(a, layer.num_groups, eps=layer.eps).reshape(*a.shape[:2], -1)
    e = e.reshape(*e.shape[:2], -1)
    return {"weight": _added((e * normal).mT), "bias": _added(e.mT)}


def _added(values: Tensor) -> Dense:
    """Return the sums over positions of (m, t, p), and what their rounding may add."""
    if takes_positions(values):
        return _rounded(*position_sums(values), values)
    return _rounded(values.sum(1), lengths_of(values).sum(1), values)


def _rounded(sums: Tensor, mass: Tensor, values: Tensor) -> Dense:
    """Return sums over the positions of ``values``, and what rounding may add by their mass."""
    return Dense(sums, mass * (values.shape[1] * torch.finfo(values.dtype).eps))


def _positions(values: Tensor) -> Tensor:
    """Return (m, ..., p) as (m, t, p)."""
    return values.reshape(len(values), -1, values.shape[-1])


_LAYERS: dict[type[nn.Module], Terms] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GroupNorm: _group_norm,
    SparseLowRankLinear: _sparse_low_rank,
}
