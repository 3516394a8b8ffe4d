"""What a forward pass computes before the block whose losses are taken, kept for the next loss.

A block's directions move nothing before it, so the layers there give what they gave (block-wise
optimization, arXiv:2402.11592): of blocks taken in turn about half of all is saved, for the memory
of what two layers return, for each hosted rank.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from gossamer.algorithms.zeroth_order.blocks import is_layer
from gossamer.runtime import RowLayout

__all__ = ["PrefixCache"]

log = logging.getLogger("gossamer")

Block = frozenset[int]


class PrefixCache:
    """Skips layers whose output is known.

    Layers are the numbered parts of a model, where they run once in a forward pass, one after
    another. What is skipped for which block is found by watching a loss, and tried with all
    parameters moved: where the loss would not be the same to the bit, nothing is skipped.

    Attributes:
        skipped: block -> how many layers lie before it.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: RowLayout,
        blocks: Iterable[Block],
        loss: Callable[[], float],
        displaced: Callable[[Block], AbstractContextManager[object]],
    ) -> None:
        """Find out what can be skipped.

        Args:
            module: its parameters are as they were afterwards.
            layout: of its row.
            blocks: of tensors.
            loss: runs the module once, without a graph.
            displaced: while inside, the module computes with all parameters moved at random, those
                of a block otherwise than for no block: zeros would hide that they are used.
        """
        self._layers: list[nn.Module] = []
        self._kept: dict[Hashable, tuple[int, Any]] = {}
        before = _layers_before(module, layout, self._layers, loss)
        if not self._layers:
            before.clear()
        self.skipped = {block: min(before.get(t, 0) for t in block) for block in blocks}
        for block, count in self.skipped.items():
            if count and not self._is_right(block, loss, displaced):
                self.skipped[block] = 0
            self.clear()
        log.debug("zeroth order: layers skipped for each block: %s", [*self.skipped.values()])

    def _is_right(
        self,
        block: Block,
        loss: Callable[[], float],
        displaced: Callable[[Block], AbstractContextManager[object]],
    ) -> bool:
        """Say whether ``loss`` sees the block, and it alone, move."""
        with displaced(frozenset()), self.before(block, key=None):
            loss()
        with displaced(block):
            found = []
            for _ in range(2):  # nobody may write to what is kept
                try:
                    with self.before(block, key=None):
                        found.append(loss())
                except Exception as error:
                    # What lies between layers need not take a later one's output.
                    log.info("zeroth order: no layer is skipped before a block: %s", error)
                    return False
            return found == [loss()] * 2

    def clear(self) -> None:
        """Forget all outputs: the batch is another, or parameters have moved."""
        self._kept.clear()

    @contextmanager
    def before(self, block: Block, key: Hashable) -> Iterator[None]:
        """While inside, one forward pass may begin at ``block``; what lies before it stays.

        Blocks may be updated between two calls, each after its own: an output is forgotten where
        the next block lies before it.

        Args:
            block: one of those given.
            key: of the batch and of the row, say.
        """
        wanted = self.skipped[block]
        have, output = self._kept.pop(key, (0, None))
        if have > wanted:
            have, output = 0, None
        fresh: list[Any] = []
        with ExitStack() as stack:
            for layer in self._layers[:have]:
                stack.callback(_restore, layer, layer.__dict__.get("forward"))
                layer.forward = partial(_known, output, [])
            if wanted > have:
                last = self._layers[wanted - 1]
                stack.callback(last.register_forward_hook(partial(_keep, fresh)).remove)
            yield
        if wanted == have:
            self._kept[key] = (have, output)
        elif len(fresh) == 1:
            self._kept[key] = (wanted, fresh[0])


def _known(output: Any, calls: list[None], *_: Any, **__: Any) -> Any:
    if calls:
        raise RuntimeError("a layer that ran once in a forward pass runs twice")
    calls.append(None)
    return output


def _keep(outputs: list[Any], layer: nn.Module, given: Any, output: Any) -> None:
    outputs.append(output)


def _restore(layer: nn.Module, forward: Any) -> None:
    del layer.forward
    if forward is not None:
        layer.forward = forward


def _layers_before(
    module: nn.Module, layout: RowLayout, layers: list[nn.Module], loss: Callable[[], float]
) -> dict[int, int]:
    """Put the layers in their order into ``layers``; none where they do not run so.

    Returns:
        Tensor id -> how many of them are over when the tensor is first used.
    """
    of = {id(p): s.tensor for p, s in zip(layout.parameters(module), layout.slices, strict=True)}
    before: dict[int, int] = {}
    inside: list[nn.Module] = []
    in_turn = True

    def enter(layer: nn.Module, *_: Any) -> None:
        nonlocal in_turn
        in_turn &= not inside and layer not in layers
        inside.append(layer)
        for p in layer.parameters():
            use(p)

    def leave(layer: nn.Module, *_: Any) -> None:
        inside.pop()
        layers.append(layer)

    def enter_other(owner: nn.Module, *_: Any) -> None:
        for p in owner.parameters(recurse=False):
            use(p)

    def use(p: nn.Parameter) -> None:
        if id(p) in of:
            before.setdefault(of[id(p)], len(layers))

    with ExitStack() as stack:
        for name, part in module.named_modules():
            if is_layer(name):
                stack.callback(part.register_forward_pre_hook(enter).remove)
                stack.callback(part.register_forward_hook(leave).remove)
            stack.callback(part.register_forward_pre_hook(enter_other).remove)
        loss()
    if not in_turn:
        layers.clear()
    return before
