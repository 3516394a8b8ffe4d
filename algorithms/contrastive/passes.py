"""Embeddings whose gradient comes later: from other ranks, or after a look at all of them.

Where a process hosts one rank and a batch is one chunk, a pass keeps its graph. Otherwise a module
can hold only one rank's, or one chunk's, parameters and graph at a time: the pass is made without a
graph, and again with one when its gradient has come (arXiv:2101.06983). The numbers are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.algorithms.contrastive.contrast import Contrast
from gossamer.algorithms.oracles.module_oracle import chunks_of

__all__ = ["Passes"]

Inputs = tuple[Tensor, ...]

_LOOKS = 1 << 14
"""Passes without a gradient draw other dropout masks than those with one."""


@dataclass
class _Pass:
    """One call of the encoder.

    Attributes:
        row: whose parameters, a hosted row.
        number: of the pass among the row's: its dropout masks repeat.
        inputs: of the encoder.
        view: of ``Contrast.embed``.
        z: embeddings with their graph; None: the pass is made again.
    """

    row: int
    number: int
    inputs: Inputs
    view: int
    z: Tensor | None


class Passes:
    """The passes of one call of the oracle."""

    def __init__(
        self,
        contrast: Contrast,
        module_at: Callable[[int, Tensor | None], nn.Module],
        around: Callable[[int, int], AbstractContextManager[object]],
        *,
        chunk: int | None,
        keeps_graph: bool,
    ) -> None:
        """Get ready.

        Args:
            contrast: whose encoder.
            module_at: (hosted row, parameters) -> the module, bound to these, (d,), or where None
                to the row's, and to its gradient.
            around: (row, number of the pass) -> what is around it: dropout's seed, autocast.
            chunk: examples of one pass at most.
            keeps_graph: whether all passes are of one row, so that their graphs may live.
        """
        self._contrast, self._module_at, self._around = contrast, module_at, around
        self._chunk, self._keeps_graph = chunk, keeps_graph
        self._made: list[_Pass] = []

    def embed(self, row: int, inputs: Inputs, view: int = 0) -> tuple[Tensor, range]:
        """Return embeddings (B, dim) without a graph, and the passes that made them."""
        begin = len(self._made)
        chunks = chunks_of(inputs, self._chunk)
        rows = []
        for chunk in chunks:
            number = sum(p.row == row for p in self._made)
            made = _Pass(row, number, chunk, view, None)
            self._made.append(made)
            graph = self._keeps_graph and len(chunks) == 1
            z = self._run(made, graph)
            made.z = z if graph else None
            rows.append(z.detach())
        return torch.cat(rows), range(begin, len(self._made))

    def look(
        self, row: int, inputs: Inputs, view: int = 0, parameters: Tensor | None = None
    ) -> Tensor:
        """Return embeddings (B, dim) of which no gradient is to come.

        Args:
            row: a hosted row.
            inputs: of the encoder.
            view: of ``Contrast.embed``.
            parameters: (d,), to encode with instead of the row's.
        """
        rows = []
        for number, chunk in enumerate(chunks_of(inputs, self._chunk)):
            module = self._module_at(row, parameters)
            with torch.no_grad(), self._around(row, _LOOKS + number):
                rows.append(self._contrast.embed(module, chunk, view))
        if parameters is not None:
            self._module_at(row, None)  # graphs that live lead to the parameters of the row
        return torch.cat(rows)

    def backward(self, made: range, grad: Tensor) -> None:
        """Add to the row's gradient what ``grad`` (B, dim) of these passes' embeddings makes."""
        sizes = [len(self._made[k].inputs[0]) for k in made]
        for k, part in zip(made, grad.split(sizes), strict=True):
            one = self._made[k]
            z, one.z = (self._run(one, True) if one.z is None else one.z), None
            z.backward(part.to(z.dtype))

    def _run(self, one: _Pass, graph: bool) -> Tensor:
        module = self._module_at(one.row, None)
        with torch.set_grad_enabled(graph), self._around(one.row, one.number):
            return self._contrast.embed(module, one.inputs, one.view)
