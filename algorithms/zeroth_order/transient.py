"""A module that computes at x + scale z while its parameters stay at x.

Each layer's parameters are copied to scratch memory, moved there and dropped again while the layer
computes, so that nothing has to be restored and nothing can drift: adding and subtracting z in
place loses up to a rounding each time, which ruins a model of 16-bit parameters (arXiv:2305.17333,
Algorithm 1, works in place). Large linear layers and embeddings go through scratch part by part.

Shapes: a weight is (q, p), or a table of q rows.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.runtime import RowLayout
from gossamer.runtime.native import Piece, fill
from gossamer.runtime.random import derive_key
from gossamer.runtime.rows import Slice

__all__ = ["Shift", "TransientModule"]

Shift = Callable[[Tensor, list[Piece]], object]
"""Adds scale z to pieces of a flat tensor, in place."""

_PART = {"cpu": 2**18, "cuda": 2**24}
"""Elements of a large layer that stand in scratch at once."""


class _Own(NamedTuple):
    """A parameter and where it lies in a row."""

    p: nn.Parameter
    place: Slice


class TransientModule:
    """Makes a module compute at moved parameters.

    Parameters must be used in the ``forward`` of the module that owns them; attention and
    transformer layers of torch.nn, which use their children's, are known.
    """

    def __init__(self, module: nn.Module, layout: RowLayout) -> None:
        """Find out which parameters which module uses."""
        self._module, self._layout = module, layout
        pairs = zip(layout.parameters(module), layout.slices, strict=True)
        self._own = {id(p): _Own(p, s) for p, s in pairs}
        self._layers = list(self._find(module))
        self._shift: Shift = lambda flat, pieces: None
        self._inside: set[int] = set()

    def _find(self, module: nn.Module) -> Iterator[tuple[nn.Module, list[_Own]]]:
        """Yield the modules during whose forward parameters move, and these."""
        whole = isinstance(module, _WHOLE)
        if owned := self._owned(module, recurse=whole):
            yield module, owned
        for child in () if whole else module.children():
            yield from self._find(child)

    def _owned(self, module: nn.Module, recurse: bool) -> list[_Own]:
        return [self._own[id(p)] for p in module.parameters(recurse) if id(p) in self._own]

    @torch.no_grad()
    def follows(self, loss: Callable[[], float]) -> bool:
        """Say whether ``loss`` sees moved parameters as it sees written ones.

        It does not where it takes parameters past ``forward``: a penalty, say. Each is multiplied
        by 1, -1, 2 or -2, which can be undone to the bit without a copy.
        """

        def scale(flat: Tensor, pieces: list[Piece], power: int = 1) -> None:
            for piece in pieces:
                for begin in range(0, piece.length, _PART["cpu"]):
                    n = min(_PART["cpu"], piece.length - begin)
                    signs = torch.empty(2, n, dtype=torch.float32)
                    key, place = derive_key(0, "zeroth-order/follows"), piece.begin + begin
                    for k in (0, 1):
                        fill("rademacher", signs[k], key, (piece.tensor, k, 0), place)
                    factors = signs[0] * (1.5 + 0.5 * signs[1]) ** power
                    flat[piece.at + begin :][:n] *= factors.to(flat)

        with self.moved(scale):
            found = loss()
        for power in (1, -1):
            for own in self._own.values():
                whole = Piece(0, own.p.numel(), 0, own.place.tensor)
                scale(own.p.data.view(-1), [whole], power)
            if power == 1:
                written = loss()
        # Sums of parts are added in another order, which 16-bit layers round.
        share = min(8 * torch.finfo(self._layout.dtype).eps ** 0.75, 0.02)
        return bool(abs(found - written) <= share * max(abs(found), abs(written)))

    @contextmanager
    def moved(self, shift: Shift, tensors: Container[int] | None = None) -> Iterator[None]:
        """While inside, the module computes with ``shift`` applied to its parameters.

        The module is bound to a row, which stays as it is; no graph is kept.

        Args:
            shift: see there.
            tensors: those it moves; None: all.
        """

        def shift_some(flat: Tensor, pieces: list[Piece]) -> None:
            if chosen := [p for p in pieces if tensors is None or p.tensor in tensors]:
                shift(flat, chosen)

        self._shift = shift_some
        undo: list[Callable[[], object]] = []
        part = _PART[next(iter(self._own.values())).p.device.type]
        seen: set[int] = set()
        try:
            for layer, owned in self._layers:
                moves = tensors is None or any(own.place.tensor in tensors for own in owned)
                if id(layer) in seen or not moves:  # it may stand in two places
                    continue
                seen.add(id(layer))
                if self._goes_in_parts(layer, part):
                    forward = partial(_PARTED[type(layer)], self, layer, part)
                    layer.forward = forward
                    undo.append(partial(layer.__dict__.pop, "forward"))
                else:
                    kept: list[tuple[_Own, Tensor]] = []
                    before = layer.register_forward_pre_hook(partial(self._enter, owned, kept))
                    after = layer.register_forward_hook(
                        partial(self._leave, kept), always_call=True
                    )
                    undo += [before.remove, after.remove]
            yield
        finally:
            for back in undo:
                back()

    def _goes_in_parts(self, layer: nn.Module, part: int) -> bool:
        if type(layer) not in _PARTED or getattr(layer, "max_norm", None) is not None:
            return False
        weight: Any = layer.weight
        return id(weight) in self._own and weight.numel() > part

    def _enter(self, owned: list[_Own], kept: list[tuple[_Own, Tensor]], *_: Any) -> None:
        for own in owned:
            # A module around this one may have the parameter too (BERT's output bias).
            if id(own.p) not in self._inside:
                kept.append((own, own.p.data))
                own.p.data = self._scratch(own, own.p.data)
                self._inside.add(id(own.p))

    def _leave(self, kept: list[tuple[_Own, Tensor]], *_: Any) -> None:
        for own, data in kept:  # an error may have come in between
            own.p.data = data
            self._inside.discard(id(own.p))
        kept.clear()

    def _scratch(self, own: _Own, values: Tensor, begin: int = 0) -> Tensor:
        """Return moved ``values``, elements ``begin``.. of a parameter, in new memory."""
        copy = values.detach().clone(memory_format=torch.contiguous_format)
        if id(own.p) not in self._inside:
            self._shift(copy.view(-1), [Piece(0, copy.numel(), begin, own.place.tensor)])
        return copy

    def _moved(self, p: Tensor | None) -> Tensor | None:
        """Return a small parameter moved; a frozen one, or none, as it is."""
        return p if p is None or id(p) not in self._own else self._scratch(self._own[id(p)], p.data)

    # --- layers in parts ------------------------------------------------------------------------

    def _linear(self, layer: nn.Linear, part: int, h: Tensor) -> Tensor:
        own, bias = self._own[id(layer.weight)], self._moved(layer.bias)
        q, p = layer.weight.shape
        rows = max(1, part // p)
        out = None
        for begin in range(0, q, rows):
            end = min(q, begin + rows)
            weight = self._scratch(own, layer.weight.data[begin:end], begin * p)
            found = F.linear(h, weight, None if bias is None else bias[begin:end])
            if out is None:
                out = found.new_empty(*found.shape[:-1], q)
            out[..., begin:end] = found
        assert out is not None
        return out

    def _embedding(self, layer: nn.Embedding, part: int, tokens: Tensor) -> Tensor:
        own, width = self._own[id(layer.weight)], layer.embedding_dim
        found, place = torch.unique(tokens, return_inverse=True)
        table = layer.weight.data[found]
        pieces = [
            Piece(at * width, width, token * width, own.place.tensor)
            for at, token in enumerate(found.tolist())
        ]
        if id(layer.weight) not in self._inside:
            self._shift(table.view(-1), pieces)
        return table[place]


_PARTED: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: TransientModule._linear,
    nn.Embedding: TransientModule._embedding,
}
"""Layers that can compute with a part of their weight at a time."""

_WHOLE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
"""Layers that use the parameters of those below them."""
