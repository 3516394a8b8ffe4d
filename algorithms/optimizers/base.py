"""What every optimizer is: a schedule, a bound on gradients and a rule, local to the rank.

Shapes: ``local`` ranks are hosted by this process, a row has ``d`` elements.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from gossamer.algorithms.estimates import PLAIN, Directions, Origin
from gossamer.algorithms.schedules import Scheduled
from gossamer.runtime.communicator import Communicator
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.rows import RowLayout, combine, row_norm
from gossamer.runtime.state import adopt, part_of

__all__ = ["Optimizer"]

_COLUMNS = 2**18
"""Columns of an estimate that are written down at once."""


class Optimizer(Scheduled, ABC):
    """Turns a gradient into an update of the row, local to the rank."""

    name: str = ""
    max_norm: float | None = Field(default=None, gt=0)
    """A gradient that is longer, over all parameters of a rank, is scaled to this Euclidean norm;
    None: none is."""

    whole_because: ClassVar[str | None] = None
    """What the rule does with a gradient that no part of one allows, after the optimizer's name;
    parameter by parameter it may still be had. None: nothing."""

    _columns: slice = PrivateAttr(default=slice(0, None))
    """Of the row: those that ``update_`` is given now."""

    def know(self, layout: RowLayout, alike: bool = False) -> None:
        """Get to know where which parameter lies, before ``init``.

        Args:
            layout: of the rows.
            alike: all ranks will be given the same gradients, to the bit.

        Raises:
            ConfigError: a field names parameters that there are not.
        """

    @abstractmethod
    def init(self, x: Tensor) -> Any:
        """Return the state for rows like x (local, d): a dataclass of tensors, or None."""

    @abstractmethod
    def rule(
        self, state: Any, x: Tensor, grad: Tensor, comm: Communicator, origin: Origin
    ) -> Tensor:
        """Return the direction (local, d) whose multiple by -rate is the update; moves ``state``.

        What an optimizer defines; others call ``direction``. ``x`` and ``grad`` are kept; the
        result may be ``grad`` itself. Every process calls it, and may exchange messages in it.
        """

    def direction(
        self, state: Any, x: Tensor, grad: Tensor, comm: Communicator, origin: Origin = PLAIN
    ) -> Tensor:
        """Return the ``rule``'s direction for a gradient that is bounded first.

        Args:
            state: moved.
            x: (local, d) parameters; kept.
            grad: (local, d); kept.
            comm: the ranks.
            origin: of ``grad``.
        """
        return self.rule(state, x, self.clipped(grad), comm, origin)

    def clipped(self, grad: Tensor) -> Tensor:
        """Return grad (local, d) with each row at most ``max_norm`` long; itself where all are."""
        if self.max_norm is None:
            return grad
        length = row_norm(grad)
        too_long = length > self.max_norm
        if not bool(too_long.any()):
            return grad
        return combine([(torch.where(too_long, self.max_norm / length, 1.0), grad)])

    def update_(
        self, state: Any, x: Tensor, grad: Tensor, comm: Communicator, origin: Origin = PLAIN
    ) -> Tensor:
        """``x -= rate * direction`` in place; returns x."""
        direction = self.direction(state, x, grad, comm, origin)
        return combine([(1.0, x), (-self.rate(comm), direction)], out=x)

    def apply_(
        self,
        state: Any,
        x: Tensor,
        grad: Tensor | Directions,
        comm: Communicator,
        origin: Origin = PLAIN,
    ) -> Tensor:
        """``update_`` with rows, or with what ``Oracle.deferred`` gives in their place.

        Of Directions a part of the columns is written down at a time, or all where a whole gradient
        is needed and there is room for it.

        Raises:
            ConfigError: there is none.
        """
        if not isinstance(grad, Tensor) and self.needs_whole and grad.has_room:
            grad = grad.dense()
        if isinstance(grad, Tensor):
            return self.update_(state, x, grad, comm, origin)
        self.require_directions(origin)
        with self.in_parts(state, x, comm, origin) as update:
            for columns in self.parts(x.shape[1]):
                update(columns, grad.columns(columns.start, columns.stop))
        return x

    @property
    def needs_whole(self) -> bool:
        """Whether Directions are of no use to it."""
        return self.max_norm is not None or self.whole_because is not None

    def require_parts(self, origin: Origin = PLAIN) -> None:
        """Get ready for gradients in parts, Directions among them.

        Args:
            origin: of the gradients.

        Raises:
            ConfigError: the rule, or its bound, needs whole gradients.
        """
        if self.max_norm is not None:
            raise ConfigError(
                f"optimizer.max_norm: {self.max_norm:g} bounds the length of whole gradients, and "
                "these come in parts (of random directions, or layer by layer); leave it out, or "
                "use oracle: backprop with one update for all layers"
            )

    def require_directions(self, origin: Origin = PLAIN) -> None:
        """Get ready for Directions that have no room for a row.

        Args:
            origin: of the gradients.

        Raises:
            ConfigError: it ``needs_whole`` gradients.
        """
        self.require_parts(origin)
        if self.whole_because is not None:
            raise ConfigError(
                f"optimizer.name: {self.name} {self.whole_because}, and this oracle gives numbers "
                "for random directions; use adam or sgd, or oracle: backprop"
            )

    def parts(self, d: int) -> Iterator[slice]:
        """Yield columns of rows of d elements, of which one update after another is made."""
        for begin in range(0, d, _COLUMNS):
            yield slice(begin, min(d, begin + _COLUMNS))

    @contextmanager
    def in_parts(
        self, state: Any, x: Tensor, comm: Communicator, origin: Origin = PLAIN
    ) -> Iterator[Callable[[slice, Tensor], object]]:
        """Make one step with the gradient in parts: give (columns, grad), grad (local, columns).

        Every column of x is given once; in which order is all the same, and in which parts where
        the rule is elementwise.

        Raises:
            ConfigError: as ``require_parts`` does.
        """
        self.require_parts(origin)
        d, part = x.shape[1], None

        def update(columns: slice, grad: Tensor) -> None:
            nonlocal part
            part = self.part(state, d, columns)
            self._columns = columns
            self.update_(part, x[:, columns], grad, comm, origin)

        try:
            yield update
        finally:
            self._columns = slice(0, None)
        if part is not None:
            self.adopt(state, part, d)

    def part(self, state: Any, d: int, columns: slice) -> Any:
        """Return the state of some columns of rows (local, d): views of what lies there.

        Raises:
            ConfigError: the rule needs more of a gradient than a part.
        """
        return part_of(state, d, columns.start, columns.stop)

    def adopt(self, state: Any, part: Any, d: int) -> None:
        """Take over from the last ``part`` what all parts of a step move alike."""
        adopt(state, part, d)
