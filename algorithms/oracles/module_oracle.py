"""What oracles of a torch module have in common: its layout, its batches, its losses.

The module exists once per process; its parameters become views of the row at hand.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from gossamer.algorithms.oracles.buffers import BufferRows
from gossamer.algorithms.problems import DataPlan, Problem, RankBatches
from gossamer.algorithms.protocols import Oracle
from gossamer.runtime import Communicator, ConfigError, RowLayout

__all__ = ["ModuleOracle", "chunks_of"]


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
    """f is the mean of f_i over ranks, or over examples (unequal shards count by their size);
    auto: the task's and algorithm's own choice."""

    _comm: Communicator = PrivateAttr()
    _problem: Problem = PrivateAttr()
    _layout: RowLayout = PrivateAttr()
    _buffers: BufferRows = PrivateAttr()
    _weighting: Literal["ranks", "examples"] = PrivateAttr(default="ranks")
    _factors: Tensor | None = PrivateAttr(default=None)
    """n N_i / N per hosted rank, (local, 1) float64, where f is a mean over examples of unequal
    shards: makes the mean over ranks of their gradients that of f."""
    _calls: tuple[int, int] = PrivateAttr(default=(-1, 0))

    def setup(self, comm: Communicator, problem: Problem) -> DataPlan:
        """Lay out the module and give each hosted rank its own buffers."""
        self._comm, self._problem = comm, problem
        problem.module.to(comm.device)
        self._layout = RowLayout(problem.module)
        self._buffers = BufferRows(problem.module, comm.local)
        self._weighting = problem.objective if self.objective == "auto" else self.objective
        self._factors = _factors(problem, comm) if self._weighting == "examples" else None
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
        """The micro-batch's size, where one is given."""
        return self.micro_batch_size

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
        """Return the loss of the module as it is bound, without a graph; 0 without examples."""
        chunks = chunks_of(inputs, self.micro_batch_size) if len(inputs[0]) else []
        total, losses = self._problem.weigh(inputs) if len(chunks) > 1 else 1.0, 0.0
        for chunk in chunks:
            with torch.no_grad(), self._cast():
                loss = self._problem.loss(self._problem.module, chunk)
            share = self._problem.weigh(chunk) / total if len(chunks) > 1 else 1.0
            losses += loss.double().item() * share
        return losses

    def _cast(self) -> torch.autocast:
        enabled = self.autocast == "bfloat16"
        return torch.autocast(self._comm.device.type, torch.bfloat16, enabled=enabled)

    def _weights(self, batch: RankBatches) -> Tensor:
        return torch.tensor([self._problem.weigh(b.inputs) for b in batch], dtype=torch.float64)


def chunks_of(inputs: tuple[Tensor, ...], size: int | None) -> list[tuple[Tensor, ...]]:
    """Return the inputs in parts of at most ``size`` examples; None: in one."""
    if size is None or len(inputs[0]) <= size:
        return [inputs]
    return list(zip(*(tensor.split(size) for tensor in inputs), strict=True))


def _factors(problem: Problem, comm: Communicator) -> Tensor | None:
    """Return n N_i / N per hosted rank, (local, 1); None where all are 1.

    Every process knows all shards, so nothing is sent. Examples count alike: tasks of tokens cut
    them to one length.
    """
    sizes = [len(shard) for shard in problem.shards]
    if len(set(sizes)) <= 1:
        return None
    share = [[comm.n * sizes[rank] / sum(sizes)] for rank in comm.ranks]
    return torch.tensor(share, dtype=torch.float64)
