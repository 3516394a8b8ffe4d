"""Losses of a module beside a row of parameters that stays as it is."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gossamer.algorithms.oracles.vectorized import Stateless
from gossamer.algorithms.problems import Loss, Problem
from gossamer.algorithms.zeroth_order.prefix import PrefixCache
from gossamer.algorithms.zeroth_order.probes import Along
from gossamer.algorithms.zeroth_order.transient import TransientModule
from gossamer.runtime import ConfigError, RowLayout, row_dot
from gossamer.runtime.native import Piece
from gossamer.runtime.perturb import Distribution, Mask, add_, perturb_

__all__ = ["Directed", "LossesBeside", "Restore"]

log = logging.getLogger("gossamer")

Restore = Literal["auto", "transient", "snapshot"]
Inputs = tuple[Tensor, ...]
_Z = tuple[int, int, int, float, Distribution, Mask | None]
"""Seed, step, number, factor, elements and mask of a z."""

_CHECKED = 8
"""Examples with which the losses of moved and of written parameters are compared."""
_DISPLACED = 0.05
"""How far parameters move to see which layers a block does not reach."""
_SMALL = 2**18
"""Elements of a row that is copied for each loss, where nothing else is asked for."""
_COLUMNS = 2**18
"""Columns of a z that are made at once."""


class Directed(NamedTuple):
    """What makes the z of a run."""

    seed: int
    elements: Distribution
    mask: Mask | None

    def at(self, along: Along, scale: float) -> _Z:
        """Return what makes ``scale`` times one direction."""
        return (self.seed, along.step, along.number, scale, self.elements, self.mask)


class LossesBeside:
    """Takes losses at x + scale z, and derivatives along z.

    Attributes:
        transient: moves parameters while their layers compute; None: a moved copy of the row is
            what the module computes with.
        prefix: skips the layers before a block; None where there are no blocks.
    """

    def __init__(
        self,
        problem: Problem,
        layout: RowLayout,
        directed: Directed,
        loss: Callable[[Inputs], float],
        restore: Restore,
        further: Loss | None = None,
    ) -> None:
        """See how parameters can be moved.

        Args:
            problem: the module, and the loss that is taken.
            layout: of the module's row.
            directed: makes the z.
            loss: of the bound module, without a graph.
            restore: as the oracle's field.
            further: another loss that must see parameters move.

        Raises:
            ConfigError: ``transient``, but the loss takes parameters past their layers.
        """
        self._problem, self._layout, self._loss = problem, layout, loss
        self._directed = directed
        self.prefix: PrefixCache | None = None
        self.transient: TransientModule | None = None
        if restore == "transient" or (restore == "auto" and layout.d > _SMALL):
            self.transient = self._find_transient(restore, [problem.loss, further or problem.loss])
        if self.transient is None:
            self._copy = torch.empty(layout.d, dtype=layout.dtype, device=self._device)

    @property
    def _device(self) -> torch.device:
        return next(self._problem.module.parameters()).device

    def _inputs(self, count: int) -> Inputs:
        return tuple(t.to(self._device) for t in self._problem.examples(count))

    def _find_transient(self, restore: Restore, losses: Sequence[Loss]) -> TransientModule | None:
        """Return what moves the parameters; None where it would miss some."""
        module, inputs = self._problem.module, self._inputs(_CHECKED)
        found = TransientModule(module, self._layout)
        if all(found.follows(partial(_value, loss, module, inputs)) for loss in set(losses)):
            return found
        if restore == "transient":
            raise ConfigError(
                "oracle.restore: the loss takes parameters past the forward of their layers (a "
                "penalty, or weights of another layer), so transient would miss them; use snapshot"
            )
        log.info("zeroth order: the loss takes parameters past their layers, so rows are copied")
        return None

    def skip_before(self, blocks: Sequence[frozenset[int]], examples: int | None) -> None:
        """From now on, do not run the layers before a block again for its further losses.

        Args:
            blocks: of tensors.
            examples: of a forward pass, at most.
        """
        loss = partial(self._loss, self._inputs(min(_CHECKED, examples or _CHECKED)))
        module = self._problem.module
        self.prefix = PrefixCache(module, self._layout, blocks, loss, self._displaced)

    @contextlib.contextmanager
    def _displaced(self, block: frozenset[int]) -> Iterator[None]:
        """While inside, compute with all parameters moved; those of the block along another z."""

        def shift(flat: Tensor, pieces: list[Piece], source: Tensor) -> None:
            for other in (False, True):
                chosen = [piece for piece in pieces if (piece.tensor in block) == other]
                add_(flat, chosen, 0, 0, int(other), _DISPLACED, source=source)

        if self.transient is not None:
            with self.transient.moved(shift):
                yield
            return
        module, layout, row = self._problem.module, self._layout, self._copy
        bound = [(p, p.data, p.grad) for p in layout.parameters(module)]
        layout.gather(module, row)
        others = {s.tensor for s in layout.slices} - block
        perturb_(row, layout, 0, 0, 0, _DISPLACED, tensors=others)
        perturb_(row, layout, 0, 0, 1, _DISPLACED, tensors=block)
        layout.bind(module, row)
        try:
            yield
        finally:
            for p, data, grad in bound:
                p.data, p.grad = data, grad

    def forget(self) -> None:
        """Forget what layers gave: the batch is another, or all parameters have moved."""
        if self.prefix is not None:
            self.prefix.clear()

    def base(self, row: Tensor) -> Tensor:
        """Return what the module is to be bound to for losses beside a row: it, or a copy."""
        return row if self.transient is not None else self._copy.copy_(row)

    def loss(
        self, row: Tensor, place: tuple[int, int], inputs: Inputs, along: Along, scale: float
    ) -> float:
        """Return the loss at ``row + scale z``; the module is bound to the row's ``base``.

        Args:
            row: (d,), kept.
            place: tells rows apart whose losses are taken in turn.
            inputs: the batch.
            along: which z.
            scale: its factor.
        """
        z, tensors = self._directed.at(along, scale), along.tensors
        with contextlib.ExitStack() as stack:
            if self.prefix is not None and tensors is not None:
                stack.enter_context(self.prefix.before(tensors, place))
            if self.transient is not None:
                stack.enter_context(self.transient.moved(partial(_move, z), tensors))
            else:
                perturb_(self._copy.copy_(row), self._layout, *z, tensors=tensors)
            return self._loss(inputs)

    def derivative(self, row: Tensor, inputs: Inputs, along: Along) -> tuple[float, float]:
        """Return <grad L, z> and L at a row (d,), by forward mode."""
        layout, problem = self._layout, self._problem
        z = self._directed.at(along, 1.0)
        tangent = perturb_(torch.zeros_like(row), layout, *z, tensors=along.tensors)
        names = [s.name for s in layout.slices]
        values, tangents = (
            dict(zip(names, layout.views(vector), strict=True)) for vector in (row, tangent)
        )

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return problem.loss(Stateless(problem.module, parameters), inputs)

        # The fused kernels of attention have no forward-mode derivative.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            value, slope = torch.func.jvp(loss, (values,), (tangents,))[:2]
        return slope.double().item(), value.double().item()

    def length(self, along: Along) -> float:
        """Return what makes z as long as sqrt(d): a pass over it."""
        layout, square = self._layout, 0.0
        for begin in range(0, layout.d, _COLUMNS):
            part = torch.zeros(1, min(_COLUMNS, layout.d - begin), device=self._device)
            z = self._directed.at(along, 1.0)[:4]
            perturb_(part[0], layout, *z, begin=begin, tensors=along.tensors)
            square += row_dot(part, part).item()
        chosen = (s for s in layout.slices if along.tensors is None or s.tensor in along.tensors)
        return float((sum(s.shape.numel() for s in chosen) / square) ** 0.5)


def _move(z: _Z, flat: Tensor, pieces: list[Piece], source: Tensor) -> None:
    add_(flat, pieces, *z, source=source)


def _value(loss: Loss, module: nn.Module, inputs: Inputs) -> float:
    return loss(module, inputs).double().item()
