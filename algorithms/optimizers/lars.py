"""LARS: momentum whose step along each parameter is as long as the parameter asks."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from gossamer.algorithms.estimates import Origin
from gossamer.algorithms.optimizers.base import Optimizer
from gossamer.algorithms.optimizers.sgd import MomentumState
from gossamer.runtime.communicator import Communicator
from gossamer.runtime.rows import RowLayout, Slice, combine, row_norm

__all__ = ["LARS"]


class LARS(Optimizer):
    """Layer-wise adaptive rates (arXiv:1708.03888), for large batches.

    Of each parameter p with two dimensions or more, u = trust * |p| / |g + weight_decay * p| times
    (g + weight_decay * p); of others (biases, normalisations) u = g. m = beta * m + u;
    x -= lr * m.
    """

    whole_because: ClassVar[str | None] = "compares the lengths of parameters and their gradients"

    name: Literal["lars"] = "lars"
    beta: float = Field(default=0.9, ge=0, lt=1)
    """Share of the old momentum that stays."""
    trust: float = Field(default=1e-3, gt=0)
    """Length of a step relative to its parameter's, at a learning rate of 1."""
    weight_decay: float = Field(default=0.0, ge=0)
    """L2 penalty added to the gradients of parameters with two dimensions or more."""

    _slices: tuple[Slice, ...] = PrivateAttr(default=())

    def know(self, layout: RowLayout, alike: bool = False) -> None:
        """Find the parameters with two dimensions or more."""
        self._slices = tuple(s for s in layout.slices if len(s.shape) > 1)

    def init(self, x: Tensor) -> MomentumState:
        """Start at rest."""
        return MomentumState(m=torch.zeros_like(x))

    def rule(
        self, state: MomentumState, x: Tensor, grad: Tensor, comm: Communicator, origin: Origin
    ) -> Tensor:
        """Move the momentum and return it."""
        if origin.restart:
            state.m.zero_()
        update, first = grad.clone(), self._columns.start
        for s in self._slices:
            columns = slice(s.begin - first, s.end - first)
            if columns.start < 0 or columns.stop > x.shape[1]:
                continue  # of another part
            p, g = x[:, columns], grad[:, columns]
            if self.weight_decay:
                g = combine([(1.0, g), (self.weight_decay, p)])
            lengths = row_norm(p), row_norm(g)
            is_moving = (lengths[0] > 0) & (lengths[1] > 0)
            ratio = torch.where(is_moving, self.trust * lengths[0] / lengths[1], 1.0)
            combine([(ratio, g)], out=update[:, columns])
        return combine([(self.beta, state.m), (1.0, update)], out=state.m)
