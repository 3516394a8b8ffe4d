"""``backprop``: gradients of any torch module by autograd, one hosted rank after the other.

The module exists once per process. Its parameters become views of the row at hand and their
gradients views of a gradient row, so that a round is one message and nothing is copied. With a
``sink`` there is no such row: each gradient is handed on and freed while backward goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from gossamer.algorithms.estimates import Clip, Estimate, Sink
from gossamer.algorithms.oracles.module_oracle import ModuleOracle, chunks_of
from gossamer.algorithms.oracles.per_sample import PerSampleGradients
from gossamer.algorithms.oracles.streaming import completion_order, streamed
from gossamer.algorithms.problems import DataPlan, Problem, RankBatches
from gossamer.runtime import Communicator, ConfigError, RanksDiffer, combine
from gossamer.runtime.random import derive_key
from gossamer.runtime.rows import empty_rows

__all__ = ["Backprop"]


class Backprop(ModuleOracle):
    """The mean gradient over a mini-batch, by backpropagation."""

    name: Literal["backprop"] = "backprop"
    vectorize: bool = False
    """All hosted ranks in one torch.func pass: faster for many small ranks, equal to rounding."""

    _row: Tensor | None = PrivateAttr(default=None)
    _order: list[int] | None = PrivateAttr(default=None)
    """Of the gradients that a sink gets, found when the first one asks."""
    _per_sample: PerSampleGradients | None = PrivateAttr(default=None)

    def setup(self, comm: Communicator, problem: Problem) -> DataPlan:
        """Lay out the module; the row for its gradients is made when one is first asked for."""
        plan = super().setup(comm, problem)
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

    @property
    def keeps_whole(self) -> str | None:
        """Why it takes no sink: ``vectorize`` makes all gradients at once."""
        return "vectorize makes the gradients of all parameters at once" if self.vectorize else None

    def __call__(
        self,
        x: Tensor,
        batch: RankBatches,
        *,
        combine: Sequence[tuple[float, Tensor]] | None = None,
        sink: Sink | None = None,
    ) -> Estimate:
        """Return the mean gradient over each rank's batch; the gradient row is reused.

        With a ``sink``, where every process hosts one rank, no gradient row exists: the sink gets
        each parameter's gradient, (1, size), as soon as backward has it, and it is freed after
        that. It keeps the gradient as it is, which may share memory with another, and may change
        the parameters at ``x`` in those columns. The order is the same on all ranks, whatever their
        batches; parameters without a gradient give zeros, at last. Micro-batches but the last add
        their gradients up first: a whole gradient then lives until the last backward pass, which
        frees it part by part. Where a process hosts several ranks, or with ``combine``, the row is
        made as ever, and cut. ``grad`` of the result is None.

        Raises:
            RanksDiffer: the processes' modules complete their gradients in different orders.
        """
        draw, batch = self._next_draw(), self._moved(batch)
        weight = self._weights(batch)
        factors = self._factors(batch, weight)
        if sink is not None and combine is None and self._streams:
            losses = self._streamed(x, batch, sink, factors, draw)
            return Estimate(loss=losses, grad=None, weight=weight)
        if combine is not None:
            losses = self._combined(x, batch, combine, draw)
        else:
            losses = self._gradients(x, batch, self._grad, draw)
        _scaled(self._grad, factors, out=self._grad)
        estimate = Estimate(loss=losses, grad=self._grad, weight=weight)
        if sink is not None:
            for s in self._layout.slices:
                sink(slice(s.begin, s.end), self._grad[:, s.begin : s.end])
            estimate.grad = None
        return estimate

    def require_clipped(self) -> None:
        """Look at the module; once."""
        if self.vectorize:
            raise ConfigError("oracle.vectorize: gradients of single examples need it false")
        if self._per_sample is None:
            self._per_sample = PerSampleGradients(self._problem, self._layout)
            # Sums have no noise yet: they stay out of memory that peers can read.
            layout, comm = self._layout, self._comm
            self._row = empty_rows(comm.local, layout.d, layout.dtype, comm.device)

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

    @property
    def _grad(self) -> Tensor:
        """The row for gradients, (local, d); every process asks for it at the same point."""
        if self._row is None:
            self._row = self._comm.alloc(self._layout.d, self._layout.dtype)
        return self._row

    @property
    def _streams(self) -> bool:
        """Whether gradients go to a sink as backward makes them; the same on every process."""
        return self._comm.n == self._comm.transport.processes and not self.vectorize

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
        draw: int,
    ) -> Tensor:
        """Write the combination over ``points`` into the row; return the losses at x."""
        grads, losses = [], None
        for _, point in points:
            grad = torch.zeros_like(self._grad)
            found = self._gradients(point, batch, grad, draw)
            losses = found if point is x else losses
            grads.append(grad)
        terms = [(c, grad) for (c, _), grad in zip(points, grads, strict=True)]
        combine(terms, out=self._grad)
        return self.loss(x, batch) if losses is None else losses

    def _gradients(self, x: Tensor, batch: RankBatches, grad: Tensor, draw: int) -> Tensor:
        """Write the gradients at x into ``grad``; return the losses (local,) float64."""
        if self.vectorize:
            from gossamer.algorithms.oracles.vectorized import vectorized_gradients

            self._seed_dropout(self._comm.ranks.start, draw)
            with self._cast():
                losses = vectorized_gradients(self._problem, self._layout, x, batch, grad)
            if self._problem.uneven:
                nothing = self._weights(batch) == 0
                losses[nothing], grad[nothing] = 0.0, 0.0  # means over no token are nan
            return losses
        grad.zero_()
        losses = torch.empty(len(batch), dtype=torch.float64)
        for i, (rank, examples) in enumerate(zip(self._comm.ranks, batch, strict=True)):
            self._seed_dropout(rank, draw)
            losses[i] = self._backward(x[i], grad[i], i, examples.inputs)
        return losses

    def _backward(
        self,
        row: Tensor,
        grad: Tensor | None,
        i: int,
        inputs: tuple[Tensor, ...],
        last: AbstractContextManager[object] | None = None,
    ) -> Tensor:
        """Add the gradients at ``row`` to the module's; ``last`` is around the last pass."""
        module = self._module_at(row, i, grad)
        chunks = self._weighed_chunks(inputs)
        if grad is None and len(chunks) > 1:
            # autograd would take over the first pass's, of which two may be views of one memory
            # (of a.view(-1) + b.view(-1), say): the next pass would add to it twice.
            for parameter in self._layout.parameters(module):
                parameter.grad = torch.zeros_like(parameter)
        loss_sum = torch.zeros((), dtype=torch.float64)
        for chunk, share in chunks[:-1]:
            loss_sum += self._pass_back(module, chunk, share)
        with last or nullcontext():
            for chunk, share in chunks[-1:]:  # none, if nothing in the batch has a weight
                loss_sum += self._pass_back(module, chunk, share)
        return loss_sum

    def _pass_back(self, module: nn.Module, chunk: tuple[Tensor, ...], share: float) -> Tensor:
        """Go forward and back; return the chunk's part of the loss, (), float64."""
        with self._cast():
            loss = self._problem.loss(module, chunk)
        (loss * share if share != 1.0 else loss).backward()
        return loss.detach().double().cpu() * share

    def _streamed(
        self, x: Tensor, batch: RankBatches, sink: Sink, factors: Tensor | None, draw: int
    ) -> Tensor:
        """Hand the gradients at x (1, d) to the sink; return the loss, (1,) float64."""
        if self._order is None:
            self._order = self._find_order(x)

        def take(columns: slice, grad: Tensor) -> None:
            sink(columns, _scaled(grad, factors))  # not in place: others may share its memory

        module = self._problem.module
        self._seed_dropout(self._comm.ranks.start, draw)
        last = streamed(self._layout, module, self._order, take)
        return self._backward(x[0], None, 0, batch[0].inputs, last).reshape(1)

    def _find_order(self, x: Tensor) -> list[int]:
        """Return the order of the gradients, from a pass over two examples: all ranks' the same.

        Not over a batch: a rank's may be empty, or miss what others reach (a rare expert).
        """
        module, comm = self._module_at(x[0], 0), self._comm
        kept = {name: rows.clone() for name, rows in self.state_dict().items()}
        inputs = tuple(t.to(comm.device) for t in self._problem.examples(2))
        one_pass = partial(self._pass_back, module, inputs, 1.0)
        order = completion_order(self._layout, module, one_pass)
        self.load_state_dict(kept)  # running statistics have not seen these examples
        if not comm.same(derive_key(0, str(order)) >> 1):
            raise RanksDiffer(
                f"gradients (step {comm.step}): the processes' modules complete them in different "
                "orders, so that they cannot be averaged one by one; build the same module on "
                "every rank, or use per_layer: false"
            )
        return order


def _scaled(grad: Tensor, factors: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Make the mean over ranks that of f: multiply rows (local, m) by ``factors``, (local, 1)."""
    return grad if factors is None else combine([(factors, grad)], out=out)
