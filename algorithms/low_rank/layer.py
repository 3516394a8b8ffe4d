"""Linear layers whose weight is scale B A + S: low rank, sparse, or both."""

# Shapes: d outputs, p inputs, r rank, nnz elements of the support.

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.algorithms.low_rank.product import Plan, dense_weight, sparse_low_rank
from gossamer.algorithms.low_rank.support import no_support
from gossamer.runtime.native import Support
from gossamer.runtime.random import Random

__all__ = ["RestartedLinear", "SparseLowRankLinear"]


class SparseLowRankLinear(nn.Module):
    """y = x (scale B A + S)^T + bias, with A, B and the elements v of S trained.

    Attributes:
        A: (r, p), or None at rank 0.
        B: (d, r), or None at rank 0.
        v: (nnz,), or None with an empty support.
        bias: (d,), or None.
        support: of S; no parameter, and the same on every rank.
        scale: of B A.
        gain: (1,), whose tanh scales B A where that is trained; else None.
        transposed: whether it stands for transformers' Conv1D, whose weight is (p, d).
    """

    def __init__(
        self,
        support: Support,
        *,
        rank: int,
        scale: float,
        bias: bool,
        train_scale: bool = False,
        plan: Plan | Literal["auto"] = "auto",
        like: Tensor,
    ) -> None:
        """Make the parameters, without values: ``reset_`` draws them.

        Args:
            support: of S, (d, p).
            rank: r; 0 for S alone, which must then have an element.
            scale: of B A.
            bias: whether there is one.
            train_scale: B A is scaled by tanh of a parameter that starts at 1, not by ``scale``.
            plan: how to compute; auto: by shape and device.
            like: a tensor of the parameters' device and dtype.
        """
        super().__init__()
        d, p = support.shape

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(like.new_empty(shape))

        self.support, self.rank, self.scale, self.plan = support, rank, scale, plan
        self.transposed = False
        self.A = parameter(rank, p) if rank else None
        self.B = parameter(d, rank) if rank else None
        self.v = parameter(len(support)) if len(support) else None
        self.bias = parameter(d) if bias else None
        self.gain = nn.Parameter(like.new_ones(1)) if train_scale and rank else None

    @property
    def in_features(self) -> int:
        """Inputs p."""
        return self.support.shape[1]

    @property
    def out_features(self) -> int:
        """Outputs d."""
        return self.support.shape[0]

    @torch.no_grad()
    def reset_(self, seed: int, layer: int) -> Self:
        """Draw A, v ~ U(-1/sqrt(p), 1/sqrt(p)) and the bias ~ U(-1/sqrt(d), 1/sqrt(d)); B = 0.

        Counted by (seed, layer) (arXiv:2406.02214, the released code).
        """
        d, p = self.support.shape
        for name, bound in (("A", p), ("v", p), ("bias", d)):
            parameter = getattr(self, name)
            if parameter is not None:
                _uniform_(parameter, 1 / math.sqrt(bound), seed, f"low-rank/{name}", layer)
        if self.B is not None:
            self.B.zero_()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., d) of x (..., p)."""
        return self._product(x, self.bias)

    @property
    def weight(self) -> Tensor:
        """``dense_weight()``, for code that looks at a linear layer's weight."""
        return self.dense_weight()

    def dense_weight(self) -> Tensor:
        """Return scale B A + S, (d, p), in the parameters' dtype, differentiable."""
        like = next(self.parameters())
        with _no_autocast(like):
            a, scale = self._scaled()
            return dense_weight(a, self.B, self.v, self.support, scale, like)

    def fixed_tensors(self) -> dict[str, Tensor]:
        """Return what is neither trained nor a buffer, and must be the same on every rank."""
        return {"support": self.support.indices}

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        a, scale = self._scaled()
        given = (a, self.B, self.v, bias)
        kind = x.device.type
        options: Any = {"support": self.support, "scale": scale, "plan": self.plan}
        if x.is_meta or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
            with _no_autocast(x):
                return sparse_low_rank(x, *given, **options)
        dtype = torch.get_autocast_dtype(kind)
        with _no_autocast(x):
            low = (None if t is None else t.to(dtype) for t in given)
            return sparse_low_rank(x.to(dtype), *low, **options)

    def _scaled(self) -> tuple[Tensor | None, float]:
        if self.gain is None or self.A is None:
            return self.A, self.scale
        return self.gain.tanh() * self.A, 1.0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # The support follows to the device; it has no dtype to change.
        device = fn(torch.empty(0, device=self.support.indices.device)).device
        if device != self.support.indices.device and device.type != "meta":
            self.support = self.support.to(device)
        return self

    def get_extra_state(self) -> Tensor:
        """Return the SHA-256 of the support, uint8 (32,), which goes into ``state_dict``."""
        if self.support.indices.is_meta:
            return torch.zeros(32, dtype=torch.uint8, device="meta")
        digest = hashlib.sha256(self.support.indices.cpu().numpy().tobytes()).digest()
        return torch.tensor(list(digest), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Compare with the support that the values belong to.

        Raises:
            ValueError: it is another one.
        """
        if not torch.equal(state.cpu().to(torch.uint8), self.get_extra_state()):
            raise ValueError(
                "load_state_dict: the values belong to another support than this layer's, which "
                "follows from seed, number of the layer and density; wrap the model as it was"
            )

    def extra_repr(self) -> str:
        """Return the sizes, for ``repr``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"elements={len(self.support)}, scale={self.scale:g}, bias={self.bias is not None}"
        )


class RestartedLinear(SparseLowRankLinear):
    """A frozen weight plus B A, which is merged into it from time to time (arXiv:2307.05695).

    Attributes:
        base: (d, p) buffer: the frozen weight, the same on every rank.
        dropout: share of the low-rank path's inputs that is dropped in training.
    """

    base: Tensor

    def __init__(self, base: Tensor, *, dropout: float = 0.0, **options: Any) -> None:
        """Take the weight; ``options`` rank, scale and bias as of SparseLowRankLinear."""
        d, p = base.shape
        super().__init__(no_support((d, p), base.device), like=base, **options)
        self.register_buffer("base", base)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., d) of x (..., p)."""
        dropped = F.dropout(x, self.dropout, self.training)
        return F.linear(x, self.base, self.bias) + self._product(dropped, None)

    def dense_weight(self) -> Tensor:
        """Return the frozen weight plus B A."""
        return self.base + super().dense_weight()

    def fixed_tensors(self) -> dict[str, Tensor]:
        """Return the frozen weight: ranks start from the same, and change it alike."""
        return {"base": self.base}

    @torch.no_grad()
    def merge_(self, seed: int, layer: int, step: int) -> None:
        """Add B A to the frozen weight, draw A anew, and set B to zero.

        Outputs stay, but for the rounding of the sum: in bfloat16 that is a 256th of the weight,
        which can be most of a small B A.

        Args:
            seed: of the run.
            layer: number of the layer.
            step: of the run; A is counted by it.
        """
        assert self.A is not None
        assert self.B is not None
        self.base.add_(super().dense_weight())
        bound = 1 / math.sqrt(self.in_features)
        _uniform_(self.A, bound, seed, "low-rank/A", layer, step)
        self.B.zero_()


def _no_autocast(like: Tensor) -> AbstractContextManager[object]:
    return nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)


def _uniform_(
    parameter: Tensor, bound: float, seed: int, name: str, layer: int, step: int = 0
) -> None:
    """Fill with U(-bound, bound), counted by (seed, name, layer, step)."""
    if parameter.is_meta:
        return
    drawn = torch.empty(1, parameter.numel())
    Random(seed).stream(name, [layer], step).uniform_(drawn)
    parameter.data.copy_(drawn.sub_(0.5).mul_(2 * bound).view(parameter.shape))
