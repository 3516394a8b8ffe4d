"""y = x (scale B A + S)^T, without the matrix or its gradient being kept (arXiv:2406.02214).

Two plans compute the same. ``factored`` multiplies by A, then by B, and by S alone: on a CPU no
d x p matrix exists. ``materialised`` writes scale B A + S into scratch that all layers share, in
the forward and again in the backward pass, and there the gradient of the matrix after it, whose
products with A and B, and whose elements on the support, are what is wanted.
"""

# Shapes: N tokens, d outputs, p inputs, r rank, nnz elements of the support.

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from gossamer.runtime.native import (
    Support,
    add_sparse_product,
    add_sparse_product_back,
    sampled_product,
)

__all__ = ["Plan", "Shape", "choose_plan", "dense_weight", "sparse_low_rank"]

Plan = Literal["factored", "materialised"]

_FEW_TOKENS = 64
"""On a GPU: so few tokens read less by the factors than by the matrix they make."""
_SPARSE_COST = 4
"""On a CPU: a product with an element of S costs as much as so many in a matrix product."""
_PACK_COST = 24
"""On a CPU: likewise, to transpose an element of x or y."""
_SCATTER_COST = 100
"""On a CPU: likewise, to add an element of S to the matrix, or to take one from it."""


class Shape(NamedTuple):
    """Sizes of a product: tokens, outputs d, inputs p, rank, nnz."""

    tokens: int
    outputs: int
    inputs: int
    rank: int
    nnz: int


def choose_plan(shape: Shape, device: torch.device, backward: bool) -> Plan:
    """Return the plan that should take less time.

    On a CPU by counting products: 2 thin matrix products and one with S against building the matrix
    and one with it (backward: 5 thin ones, and 2 of S, against 5 and 2). On a GPU, where scattered
    products run at a fraction of the speed of dense ones, by the number of tokens.
    """
    n, d, p, r, nnz = shape
    if device.type != "cpu":
        return "factored" if n <= _FEW_TOKENS else "materialised"
    sparse = (_SPARSE_COST * nnz + _PACK_COST * (d + p)) * n * (nnz > 0)
    if not backward:
        factored = n * r * (d + p) + sparse
        materialised = d * p * r + n * d * p + _SCATTER_COST * nnz
    else:
        factored = n * r * (2 * d + 3 * p) + 2 * sparse
        materialised = 3 * d * p * r + 2 * n * d * p + 2 * _SCATTER_COST * nnz
    return "factored" if factored <= materialised else "materialised"


def sparse_low_rank(
    x: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    values: Tensor | None,
    bias: Tensor | None,
    *,
    support: Support,
    scale: float,
    plan: Plan | Literal["auto"] = "auto",
) -> Tensor:
    """Return x (scale B A + S)^T + bias, (..., d).

    Saved for the backward pass are x and the parameters. Inside ``torch.func`` transforms, and with
    forward-mode derivatives, the matrix is built instead, by torch's own operations.

    Args:
        x: (..., p), all of one dtype.
        a: (r, p), with b, or None: S alone.
        b: (d, r).
        values: (nnz,), the elements of S; None: B A alone.
        bias: (d,), or None.
        support: of S in (d, p).
        scale: of B A.
        plan: how; auto: ``choose_plan``.
    """
    rows = x.reshape(-1, x.shape[-1])
    if _is_transformed(x, a, b, values):
        y = F.linear(rows, dense_weight(a, b, values, support, scale, x), bias)
    else:
        y = _product(rows, a, b, values, bias, support, scale, plan)
    return y.view(*x.shape[:-1], y.shape[-1])


def dense_weight(
    a: Tensor | None,
    b: Tensor | None,
    values: Tensor | None,
    support: Support,
    scale: float,
    like: Tensor,
) -> Tensor:
    """Return scale B A + S, (d, p), by operations that torch differentiates and batches."""
    d, p = support.shape
    flat = like.new_zeros(d * p) if a is None or b is None else (b @ (scale * a)).flatten()
    if values is not None:
        flat = flat.index_add(0, support.indices.long(), values)
    return flat.view(d, p)


def _is_transformed(*tensors: Tensor | None) -> bool:
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        values: Tensor | None,
        bias: Tensor | None,
        support: Support,
        scale: float,
        plan: Plan | Literal["auto"],
    ) -> Tensor:
        ctx.save_for_backward(x, a, b, values)
        ctx.support, ctx.scale, ctx.plan = support, scale, plan
        x = _by_rows(x)
        if _plan(plan, x, a, values, support, backward=False) == "materialised":
            return F.linear(x, _build(a, b, values, support, scale, x), bias)
        d = support.shape[0]
        if a is None or b is None:
            y = x.new_zeros(len(x), d) if bias is None else bias.repeat(len(x), 1)
        elif bias is None:
            y = (x @ (a * scale).t()) @ b.t()
        else:
            y = torch.addmm(bias, x @ (a * scale).t(), b.t())
        if values is not None:
            add_sparse_product(support, values.contiguous(), x, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, values = ctx.saved_tensors
        plan = _plan(ctx.plan, x, a, values, ctx.support, backward=True)
        find = _materialised if plan == "materialised" else _factored
        wanted = _Wanted(*ctx.needs_input_grad[:4])
        # A caller's autocast would round what the kernels add to.
        plain = nullcontext() if g.is_meta else torch.autocast(g.device.type, enabled=False)
        with plain:
            found = find(_by_rows(g), _by_rows(x), a, b, values, ctx.support, ctx.scale, wanted)
        d_bias = g.sum(0) if ctx.needs_input_grad[4] else None
        return *found, d_bias, None, None, None


_product: Any = _Product.apply  # without types


class _Wanted(NamedTuple):
    x: bool
    a: bool
    b: bool
    values: bool


_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _factored(
    g: Tensor,
    x: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    values: Tensor | None,
    support: Support,
    scale: float,
    wanted: _Wanted,
) -> _Gradients:
    """Return scale G B A + G S, scale (G B)^T X, scale G^T X A^T and G^T X on the support."""
    dx = da = db = dv = None
    if a is not None and b is not None:
        if wanted.b:
            db = g.t() @ (x @ (a * scale).t())
        if wanted.x or wanted.a:
            back = g @ (b * scale)
            dx = back @ a if wanted.x else None
            da = back.t() @ x if wanted.a else None
            del back  # of the two thin products one is there at a time, and none with the scratch
    elif wanted.x:
        dx = torch.zeros_like(x)
    if values is not None:
        if dx is not None:
            add_sparse_product_back(support, values.contiguous(), g, dx)
        dv = sampled_product(support, g, x) if wanted.values else None
    return dx, da, db, dv


def _materialised(
    g: Tensor,
    x: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    values: Tensor | None,
    support: Support,
    scale: float,
    wanted: _Wanted,
) -> _Gradients:
    """Return G W; then, with dW = G^T X in W's place, of dW what A, B and v take."""
    dx = da = db = dv = None
    if wanted.x:
        dx = g @ _build(a, b, values, support, scale, x)
    if wanted.a or wanted.b or wanted.values:
        dw = torch.mm(g.t(), x, out=_scratch(support, x))
        if a is not None and b is not None:
            da = (b.t() @ dw).mul_(scale) if wanted.a else None
            db = (dw @ a.t()).mul_(scale) if wanted.b else None
        dv = support.gather(dw) if wanted.values else None
    return dx, da, db, dv


def _build(
    a: Tensor | None,
    b: Tensor | None,
    values: Tensor | None,
    support: Support,
    scale: float,
    like: Tensor,
) -> Tensor:
    """Return scale B A + S in the scratch."""
    weight = _scratch(support, like)
    if a is None or b is None:
        weight.zero_()
    else:
        torch.mm(b, a * scale, out=weight)
    return weight if values is None else support.scatter_(weight, values)


_kept = threading.local()


def _scratch(support: Support, like: Tensor) -> Tensor:
    """Return (d, p) of the scratch, which all layers that this thread computes share."""
    d, p = support.shape
    if not hasattr(_kept, "by_kind"):
        _kept.by_kind = {}
    kind = (like.device, like.dtype)
    flat: Tensor | None = _kept.by_kind.get(kind)
    if flat is None or len(flat) < d * p:
        with torch.inference_mode(False):  # else it could not be written to in training
            flat = torch.empty(d * p, dtype=like.dtype, device=like.device)
        if type(flat) is Tensor and not flat.is_meta:  # not one that only stands for a tensor
            _kept.by_kind[kind] = flat
    return flat[: d * p].view(d, p)


def _plan(
    plan: Plan | Literal["auto"],
    x: Tensor,
    a: Tensor | None,
    values: Tensor | None,
    support: Support,
    backward: bool,
) -> Plan:
    if plan != "auto":
        return plan
    rank, nnz = 0 if a is None else len(a), 0 if values is None else len(values)
    return choose_plan(Shape(len(x), *support.shape, rank, nnz), x.device, backward)


def _by_rows(x: Tensor) -> Tensor:
    """Return x (N, k) with contiguous rows, as the kernels take it."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
