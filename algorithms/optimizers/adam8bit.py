"""Adam with 8-bit moments (arXiv:2110.02861)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from gossamer.algorithms.estimates import Origin
from gossamer.algorithms.optimizers.decay import Decaying
from gossamer.algorithms.optimizers.dynamic_codes import adam_, codebook, coded_adam_torch
from gossamer.runtime.communicator import Communicator
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.native import CODED_BLOCK, CodedMoment, coded_adam
from gossamer.runtime.rows import RowLayout, empty_rows

__all__ = ["Adam8bit", "Adam8bitState", "Moment"]

_SMALL = 4096
"""Parameters of fewer elements keep float32 moments."""


@dataclass
class Moment:
    """A moment of all parameters, one after another.

    Attributes:
        codes: (local, c) uint8, of large parameters.
        scales: (local, b) float32, one per block of 256 codes; blocks begin anew at each parameter.
        small: (local, s) float32, of small parameters.
    """

    codes: Tensor
    scales: Tensor
    small: Tensor

    def zero_(self) -> None:
        """Make it 0: so is every code times a scale of 0."""
        self.scales.zero_()
        self.small.zero_()


@dataclass
class Adam8bitState:
    """The moments of the gradients since ``init``.

    Attributes:
        m: moving average of gradients.
        v: moving average of their squares.
        t: how many gradients went in.
    """

    m: Moment
    v: Moment
    t: int = 0


@dataclass(frozen=True)
class _Place:
    """Where a parameter lies: in the row, and in each part of a moment."""

    columns: slice
    codes: slice
    scales: slice
    small: slice

    def of(self, moment: Moment) -> Moment:
        """Return views of the parameter's moment."""
        return Moment(
            moment.codes[:, self.codes], moment.scales[:, self.scales], moment.small[:, self.small]
        )


class Adam8bit(Decaying):
    """Adam whose moments take a byte per element (arXiv:2110.02861).

    x -= lr * (m^ / (sqrt(v^) + eps) + decay * x), as adamw. Gradients become float32, in which m, v
    and their ratio are computed whatever the rows are; the ratio, its sum with the decay, and x are
    each rounded to the rows' dtype. After each step m and v become codes of the dynamic data type,
    signed and unsigned, times the largest magnitude of their block of 256 elements; parameters of
    fewer than 4096 elements keep float32. 2 + 8 / 256 bytes per element in place of 8. One
    parameter is decoded at a time, or 256 elements on the CPU. The codes stay on the rank.
    """

    name: Literal["adam8bit"] = "adam8bit"
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Share of the old first moment that stays."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Share of the old second moment that stays."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    second_moment: Literal["nearest", "positive"] = "nearest"
    """``nearest``, as released: one below 1.6e-7 of its block's largest becomes 0, and where the
    gradient is 0 for long an update may be m / eps then. ``positive``: it gets the least code above
    0, so that updates stay bounded (the zero point, arXiv:2309.01507)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decay of the parameters, times the learning rate; the moments do not see it."""

    _places: dict[tuple[int, int], _Place] = PrivateAttr(default_factory=dict)
    """By their columns, in order."""

    def know(self, layout: RowLayout, alike: bool = False) -> None:
        """Find where the parameters lie, of which each has blocks of its own."""
        super().know(layout, alike)
        self._places, codes, scales, small = {}, 0, 0, 0
        for s in layout.slices:
            count = s.end - s.begin
            coded, kept = (count, 0) if count >= _SMALL else (0, count)
            blocks = -(-coded // CODED_BLOCK)
            self._places[s.begin, s.end] = _Place(
                columns=slice(s.begin, s.end),
                codes=slice(codes, codes + coded),
                scales=slice(scales, scales + blocks),
                small=slice(small, small + kept),
            )
            codes, scales, small = codes + coded, scales + blocks, small + kept

    def init(self, x: Tensor) -> Adam8bitState:
        """Start with no gradient seen.

        Raises:
            ConfigError: rows of float16, whose gradients' squares underflow.
        """
        if x.dtype == torch.float16:
            raise ConfigError(
                "optimizer.name: adam8bit takes squares of gradients, which underflow in float16; "
                "use task.dtype bfloat16 or float32, or optimizer sgd"
            )
        assert self._places, "know comes first"
        *_, last = self._places.values()

        def zeros(count: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(len(x), count, dtype=dtype, device=x.device)

        m, v = (
            Moment(
                zeros(last.codes.stop, torch.uint8),
                zeros(last.scales.stop, torch.float32),
                zeros(last.small.stop, torch.float32),
            )
            for _ in range(2)
        )
        return Adam8bitState(m, v)

    def rule(
        self, state: Adam8bitState, x: Tensor, grad: Tensor, comm: Communicator, origin: Origin
    ) -> Tensor:
        """Move the moments and return their ratio plus the decay."""
        if origin.restart:
            state.m.zero_()
        state.t += 1
        direction = empty_rows(len(x), x.shape[1], x.dtype, x.device)
        if self._columns != slice(0, None):
            self._move(state.m, state.v, grad, direction, state.t)
        else:
            for place in self._places.values():
                m, v, at = place.of(state.m), place.of(state.v), place.columns
                self._move(m, v, grad[:, at], direction[:, at], state.t)
        return self.decayed(x, direction, out=direction)

    def _move(self, m: Moment, v: Moment, grad: Tensor, out: Tensor, t: int) -> None:
        """Move the moments of one parameter and write their ratio."""
        factors = {"beta1": self.beta1, "beta2": self.beta2, "eps": self.eps}
        if m.small.shape[1]:
            out.copy_(adam_(m.small, v.small, grad.float(), **factors, t=t))
            return
        signed = codebook(True, grad.device)
        unsigned = codebook(False, grad.device, self.second_moment == "positive")
        step = coded_adam if grad.is_cpu else coded_adam_torch
        for i in range(len(grad)):
            first = CodedMoment(m.codes[i], m.scales[i], signed)
            second = CodedMoment(v.codes[i], v.scales[i], unsigned)
            step(first, second, grad[i], out[i], **factors, t=t)

    def parts(self, d: int) -> Iterator[slice]:
        """Yield the columns of one parameter after another."""
        for place in self._places.values():
            yield place.columns

    def part(self, state: Adam8bitState, d: int, columns: slice) -> Adam8bitState:
        """Return the state of one parameter: views.

        Raises:
            ConfigError: the columns are not those of one parameter.
        """
        place = self._places.get((columns.start, columns.stop))
        if place is None:
            raise ConfigError(
                "optimizer.name: adam8bit has blocks within parameters, and the gradient comes in "
                f"other parts (columns {columns.start} to {columns.stop}); use adam or sgd"
            )
        return replace(state, m=place.of(state.m), v=place.of(state.v))

    def adopt(self, state: Adam8bitState, part: Adam8bitState, d: int) -> None:
        """Take over the count."""
        state.t = part.t
