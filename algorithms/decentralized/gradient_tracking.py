"""Gradient tracking: DSGT and DIGing (arXiv:1805.11454, arXiv:1607.03218), adapt first or last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from gossamer.algorithms.estimates import Metrics
from gossamer.algorithms.problems import Batches
from gossamer.algorithms.protocols import Algorithm, Optimizer, Oracle
from gossamer.runtime import Communicator, Work, combine

__all__ = ["GradientTracking", "GradientTrackingState", "previous_round"]


@dataclass
class GradientTrackingState:
    """The row [x | y] and the last gradient.

    Attributes:
        row: (local, 2 d).
        g_old: (local, d), the last gradient, on its own examples.
        optimizer: the optimizer's own state.
        k: steps since the tracker began.
    """

    row: Tensor
    g_old: Tensor
    optimizer: Any
    k: int = 0

    @property
    def x(self) -> Tensor:
        """The parameters, a view."""
        return self.row[:, : self.g_old.shape[1]]

    @property
    def y(self) -> Tensor:
        """The tracked gradient, a view; its mean over ranks is that of the gradients."""
        return self.row[:, self.g_old.shape[1] :]


class GradientTracking(Algorithm):
    """Gradient tracking: y_i follows the mean gradient, so different data leave no bias.

    With g the gradient at x on this step's examples, and g_old the stored one of the step before::

        atc: y = W(y + g - g_old)  (y = g at first);  x = W(x - lr y)    two messages of d
        cta: y = W y + g - g_old;                     x = W x - lr y     one of 2 d, overlapped

    mean(y) = mean(g) always. W must be doubly stochastic, and may change over time: y is then
    mixed by the W of the step before, which gives the iterates of the published form (y updated
    after x, with the same W). ``atc`` is the stabler: with lambda_min(W) well below 0 ``cta`` needs
    a smaller rate or a lazy W. The optimizer gets y in place of the gradient; with
    ``optimizer: momentum`` this is DSGT with local momentum.
    """

    sends: ClassVar[str] = "its parameters and its tracked gradient"
    name: Literal["gradient-tracking"] = "gradient-tracking"
    order: Literal["atc", "cta"] = "atc"
    """Which comes first: adapt (the local step) or combine (the average)."""
    optimizer: Optimizer = Field(exclude=True)
    """The local update; any optimizer, fed with y."""

    def init(
        self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches
    ) -> GradientTrackingState:
        """Start at x with y = g_old = 0."""
        d = x.shape[1]
        row = comm.alloc(2 * d, x.dtype)
        row[:, :d] = x
        return GradientTrackingState(row, torch.zeros_like(x), self.optimizer.init(row[:, :d]))

    def step(
        self, comm: Communicator, oracle: Oracle, state: GradientTrackingState, batches: Batches
    ) -> Metrics:
        """One gradient, 2 d elements to each neighbour."""
        x, y, g_old = state.x, state.y, state.g_old
        if self.order == "atc":
            estimate = oracle(x, batches[0])
            combine([(1.0, y), (1.0, estimate.grad), (-1.0, g_old)], out=y)
            if state.k > 0:
                with previous_round(comm):
                    comm.neighbor_average(y, out=y)
            self.optimizer.update_(state.optimizer, x, y, comm)
            comm.neighbor_average(x, out=x)
        else:
            mixed, mixing = _average_async(comm, state)
            estimate = oracle(x, batches[0])  # while x and y travel
            for work in mixing:
                work.wait()
            wx, wy = mixed[:, : x.shape[1]], mixed[:, x.shape[1] :]
            combine([(1.0, wy), (1.0, estimate.grad), (-1.0, g_old)], out=y)
            direction = self.optimizer.direction(state.optimizer, x, y, comm)
            combine([(1.0, wx), (-self.optimizer.rate(comm), direction)], out=x)
        g_old.copy_(estimate.grad)
        state.k += 1
        return {"loss": estimate.loss, **estimate.metrics}


def _average_async(
    comm: Communicator, state: GradientTrackingState
) -> tuple[Tensor, list[Work[Tensor]]]:
    """Start W [x | y]: one message, or two where x and y need the W of different rounds."""
    mixed = comm.alloc(state.row.shape[1], state.row.dtype)
    if comm.topology.is_static:
        return mixed, [comm.neighbor_average_async(state.row, out=mixed)]
    d = state.g_old.shape[1]
    wx, wy = mixed[:, :d], mixed[:, d:]
    works = [comm.neighbor_average_async(state.x, out=wx)]
    with previous_round(comm):
        works.append(comm.neighbor_average_async(state.y, out=wy))
    return mixed, works


@contextmanager
def previous_round(comm: Communicator) -> Iterator[None]:
    """Look back at the W of the step before, for what is called inside; nothing if W is fixed."""
    t = comm.round
    comm.round = t if comm.topology.is_static else max(0, t - 1)
    try:
        yield
    finally:
        comm.round = t
