"""What an oracle says about a point: a loss, a gradient or what makes one, and where it stems from.

Shapes: ``local`` ranks are hosted by this process, a row has ``d`` elements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from torch import Tensor

from gossamer.runtime.communicator import Communicator

__all__ = [
    "PLAIN",
    "Clip",
    "Directions",
    "Estimate",
    "Metrics",
    "Origin",
    "Sink",
    "TrainingFigures",
]

Metrics = Mapping[str, Tensor | float]
"""Figures of one step for the log: a number, or one per hosted rank as (local,)."""


class Directions(Protocol):
    """A gradient estimate that is not written down: what makes it, row by row."""

    @property
    def has_room(self) -> bool:
        """Whether ``dense`` takes no memory beyond what is held anyway."""
        ...

    def mean(self, comm: Communicator) -> Tensor | Directions | None:
        """Return the mean of the estimates over ranks, one row or one for each hosted rank.

        None: some rank's losses were not finite, and no rank may take the step.
        """
        ...

    def add_to_(self, x: Tensor, scale: float) -> Tensor:
        """Add ``scale`` times the estimate to x (local, d) without storing it."""
        ...

    def dense(self) -> Tensor:
        """Return the estimate as rows (local, d)."""
        ...

    def columns(self, begin: int, end: int) -> Tensor:
        """Return columns begin..end of ``dense``, (local, end - begin)."""
        ...


@dataclass(frozen=True)
class Origin:
    """What is known about a gradient beyond its values, for the optimizer that takes it.

    Attributes:
        noise_var: variance per element of noise that was added on purpose: a number, or one per
            hosted rank as (local, 1) float64; None: not known.
        restart: the gradients come from another source from now on: first moments start anew.
    """

    noise_var: float | Tensor | None = None
    restart: bool = False

    def scaled(self, gain: float) -> Origin:
        """Return what is known of a gradient whose noise has ``gain`` times the variance."""
        return self if self.noise_var is None else replace(self, noise_var=self.noise_var * gain)


PLAIN = Origin()
"""Of a gradient of which nothing more is known, one mixed from several among them."""


@dataclass
class Estimate:
    """What an oracle says about one point per rank.

    Attributes:
        loss: (local,) float64, each rank's own mean over its batch, whatever f weighs.
        grad: (local, d) or Directions. Its mean over ranks estimates the objective's gradient.
            None: a sink has it.
        weight: (local,) float64, examples or tokens behind it.
        origin: of each rank's ``grad``.
        mean_origin: of the mean of ``grad`` over ranks.
        metrics: further figures for the log.
    """

    loss: Tensor
    grad: Any  # Tensor; Directions from `deferred`, or an oracle whose form is "directions"
    weight: Tensor
    origin: Origin = PLAIN
    mean_origin: Origin = PLAIN
    metrics: Metrics = field(default_factory=dict)

    def mean(self, comm: Communicator) -> Tensor | Directions | None:
        """Return the mean of ``grad`` over ranks, for each hosted rank; every process calls it.

        None: some rank's losses were not finite, and no rank may take the step.
        """
        if not isinstance(self.grad, Tensor):
            mean: Tensor | Directions | None = self.grad.mean(comm)
        else:
            mean = comm.all_reduce(self.grad, "mean") if comm.n > 1 else self.grad
        return mean.expand(comm.local, -1) if isinstance(mean, Tensor) else mean

    def dense(self) -> Estimate:
        """Return the estimate with its gradient as rows."""
        return self if isinstance(self.grad, Tensor) else replace(self, grad=self.grad.dense())


Sink = Callable[[slice, Tensor], None]
TrainingFigures = Literal["open", "hidden", "marked"]
"""As they are; left out; with their names after ``nonprivate_``."""


class Clip(Protocol):
    """Bounds the gradient of a single example."""

    def factors(self, squares: Tensor) -> Tensor:
        """Return what each example's gradient is multiplied by.

        Args:
            squares: (examples, tensors) squared norms of the gradient, by parameter tensor in the
                order of the layout; of examples whose gradient is not finite they are not finite.

        Returns:
            (examples, 1), or (examples, tensors) where tensors are bounded apart; never negative,
            and 0 for an example whose gradient is not finite.
        """
        ...
