"""Estimates of which some tensors have a gradient by backpropagation, the others by losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gossamer.algorithms.estimates import Directions
from gossamer.algorithms.problems import Loss
from gossamer.algorithms.zeroth_order.probes import Probes
from gossamer.runtime import Communicator, ConfigError, RowLayout, combine
from gossamer.runtime.errors import nearest
from gossamer.runtime.rows import Slice, empty_rows

__all__ = ["FirstOrderPart", "Hybrid"]


class FirstOrderPart:
    """The tensors that backpropagation serves.

    Attributes:
        others: ids of all other tensors.
        width: elements of a row of theirs, padding included.
    """

    def __init__(self, module: nn.Module, layout: RowLayout, names: Sequence[str]) -> None:
        """Choose the tensors whose name, or the name of a module around them, is one of ``names``.

        Raises:
            ConfigError: a name is of nothing, or no tensor is left to the losses.
        """
        for name in names:
            known = {".".join(s.name.split(".")[:k]) for s in layout.slices for k in range(1, 20)}
            if name not in known:
                raise ConfigError(
                    f"oracle.first_order: the model has no parameter or module '{name}'"
                    f"{nearest(name, known)}"
                )
        self._module, self._layout = module, layout
        self._slices = [s for s in layout.slices if _is_below(s.name, names)]
        self.others = frozenset(s.tensor for s in layout.slices if s not in self._slices)
        if not self.others:
            raise ConfigError(
                "oracle.first_order: names all parameters, so that none is left to the losses; use "
                "oracle: backprop"
            )
        self.places: list[tuple[int, Slice]] = []
        self.width = 0
        for s in self._slices:
            self.places.append((self.width, s))
            self.width += s.end - s.begin

    def empty(self, local: int, device: torch.device) -> Tensor:
        """Return zeros for the gradients, (local, width)."""
        return empty_rows(local, self.width, self._layout.dtype, device)

    def gradient(self, loss: Loss, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        """Write the gradient of the module, as it is bound, into ``out`` (width,).

        Only what leads from these tensors to the loss is kept: the layers before them run without
        a graph.
        """
        with self._alone(), torch.enable_grad():
            parameters = dict(self._module.named_parameters())
            chosen = [parameters[s.name] for s in self._slices]
            found = torch.autograd.grad(loss(self._module, inputs), chosen, allow_unused=True)
        out.zero_()
        for (at, s), grad in zip(self.places, found, strict=True):
            if grad is not None:
                out[at : at + s.end - s.begin] = grad.reshape(-1)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        others = [
            p
            for p, s in zip(self._layout.parameters(self._module), self._layout.slices, strict=True)
            if s.tensor in self.others
        ]
        for p in others:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in others:
                p.requires_grad_(True)


@dataclass(frozen=True)
class Hybrid:
    """Directions of some tensors, and rows of the others.

    Attributes:
        probes: of the tensors that losses serve.
        part: of the others.
        rows: (local, part.width), their gradients.
    """

    probes: Probes
    part: FirstOrderPart
    rows: Tensor

    @property
    def has_room(self) -> bool:
        """No: a row is what they save."""
        return False

    def mean(self, comm: Communicator) -> Hybrid | None:
        """Return the mean over ranks: numbers for the directions, and the other tensors' rows."""
        rows = comm.all_reduce(self.rows, "mean")
        probes = self.probes.mean(comm)
        if probes is None:
            return None
        return replace(self, probes=probes, rows=rows.expand_as(self.rows))

    def add_to_(self, x: Tensor, scale: float) -> Tensor:
        """Add ``scale`` times the estimate to x (local, d)."""
        self.probes.add_to_(x, scale)
        for at, s in self.part.places:
            mine = x[:, s.begin : s.end]
            combine([(1.0, mine), (scale, self.rows[:, at : at + s.end - s.begin])], out=mine)
        return x

    def dense(self) -> Tensor:
        """Return the estimate as rows (local, d)."""
        return self._overlaid(self.probes.dense(), 0)

    def columns(self, begin: int, end: int) -> Tensor:
        """Return columns begin..end of ``dense``."""
        return self._overlaid(self.probes.columns(begin, end), begin)

    def _overlaid(self, out: Tensor, begin: int) -> Tensor:
        end = begin + out.shape[1]
        for at, s in self.part.places:
            first, last = max(s.begin, begin), min(s.end, end)
            if first < last:
                found = self.rows[:, at + first - s.begin : at + last - s.begin]
                out[:, first - begin : last - begin] = found
        return out


_: type[Directions] = Hybrid


def _is_below(name: str, parts: Sequence[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)
