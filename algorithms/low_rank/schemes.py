"""Schemes for pretraining: sparse plus low rank, and what it is compared with.

Every linear layer of attention and perceptrons is replaced; embeddings, norms and the head are
trained as they are. ``sltrain`` and ``sparse`` draw fresh weights, whatever the model's were;
``low-rank`` and ``relora`` start from them. New parameters have the dtype of the model's. No scheme
needs a dense gradient; dense weights keeps ``relora`` alone, frozen.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer.algorithms.low_rank.layer import RestartedLinear, SparseLowRankLinear
from gossamer.algorithms.low_rank.product import Plan
from gossamer.algorithms.low_rank.product_gap import product_gap
from gossamer.algorithms.low_rank.restarts import Restarts
from gossamer.algorithms.low_rank.sltrain import (
    ATTENTION_AND_MLP,
    layers_of,
    replace_layers,
    wrap,
)
from gossamer.algorithms.low_rank.support import no_support
from gossamer.algorithms.tasks.scheme import Scheme
from gossamer.runtime.errors import ConfigError

__all__ = ["LowRank", "ReLoRA", "SLTrain", "Sparse"]


class _Replacing(Scheme):
    targets: tuple[str, ...] = ATTENTION_AND_MLP
    """Linear layers with one of these in their names are replaced."""

    def problem_parts(self, model: nn.Module, seed: int) -> dict[str, Any]:
        """Add the figure ``product_gap``."""
        return {"figures": product_gap(model)}


class SLTrain(_Replacing):
    """Weights (alpha / r) B A + S, S sparse on a fixed random support (SLTrain, arXiv:2406.02214).

    A and the elements of S start uniform in +-1 / sqrt(inputs), B at zero.
    """

    name: Literal["sltrain"] = "sltrain"
    rank: int = Field(ge=0, strict=True)
    """Rank r of B A: a quarter of the width in the paper. Required; 0: S alone."""
    alpha: float | None = Field(default=None, gt=0)
    """B A is scaled by alpha / r; None: by 1."""
    density: float = Field(default=0.03, ge=0, le=1)
    """Share of a weight's elements that S has."""
    support: int = Field(default=0, ge=0, strict=True)
    """Which of the supports that the run's seed gives."""
    freeze_a: bool = False
    """Do not train A: the mean of parameters over ranks is then exactly that of weights."""
    train_scale: bool = False
    """Scale B A by tanh(c), c trained from 1, not by alpha / r."""
    plan: Plan | Literal["auto"] = "auto"
    """How to multiply: by the factors, or by the matrix they make; auto: by shape and device."""

    def apply(self, model: nn.Module, seed: int) -> nn.Module:
        """Replace the layers.

        Raises:
            ConfigError: no layer has such a name, or nothing would be trained in them.
        """
        for field, given in (
            ("alpha", self.alpha is not None),
            ("freeze_a", self.freeze_a),
            ("train_scale", self.train_scale),
        ):
            if self.rank == 0 and given:
                raise ConfigError(f"task.scheme.{field}: has no effect at rank 0; leave it out")
        wrapped = wrap(
            model,
            rank=self.rank,
            alpha=self.alpha,
            density=self.density,
            targets=self.targets,
            seed=seed,
            support=self.support,
            freeze_a=self.freeze_a,
            train_scale=self.train_scale,
            plan=self.plan,
            who="task.scheme",
        )
        if all(layer.v is None for _, layer in layers_of(wrapped)):
            raise ConfigError(
                f"task.scheme.density: {self.density:g} gives no layer an element; B A alone "
                "starts with all layers at zero and never learns; use scheme low-rank, or more"
            )
        return wrapped


class Sparse(_Replacing):
    """Weights S alone, sparse on a fixed random support: SLTrain of rank 0."""

    name: Literal["sparse"] = "sparse"
    density: float = Field(default=0.03, gt=0, le=1)
    """Share of a weight's elements that S has."""

    def apply(self, model: nn.Module, seed: int) -> nn.Module:
        """Replace the layers."""
        options: Any = {"targets": self.targets, "seed": seed, "who": "task.scheme"}
        return wrap(model, rank=0, density=self.density, **options)


class LowRank(_Replacing):
    """Weights B A alone, started at the best such approximation of the model's own weights.

    W = U S V^T, B = U_r S_r^(1/2), A = S_r^(1/2) V_r^T (spectral initialisation). With B = 0, as
    LoRA starts, all layers would be zero, and so all gradients.
    """

    name: Literal["low-rank"] = "low-rank"
    rank: int = Field(ge=1, strict=True)
    """Rank r of B A. Required."""
    gain: float = Field(default=1.0, gt=0)
    """Times the start of B A."""

    @torch.no_grad()
    def apply(self, model: nn.Module, seed: int) -> nn.Module:
        """Replace the layers."""

        def make(weight: Tensor, bias: Tensor | None, layer: int) -> SparseLowRankLinear:
            d, p = weight.shape
            if self.rank > min(d, p):
                raise ConfigError(
                    f"task.scheme.rank: a layer is {d} x {p}; use at most {min(d, p)}, "
                    f"got {self.rank}"
                )
            none = no_support((d, p), weight.device)
            options: Any = {"bias": bias is not None, "like": weight}
            made = SparseLowRankLinear(none, rank=self.rank, scale=1.0, **options)
            _keep_bias(made.reset_(seed, layer), bias)
            assert made.A is not None
            assert made.B is not None
            if not weight.is_meta:
                u, s, vt = torch.linalg.svd(weight.float(), full_matrices=False)
                root = (self.gain * s[: self.rank]).sqrt()
                made.B.copy_(u[:, : self.rank] * root)
                made.A.copy_(root[:, None] * vt[: self.rank])
            return made

        return replace_layers(model, self.targets, make, "task.scheme")


class ReLoRA(_Replacing):
    """Frozen weights plus (alpha / r) B A, merged into them from time to time (arXiv:2307.05695).

    At a merge A is drawn anew, B is zero, and of the optimizer's state of both most is zero too.
    Dense weights are kept: parameters are fewer, memory is not. ``schedule: cosine-restarts``
    with the same cycle warms the rate up again after each. The frozen weights start as the model's
    own; the paper's phase at full rank before is a run of its own, exported.
    """

    name: Literal["relora"] = "relora"
    rank: int = Field(ge=1, strict=True)
    """Rank r of B A. Required."""
    alpha: float | None = Field(default=None, gt=0)
    """B A is scaled by alpha / r; None: by 1."""
    every: int = Field(ge=1, strict=True)
    """Steps between merges; 1,000 to 5,000 in the paper. Required."""
    reset: Literal["random", "magnitude"] = "random"
    """Which of the optimizer's state of A and B becomes zero: at random, or the smallest."""
    share: float = Field(default=0.999, ge=0, le=1)
    """How much of it does."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of the inputs of B A that is dropped in training."""

    def apply(self, model: nn.Module, seed: int) -> nn.Module:
        """Replace the layers."""

        def make(weight: Tensor, bias: Tensor | None, layer: int) -> SparseLowRankLinear:
            scale = 1.0 if self.alpha is None else self.alpha / self.rank
            options: Any = {"rank": self.rank, "scale": scale, "bias": bias is not None}
            made = RestartedLinear(weight.clone(), dropout=self.dropout, **options)
            return _keep_bias(made.reset_(seed, layer), bias)

        return replace_layers(model, self.targets, make, "task.scheme")

    def problem_parts(self, model: nn.Module, seed: int) -> dict[str, Any]:
        """Add the merges."""
        return {"restarts": Restarts(self.every, self.reset, self.share, seed)}


@torch.no_grad()
def _keep_bias(layer: SparseLowRankLinear, bias: Tensor | None) -> SparseLowRankLinear:
    """Give the layer the bias of the one it stands for."""
    if bias is not None and layer.bias is not None and not bias.is_meta:
        layer.bias.copy_(bias)
    return layer
