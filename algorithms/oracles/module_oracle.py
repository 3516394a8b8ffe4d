"""What oracles of a torch module have in common: its layout, its batches, its losses.

The module exists once per process; its parameters become views of the row at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from gossamer.algorithms.oracles.buffers import BufferRows
from gossamer.algorithms.problems import DataPlan, Problem, RankBatches
from gossamer.algorithms.protocols import Oracle
from gossamer.runtime import Communicator, ConfigError, RowLayout
from gossamer.runtime.random import Random

__all__ = ["ModuleOracle", "chunks_of"]

_TOKENS_AT_ONCE = 2048


class ModuleOracle(Oracle):
    """An oracle of the task's module, on mini-batches."""

    batch_size: int = Field(default=32, ge=1)
    """Examples per rank and gradient."""
    sampling: Literal["shuffle", "replacement", "full"] = "shuffle"
    """``shuffle``: epochs; ``replacement``: independent draws; ``full``: the whole shard."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Examples per forward pass, to bound memory; None: the whole batch at once."""
    autocast: Literal["none", "bfloat16"] = "none"
    """Compute the forward pass in bfloat16 where torch deems it safe; rows stay as they are."""
    objective: Literal["auto", "ranks", "examples"] = "auto"
    """f is the mean of f_i over ranks, or over examples (unequal shards count by their size); auto:
    the task's and algorithm's own choice. Over examples, where a task's batches of one size differ
    in tokens, ranks are weighed by those of each batch: a number that all exchange per gradient."""

    compares: ClassVar[bool] = False
    """Whether it makes gradients of comparisons between examples, not of losses of single ones."""

    _comm: Communicator = PrivateAttr()
    _problem: Problem = PrivateAttr()
    _layout: RowLayout = PrivateAttr()
    _buffers: BufferRows = PrivateAttr()
    _weighting: Literal["ranks", "examples"] = PrivateAttr(default="ranks")
    _shares: Tensor | None = PrivateAttr(default=None)
    """n N_i / N per hosted rank, (local, 1) float64, where f is a mean over examples of unequal
    shards: makes the mean over ranks of their gradients that of f. None: all are 1."""
    _calls: tuple[int, int] = PrivateAttr(default=(-1, 0))

    def setup(self, comm: Communicator, problem: Problem) -> DataPlan:
        """Lay out the module and give each hosted rank its own buffers."""
        if self.compares != (problem.contrast is not None):
            raise ConfigError(
                "oracle: contrastive needs a task that shows two views of its examples; use task: "
                "contrastive"
                if self.compares
                else f"oracle: {self.name} needs a loss of single "
                "examples, and those of this task are compared; use oracle: contrastive"
            )
        self._comm, self._problem = comm, problem
        problem.module.to(comm.device)
        self._layout = RowLayout(problem.module)
        self._buffers = BufferRows(problem.module, comm.local)
        self._weighting = problem.objective if self.objective == "auto" else self.objective
        self._shares = _shares(problem, comm) if self._weighting == "examples" else None
        if self.sampling == "full" and not problem.shards:
            raise ConfigError("oracle.sampling: a streaming task has no full batch; use 'shuffle'")
        return DataPlan(batch_size=self.batch_size, sampling=self.sampling)

    @property
    def layout(self) -> RowLayout:
        """How the module lies in a row."""
        return self._layout

    @property
    def weighting(self) -> Literal["ranks", "examples"]:
        """What the mean f of its gradients runs over."""
        return self._weighting

    @property
    def examples_at_once(self) -> int | None:
        """The micro-batch's size; of texts, whose logits take much memory, a batch's at least."""
        problem = self._problem
        of_tokens = problem.weigh is not Problem.weigh
        if self.micro_batch_size or not of_tokens:
            return self.micro_batch_size
        if getattr(problem.train, "pads_lookups", False):
            return self.batch_size
        # As many short texts as give the processor something to do.
        return max(self.batch_size, _TOKENS_AT_ONCE // problem.examples(1)[0].shape[1])

    @property
    def buffers(self) -> BufferRows:
        """The hosted ranks' buffers (running statistics)."""
        return self._buffers

    def loss(self, x: Tensor, batch: RankBatches) -> Tensor:
        """Return the losses at x, (local,) float64."""
        losses = torch.empty(len(batch), dtype=torch.float64)
        for i, examples in enumerate(self._moved(batch)):
            self._module_at(x[i], i)
            losses[i] = self._bound_loss(examples.inputs)
        return losses

    def state_dict(self) -> dict[str, Tensor]:
        """Return the buffers, one row per hosted rank."""
        return self._buffers.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the buffers back."""
        self._buffers.load_state_dict(state)

    # --- for the oracles ----------------------------------------------------------------------

    def _next_draw(self) -> int:
        """Count the calls within a step: they draw different numbers."""
        step, calls = self._calls
        calls = calls + 1 if step == self._comm.step else 0
        self._calls = (self._comm.step, calls)
        return calls

    def _moved(self, batch: RankBatches) -> RankBatches:
        """Return the batches where the module is: datasets stay on the CPU."""
        if self._comm.device.type == "cpu":
            return batch
        device = self._comm.device
        return [replace(b, inputs=tuple(t.to(device) for t in b.inputs)) for b in batch]

    def _module_at(self, row: Tensor, i: int, grad: Tensor | None = None) -> nn.Module:
        self._layout.bind(self._problem.module, row, grad)
        self._buffers.bind(i)
        return self._problem.module

    def _bound_loss(self, inputs: tuple[Tensor, ...]) -> float:
        """Return the loss of the module as it is bound, without a graph; 0 without a weight."""
        losses = 0.0
        for chunk, share in self._weighed_chunks(inputs):
            with torch.no_grad(), self._cast():
                loss = self._problem.loss(self._problem.module, chunk)
            losses += loss.double().item() * share
        return losses

    def _weighed_chunks(self, inputs: tuple[Tensor, ...]) -> list[tuple[tuple[Tensor, ...], float]]:
        """Return the micro-batches with their shares in the loss; none that has no weight."""
        if len(inputs[0]) == 0:
            return []  # an empty Poisson draw
        chunks = chunks_of(inputs, self.micro_batch_size)
        if len(chunks) == 1 and not self._problem.uneven:
            return [(inputs, 1.0)]
        weights = [self._problem.weigh(chunk) for chunk in chunks]
        total = self._problem.weigh(inputs)
        # The mean loss over no token is nan, which a share of 0 would not undo.
        return [(c, w / total) for c, w in zip(chunks, weights, strict=True) if w > 0]

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
        if self._comm.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _cast(self) -> torch.autocast:
        enabled = self.autocast == "bfloat16"
        return torch.autocast(self._comm.device.type, torch.bfloat16, enabled=enabled)

    def _weights(self, batch: RankBatches) -> Tensor:
        return torch.tensor([self._problem.weigh(b.inputs) for b in batch], dtype=torch.float64)

    def _factors(self, batch: RankBatches, weight: Tensor) -> Tensor | None:
        """Return what makes the mean over ranks of their gradients that of f; None: all are 1.

        Where batches are uneven, w_i tokens on rank i: n w_i / sum_j w_j, or with unequal shards
        n c_i w_i / sum_j c_j w_j with c_i = N_i / (examples in i's batch), for which each example
        stands. All are 0 where nobody has a token. One all-reduce of a number per rank, so that
        every process calls it alike, before any gradient of this call.

        Args:
            batch: the hosted ranks'.
            weight: (local,) float64, theirs.

        Returns:
            (local, 1) float64.
        """
        comm = self._comm
        if self._weighting == "ranks" or not self._problem.uneven or comm.n == 1:
            return self._shares
        weighed = weight[:, None].clone()
        if self._shares is not None:
            sizes = torch.tensor([[max(1, len(b))] for b in batch], dtype=torch.float64)
            weighed *= self._shares / sizes
        mean = comm.all_reduce(weighed.to(comm.device), "mean").cpu()
        return torch.where(mean > 0, weighed / mean, 0.0)


def chunks_of(inputs: tuple[Tensor, ...], size: int | None) -> list[tuple[Tensor, ...]]:
    """Return the inputs in parts of at most ``size`` examples; None: in one."""
    if size is None or len(inputs[0]) <= size:
        return [inputs]
    return list(zip(*(tensor.split(size) for tensor in inputs), strict=True))


def _shares(problem: Problem, comm: Communicator) -> Tensor | None:
    """Return n N_i / N per hosted rank, (local, 1); None where all are 1.

    Every process knows all shards, so nothing is sent.
    """
    sizes = [len(shard) for shard in problem.shards]
    if len(set(sizes)) <= 1:
        return None
    share = [[comm.n * sizes[rank] / sum(sizes)] for rank in comm.ranks]
    return torch.tensor(share, dtype=torch.float64)
