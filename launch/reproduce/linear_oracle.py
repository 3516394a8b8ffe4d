"""The gradients of a linear classifier in closed form, for all hosted ranks at once.

An oracle of one's own, named in the configuration by ``module:Class``. It gives what ``backprop``
gives, to rounding, in a fraction of the time: on problems this small autograd's bookkeeping is
most of a step, and the theory's experiments take many steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from gossamer.algorithms.estimates import Estimate, Sink
from gossamer.algorithms.problems import DataPlan, Problem, RankBatches
from gossamer.algorithms.protocols import Oracle
from gossamer.algorithms.tasks.objectives import ClassificationLoss
from gossamer.runtime import Communicator, ConfigError, RowLayout

__all__ = ["LinearLogistic"]

# L local ranks, B batch, D row: elements of a row, padding included


class LinearLogistic(Oracle):
    """Mean of log(1 + exp(-b a.x)) over a batch, plus the task's penalties: by hand.

    For tasks with ``model: linear`` and ``positive``.
    """

    name: Literal["linear-logistic"] = "linear-logistic"
    batch_size: int = Field(default=4, ge=1)
    """Examples per rank and gradient."""
    sampling: Literal["shuffle", "replacement", "full"] = "replacement"
    """``replacement``: independent draws; ``shuffle``: epochs; ``full``: the whole shard."""

    _layout: RowLayout = PrivateAttr()
    _loss: ClassificationLoss = PrivateAttr()
    _batch: tuple[RankBatches, Tensor] | None = PrivateAttr(default=None)

    def setup(self, comm: Communicator, problem: Problem) -> DataPlan:
        """Check that the problem is of this form."""
        loss = problem.loss
        linear = [m for m in problem.module.modules() if isinstance(m, nn.Linear)]
        fits = len(linear) == 1 and linear[0].out_features == 1 and linear[0].bias is not None
        if not (fits and isinstance(loss, ClassificationLoss)):
            raise ConfigError(
                "oracle.name: linear-logistic needs a task with model: linear and positive: "
                "CLASS; use backprop"
            )
        self._layout, self._loss = RowLayout(problem.module), loss
        return DataPlan(batch_size=self.batch_size, sampling=self.sampling)

    @property
    def layout(self) -> RowLayout:
        """How weight and bias lie in a row."""
        return self._layout

    def __call__(
        self,
        x: Tensor,
        batch: RankBatches,
        *,
        combine: Sequence[tuple[float, Tensor]] | None = None,
        sink: Sink | None = None,
    ) -> Estimate:
        """Return the mean gradient over each rank's batch."""
        assert sink is None, "linear-logistic: a row is as short as a slice"
        weight = torch.tensor([float(len(b)) for b in batch], dtype=torch.float64)
        margins = self._margins(x, batch)
        if combine is None:
            grad = self._gradient(x, margins, batch)
        else:
            points = ((c, point, self._margins(point, batch)) for c, point in combine)
            terms = [c * self._gradient(point, m, batch) for c, point, m in points]
            grad = sum(terms[1:], start=terms[0])
        return Estimate(loss=self._losses(x, margins), grad=grad, weight=weight)

    def loss(self, x: Tensor, batch: RankBatches) -> Tensor:
        """Return the losses at x, (local,) float64."""
        return self._losses(x, self._margins(x, batch))

    def _losses(self, x: Tensor, margins: Tensor) -> Tensor:
        square = x.square()
        penalties = self._loss.l2 * square + self._loss.nonconvex * square / (1 + square)
        losses = -nn.functional.logsigmoid(margins).mean(dim=1) + penalties.sum(dim=1)
        return losses.double()

    def _gradient(self, x: Tensor, margins: Tensor, batch: RankBatches) -> Tensor:
        slopes = torch.sigmoid(-margins) / -margins.shape[1]
        grad = torch.bmm(slopes[:, None, :], self._laid_out(batch))[:, 0]
        penalty = 2 * self._loss.l2 + 2 * self._loss.nonconvex / (1 + x.square()).square()
        return grad.addcmul_(penalty, x)

    def _margins(self, x: Tensor, batch: RankBatches) -> Tensor:
        """Return b a.x, (local, B)."""
        return torch.bmm(self._laid_out(batch), x[:, :, None])[..., 0]

    def _laid_out(self, batch: RankBatches) -> Tensor:
        """Return b a laid out as a row is, (local, B, d)."""
        if self._batch is None or self._batch[0] is not batch:
            self._batch = (batch, self._signed(batch))
        return self._batch[1]

    def _signed(self, batch: RankBatches) -> Tensor:
        features = torch.stack([b.inputs[0] for b in batch])
        labels = torch.stack([b.inputs[1] for b in batch])[..., None]
        weight, bias = self._layout.slices
        rows = features.new_zeros(*features.shape[:2], self._layout.d)
        rows[..., weight.begin : weight.end] = features * labels
        rows[..., bias.begin : bias.end] = labels
        return rows
