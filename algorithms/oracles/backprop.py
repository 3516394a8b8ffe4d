"""``backprop``: gradients of any torch module by autograd, one hosted rank after the other.

The module exists once per process. Its parameters become views of the row at hand and their
gradients views of a gradient row, so that a round is one message and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor

from gossamer.algorithms.estimates import Clip, Estimate, Sink
from gossamer.algorithms.oracles.module_oracle import ModuleOracle, chunks_of
from gossamer.algorithms.oracles.per_sample import PerSampleGradients
from gossamer.algorithms.problems import DataPlan, Problem, RankBatches
from gossamer.runtime import Communicator, ConfigError, combine
from gossamer.runtime.random import Random
from gossamer.runtime.rows import empty_rows

__all__ = ["Backprop"]


class Backprop(ModuleOracle):
    """The mean gradient over a mini-batch, by backpropagation."""

    name: Literal["backprop"] = "backprop"
    vectorize: bool = False
    """All hosted ranks in one torch.func pass: faster for many small ranks, equal to rounding."""

    _grad: Tensor = PrivateAttr()
    _per_sample: PerSampleGradients | None = PrivateAttr(default=None)

    def setup(self, comm: Communicator, problem: Problem) -> DataPlan:
        """Lay out the module and a row for its gradients."""
        plan = super().setup(comm, problem)
        self._grad = comm.alloc(self._layout.d, self._layout.dtype)
        if self.vectorize and self.micro_batch_size:
            raise ConfigError("oracle.micro_batch_size: has no effect with vectorize; drop one")
        if self.vectorize and any(
            getattr(m, "track_running_stats", False) for m in problem.module.modules()
        ):
            raise ConfigError(
                "oracle.vectorize: the model keeps running statistics (BatchNorm), one set per "
                "rank; use GroupNorm or LayerNorm, or vectorize: false"
            )
        return plan

    def __call__(
        self,
        x: Tensor,
        batch: RankBatches,
        *,
        combine: Sequence[tuple[float, Tensor]] | None = None,
        sink: Sink | None = None,
    ) -> Estimate:
        """Return the mean gradient over each rank's batch; the gradient row is reused."""
        draw, batch = self._next_draw(), self._moved(batch)
        weight = self._weights(batch)
        if combine is not None:
            return self._combined(x, batch, combine, weight, draw)
        grad = self._grad
        losses = self._gradients(x, batch, grad, draw)
        self._scale(grad)
        if sink is not None:
            for s in self._layout.slices:
                sink(slice(s.begin, s.end), grad[:, s.begin : s.end])
        return Estimate(loss=losses, grad=grad, weight=weight)

    def require_clipped(self) -> None:
        """Look at the module; once."""
        if self.vectorize:
            raise ConfigError("oracle.vectorize: gradients of single examples need it false")
        if self._per_sample is None:
            self._per_sample = PerSampleGradients(self._problem, self._layout)
            # Sums have no noise yet: they stay out of memory that peers can read.
            layout, comm = self._layout, self._comm
            self._grad = empty_rows(comm.local, layout.d, layout.dtype, comm.device)

    def clipped(
        self,
        x: Tensor,
        batch: RankBatches,
        clip: Clip,
        *,
        combine: Sequence[tuple[float, Tensor]] | None = None,
        secret_of: Callable[[int], int] | None = None,
    ) -> Estimate:
        """Return each rank's sum of bounded gradients of single examples; the row is reused."""
        self.require_clipped()
        assert self._per_sample is not None
        draw, batch = self._next_draw(), self._moved(batch)
        grad, losses = self._sums(), torch.zeros(len(batch), dtype=torch.float64)
        for i, (rank, examples) in enumerate(zip(self._comm.ranks, batch, strict=True)):
            points = [(c, rows[i]) for c, rows in combine or [(1.0, x)]]
            chunks = chunks_of(examples.inputs, self.micro_batch_size) if len(examples) else []
            for k, chunk in enumerate(chunks):

                def bind(row: Tensor, i: int = i, rank: int = rank, k: int = k) -> None:
                    self._module_at(row, i)
                    self._seed_dropout(rank, draw, k, secret_of)

                loss = self._per_sample.add_clipped(points, chunk, clip, grad[i], bind, self._cast)
                losses[i] += loss.double().cpu() * (len(chunk[0]) / len(examples))
        counts = torch.tensor([len(b) for b in batch], dtype=torch.float64)
        return Estimate(loss=losses, grad=grad, weight=counts)

    # --- inside -----------------------------------------------------------------------------

    def _sums(self) -> Tensor:
        """Return zero rows for sums of bounded gradients, which half precision would round off."""
        if self._layout.dtype in (torch.float32, torch.float64):
            return self._grad.zero_()
        return torch.zeros(self._grad.shape, dtype=torch.float32, device=self._grad.device)

    def _combined(
        self,
        x: Tensor,
        batch: RankBatches,
        points: Sequence[tuple[float, Tensor]],
        weight: Tensor,
        draw: int,
    ) -> Estimate:
        grads, losses = [], None
        for _, point in points:
            grad = torch.zeros_like(self._grad)
            found = self._gradients(point, batch, grad, draw)
            losses = found if point is x else losses
            grads.append(grad)
        terms = [(c, grad) for (c, _), grad in zip(points, grads, strict=True)]
        total = combine(terms, out=self._grad)
        self._scale(total)
        losses = self.loss(x, batch) if losses is None else losses
        return Estimate(loss=losses, grad=total, weight=weight)

    def _gradients(self, x: Tensor, batch: RankBatches, grad: Tensor, draw: int) -> Tensor:
        """Write the gradients at x into ``grad``; return the losses (local,) float64."""
        if self.vectorize:
            from gossamer.algorithms.oracles.vectorized import vectorized_gradients

            self._seed_dropout(self._comm.ranks.start, draw)
            with self._cast():
                return vectorized_gradients(self._problem, self._layout, x, batch, grad)
        grad.zero_()
        losses = torch.empty(len(batch), dtype=torch.float64)
        for i, (rank, examples) in enumerate(zip(self._comm.ranks, batch, strict=True)):
            self._seed_dropout(rank, draw)
            losses[i] = self._backward(x[i], grad[i], i, examples.inputs)
        return losses

    def _seed_dropout(
        self,
        rank: int,
        draw: int,
        chunk: int = 0,
        secret_of: Callable[[int], int] | None = None,
    ) -> None:
        """Count the masks of dropout, which come from torch's generator, like any other stream."""
        draw = draw + (chunk << 16)  # a chunk of the batch repeats its masks at every point
        random = self._comm.seed if secret_of is None else Random(secret_of(rank))
        seed = random.stream("dropout", (rank,), self._comm.step, draw).seed()
        # Not torch.manual_seed: where no GPU was used yet it formats a stack (milliseconds).
        torch.default_generator.manual_seed(seed)
        if self._grad.is_cuda:
            torch.cuda.manual_seed(seed)

    def _backward(self, row: Tensor, grad: Tensor, i: int, inputs: tuple[Tensor, ...]) -> Tensor:
        module = self._module_at(row, i, grad)
        if len(inputs[0]) == 0:
            return torch.zeros((), dtype=torch.float64)  # an empty Poisson draw
        chunks = chunks_of(inputs, self.micro_batch_size)
        total = self._problem.weigh(inputs)
        loss_sum = torch.zeros((), dtype=torch.float64)
        for chunk in chunks:
            with self._cast():
                loss = self._problem.loss(module, chunk)
            share = 1.0 if len(chunks) == 1 else self._problem.weigh(chunk) / total
            (loss * share if share != 1.0 else loss).backward()
            loss_sum += loss.detach().double().cpu() * share
        return loss_sum

    def _scale(self, grad: Tensor) -> None:
        """Make the mean over ranks the objective's gradient when f is a mean over examples."""
        if self._factors is not None:
            combine([(self._factors, grad)], out=grad)
