"""What a forward pass computes before the block whose losses are taken, kept for the next loss.

A block's directions move nothing before it, so the layers there give what they gave (block-wise
optimization, arXiv:2402.11592): of blocks taken in turn about half of all is saved, for the memory
of what one layer returns.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.algorithms.zeroth_order.blocks import is_layer
from gossamer.runtime import RowLayout

__all__ = ["PrefixCache"]

Block = frozenset[int]


class PrefixCache:
    """Skips layers whose output is known.

    Layers are the numbered parts of a model, where they run once in a forward pass, one after
    another. What is skipped for which block is found by watching a loss, and tried with the block
    moved: where the loss would not be the same to the bit, nothing is skipped.

    Attributes:
        skipped: block -> how many layers lie before it.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: RowLayout,
        blocks: Iterable[Block],
        loss: Callable[[], float],
    ) -> None:
        """Find out what can be skipped.

        Args:
            module: bound to parameters of its own; they are as they were afterwards.
            layout: of its row.
            blocks: of tensors.
            loss: runs the module once, without a graph.
        """
        self._layers: list[nn.Module] = []
        self._kept: dict[Hashable, tuple[int, list[Any]]] = {}
        before = _layers_before(module, layout, self._layers, loss)
        if not self._layers:
            before.clear()
        self.skipped = {block: min(before.get(t, 0) for t in block) for block in blocks}
        parameters = layout.parameters(module)
        for block, count in self.skipped.items():
            if count and not self._is_right(block, [parameters[tensor] for tensor in block], loss):
                self.skipped[block] = 0
            self.clear()

    @torch.no_grad()
    def _is_right(self, block: Block, tensors: Sequence[Tensor], loss: Callable[[], float]) -> bool:
        """Say whether ``loss`` sees the block move."""
        with self.before(block, key=None):
            loss()
        try:
            for tensor in tensors:
                tensor.mul_(2)  # which can be undone to the bit
            found = []
            for _ in range(2):  # nobody may write to what is kept
                with self.before(block, key=None):
                    found.append(loss())
            return found == [loss()] * 2
        finally:
            for tensor in tensors:
                tensor.mul_(0.5)

    def clear(self) -> None:
        """Forget all outputs: the batch is another, or parameters have moved."""
        self._kept.clear()

    @contextmanager
    def before(self, block: Block, key: Hashable) -> Iterator[None]:
        """While inside, a loss may begin at ``block``; all that lies before it stays as it is.

        Blocks may be updated between two calls, each after its own: an output is forgotten where
        the next block lies before it.

        Args:
            block: one of those given.
            key: of the batch and of the row, say; the batch must be cut alike each time.
        """
        wanted = self.skipped[block]
        have, outputs = self._kept.get(key, (0, []))
        if have > wanted:
            have, outputs = 0, []
        fresh: list[Any] = []
        passes = _Passes()
        with ExitStack() as stack:
            for layer in self._layers[:have]:
                stack.callback(_restore, layer, layer.__dict__.get("forward"))
                layer.forward = partial(_known, passes, outputs)
            if have:
                stack.callback(self._layers[0].register_forward_pre_hook(passes.count).remove)
            if wanted > have:
                last = self._layers[wanted - 1]
                stack.callback(last.register_forward_hook(partial(_keep, fresh)).remove)
            yield
        self._kept[key] = (wanted, fresh) if wanted > have else (have, outputs)


class _Passes:
    """Counts the forward passes of a loss: parts of a batch come one after another."""

    def __init__(self) -> None:
        self.now = -1

    def count(self, *_: Any) -> None:
        self.now += 1


def _known(passes: _Passes, outputs: list[Any], *_: Any, **__: Any) -> Any:
    return outputs[passes.now]


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
