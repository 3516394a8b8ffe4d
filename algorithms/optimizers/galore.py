"""GaLore (arXiv:2403.03507): Adam on gradients projected to a low rank."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from gossamer.algorithms.estimates import Origin
from gossamer.algorithms.optimizers.decay import Decaying
from gossamer.runtime.communicator import Communicator
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.rows import RowLayout, aligned, combine, empty_rows

__all__ = ["GaLore", "GaLoreState"]


@dataclass
class GaLoreState:
    """The moments since ``init``, of projected gradients where a parameter is projected.

    Attributes:
        m: (local, k), moving average of gradients: of a projected d x p matrix max(d, p) * r
            elements, r = min(rank, d, p), of any other parameter its own.
        v: (local, k), moving average of their squares.
        basis: (local, b), P of each projected matrix, min(d, p) * r elements.
        t: how many gradients went in.
    """

    m: Tensor
    v: Tensor
    basis: Tensor
    t: int = 0


@dataclass(frozen=True)
class _Place:
    """Where a parameter lies: in the row, in the moments, and its P, if any, in the bases."""

    columns: slice
    shape: torch.Size
    moments: slice
    basis: slice

    @property
    def projected(self) -> bool:
        return bool(self.basis.stop > self.basis.start)

    def project(self, grad: Tensor, basis: Tensor) -> Tensor:
        """Return R (local, k) of gradients (local, d * p), each with the P of its row."""
        d, p = self.shape
        rows = [
            g.view(d, p) @ row.view(-1, p).T if d >= p else row.view(d, -1).T @ g.view(d, p)
            for g, row in zip(grad, basis[:, self.basis], strict=True)
        ]
        return torch.stack(rows).flatten(1)

    def lift(self, ratio: Tensor, basis: Tensor) -> Tensor:
        """Return N P or P N (local, d * p) of N (local, k)."""
        d, p = self.shape
        rows = [
            n.view(d, -1) @ row.view(-1, p) if d >= p else row.view(d, -1) @ n.view(-1, p)
            for n, row in zip(ratio, basis[:, self.basis], strict=True)
        ]
        return torch.stack(rows).flatten(1)

    def alone(self) -> _Place:
        """Return where it lies in what holds nothing else."""
        columns, moments, basis = (
            slice(0, s.stop - s.start) for s in (self.columns, self.moments, self.basis)
        )
        return _Place(columns, self.shape, moments, basis)


class GaLore(Decaying):
    """GaLore (arXiv:2403.03507): Adam in a subspace of the gradient that is renewed at times.

    Of each targeted d x p matrix with gradient G, every ``refresh`` steps, the first included, P
    becomes the first r = min(``rank``, d, p) right singular vectors of G as rows, if d >= p, and R
    = G P'; else the left ones as columns, and R = P' G. With moving averages m of R and v of R^2,
    and N = m / (sqrt(v) + eps), step k = 1, 2, ... moves the matrix by -lr sqrt(1 - beta2^k) / (1 -
    beta1^k) * scale * N P (or P N). For all other parameters R = G and the move is that of N
    itself. Moments stay as they are when P changes, as in the authors' code.

    The moments of a matrix have r * max(d, p) elements each, P has r * min(d, p). Where all
    ranks are given the same gradients, rank 0 computes P and broadcasts it: the signs of singular
    vectors are the library's choice, and the moments depend on them. Where ranks have gradients of
    their own, so are their P. Decay is AdamW's, of x before the step; the authors' code decays x
    after it, which differs by lr^2 * decay times the direction.
    """

    whole_because: ClassVar[str | None] = "projects whole gradients"

    name: Literal["galore"] = "galore"
    rank: int = Field(default=128, ge=1)
    """Dimensions of the subspace, at most those of the matrix; the default is the authors' for a
    model of 60M parameters."""
    refresh: int = Field(default=200, ge=1)
    """Steps that a P serves (T in the paper); 500 for 7B parameters."""
    scale: float = Field(default=0.25, gt=0)
    """Of the update of projected matrices (alpha in the paper)."""
    targets: tuple[str, ...] = ("attn", "attention", "mlp")
    """Matrices with one of these in their names are projected."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Share of the old first moment that stays."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Share of the old second moment that stays."""
    eps: float = Field(default=1e-6, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decay of the parameters, times the learning rate; the moments do not see it."""

    _places: dict[tuple[int, int], _Place] = PrivateAttr(default_factory=dict)
    """By their columns, in order."""
    _alike: bool = PrivateAttr(default=False)

    def know(self, layout: RowLayout, alike: bool = False) -> None:
        """Find the matrices to project.

        Raises:
            ConfigError: there are none.
        """
        super().know(layout, alike)
        self._alike, self._places = alike, {}
        moments = basis = 0
        for s in layout.slices:
            projected = self._is_target(s.name, s.shape)
            rank = min(self.rank, *s.shape) if projected else 0
            kept = rank * max(s.shape) if projected else s.shape.numel()
            spanned = rank * min(s.shape) if projected else 0
            self._places[s.begin, s.end] = _Place(
                columns=slice(s.begin, s.end),
                shape=s.shape,
                moments=slice(moments, moments + kept),
                basis=slice(basis, basis + spanned),
            )
            moments += aligned(kept, layout.dtype)
            basis += aligned(spanned, layout.dtype)
        if not any(place.projected for place in self._places.values()):
            matrices = [f"{s.name} {tuple(s.shape)}" for s in layout.slices if len(s.shape) == 2]
            raise ConfigError(
                f"optimizer.targets: no matrix has {' or '.join(self.targets)} in its name; "
                f"there are {', '.join(matrices[:3]) or 'none'}, ..."
            )

    def _is_target(self, name: str, shape: torch.Size) -> bool:
        named = any(target in name for target in self.targets)
        return named and len(shape) == 2 and min(shape) > 0

    def init(self, x: Tensor) -> GaLoreState:
        """Start with no gradient seen.

        Raises:
            ConfigError: rows of float16, in which squares of gradients underflow.
        """
        if x.dtype == torch.float16:
            raise ConfigError(
                "optimizer.name: galore keeps squares of gradients, which underflow in float16; "
                "use task.dtype bfloat16 or float32, or optimizer sgd"
            )
        assert self._places, "know comes first"
        *_, last = self._places.values()
        k, b = last.moments.stop, max(place.basis.stop for place in self._places.values())
        m, v, basis = (empty_rows(len(x), size, x.dtype, x.device) for size in (k, k, b))
        return GaLoreState(m, v, basis)

    def rule(
        self, state: GaLoreState, x: Tensor, grad: Tensor, comm: Communicator, origin: Origin
    ) -> Tensor:
        """Move the moments and return their ratio, back in the space of x, plus the decay.

        Where all ranks have the same P, rank 0 sends it when it is new.
        """
        if origin.restart:
            state.m.zero_()
        places = list(self._places.values())
        if self._columns != slice(0, None):
            places = [self._place_of(self._columns).alone()]
        if state.t % self.refresh == 0:
            self._renew(state, places, grad, comm)
        state.t += 1
        correction = math.sqrt(1.0 - self.beta2**state.t) / (1.0 - self.beta1**state.t)
        direction = empty_rows(len(x), x.shape[1], x.dtype, x.device)
        for place in places:
            g = grad[:, place.columns]
            if place.projected:
                g = place.project(g, state.basis)
            m, v = state.m[:, place.moments], state.v[:, place.moments]
            combine([(self.beta1, m), (1.0 - self.beta1, g)], out=m)
            combine([(self.beta2, v), (1.0 - self.beta2, g * g)], out=v)
            ratio = m / v.sqrt().add_(self.eps)
            if place.projected:
                ratio = place.lift(ratio, state.basis)
            weight = correction * (self.scale if place.projected else 1.0)
            combine([(weight, ratio)], out=direction[:, place.columns])
        return self.decayed(x, direction, out=direction)

    def part(self, state: GaLoreState, d: int, columns: slice) -> GaLoreState:
        """Return the state of one parameter.

        Raises:
            ConfigError: the columns are not those of one parameter.
        """
        place = self._place_of(columns)
        return replace(
            state,
            m=state.m[:, place.moments],
            v=state.v[:, place.moments],
            basis=state.basis[:, place.basis],
        )

    def adopt(self, state: GaLoreState, part: GaLoreState, d: int) -> None:
        """Take over the count; moments and bases are views."""
        state.t = part.t

    def _place_of(self, columns: slice) -> _Place:
        place = self._places.get((columns.start, columns.stop))
        if place is None:
            raise ConfigError(
                "optimizer.name: galore projects whole matrices, and the gradient comes in other "
                f"parts (columns {columns.start} to {columns.stop}); use adam or sgd"
            )
        return place

    def _renew(
        self, state: GaLoreState, places: list[_Place], grad: Tensor, comm: Communicator
    ) -> None:
        """Make P of each projected matrix anew, from each row's gradient or from rank 0's."""
        places = [place for place in places if place.projected]
        rows = range(len(grad)) if not self._alike else range(1 if 0 in comm.ranks else 0)
        for place in places:
            for i in rows:
                found = _principal(grad[i, place.columns].view(place.shape), self.rank)
                if found is not None:
                    state.basis[i, place.basis] = found.flatten()
        if places and self._alike and comm.n > 1:
            state.basis.copy_(comm.broadcast(state.basis).expand_as(state.basis))


def _principal(grad: Tensor, rank: int) -> Tensor | None:
    """Return P of a gradient (d, p): (rank, p) where d >= p, else (d, rank).

    None where the gradient is not finite: the run has diverged, and what follows shows it.
    """
    grad = grad.float()
    if not bool(grad.isfinite().all()):
        return None
    left, _, right = torch.linalg.svd(grad, full_matrices=False)
    found: Tensor = right[:rank] if grad.shape[0] >= grad.shape[1] else left[:, :rank]
    return found
