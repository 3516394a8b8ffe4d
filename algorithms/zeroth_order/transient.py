"""A module that computes at x + scale z while its parameters stay at x.

Each layer's parameters are moved into scratch memory and dropped again while the layer computes, so
that nothing has to be restored and nothing can drift: adding and subtracting z in place loses up to
a rounding each time, which ruins a model of 16-bit parameters (arXiv:2305.17333, Algorithm 1, works
in place). A linear layer goes through scratch part by part, which is its memory while it computes
and nobody's after; of embeddings the rows that are looked up are moved.

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

__all__ = ["Shift", "TransientModule", "scratch_elements"]

Shift = Callable[[Tensor, list[Piece], Tensor], object]
"""Writes pieces of a whole flat tensor, the last argument, with scale z added into the first."""

_PART = {"cpu": 2**19, "cuda": 2**24}
"""Elements of a linear layer that stand in scratch at once, at most. Fewer would stay in a nearer
cache, but products with few rows are slow: 2**16 cost 1.6 times one of a whole weight, 2**19 1.1
times."""
_SHARE, _LEAST = 128, 2**14
"""They are a 128th of the parameters, so that moving takes less than 1 % of the model's memory; but
so many where the model is small."""


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
        self._shift: Shift = lambda flat, pieces, source: None
        self._moving = self._own

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

        def scale(flat: Tensor, pieces: list[Piece], source: Tensor, power: int = 1) -> None:
            for piece in pieces:
                for begin in range(0, piece.length, _PART["cpu"]):
                    n = min(_PART["cpu"], piece.length - begin)
                    signs = torch.empty(2, n, dtype=torch.float32)
                    key, place = derive_key(0, "zeroth-order/follows"), piece.begin + begin
                    for k in (0, 1):
                        fill("rademacher", signs[k], key, (piece.tensor, k, 0), place)
                    factors = signs[0] * (1.5 + 0.5 * signs[1]) ** power
                    torch.mul(
                        source[place:][:n], factors.to(flat), out=flat[piece.at + begin :][:n]
                    )

        for own in self._own.values():  # as in a row
            own.p.data = own.p.data.contiguous()
        with self.moved(scale):
            found = loss()
        for power in (1, -1):
            for own in self._own.values():
                whole, flat = Piece(0, own.p.numel(), 0, own.place.tensor), own.p.data.view(-1)
                scale(flat, [whole], flat, power)
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
        self._shift = shift
        self._moving = {
            key: own
            for key, own in self._own.items()
            if tensors is None or own.place.tensor in tensors
        }
        undo: list[Callable[[], object]] = []
        seen: set[int] = set()
        try:
            for layer, owned in self._layers:
                moving = [own for own in owned if id(own.p) in self._moving]
                if id(layer) in seen or not moving:  # it may stand in two places
                    continue
                seen.add(id(layer))
                if self._goes_in_parts(layer):
                    layer.forward = partial(_PARTED[type(layer)], self, layer)
                    undo.append(partial(layer.__dict__.pop, "forward"))
                else:
                    kept: list[tuple[_Own, Tensor]] = []
                    before = layer.register_forward_pre_hook(partial(self._enter, moving, kept))
                    after = layer.register_forward_hook(
                        partial(self._leave, kept), always_call=True
                    )
                    undo += [before.remove, after.remove]
            yield
        finally:
            for back in undo:
                back()

    def _goes_in_parts(self, layer: nn.Module) -> bool:
        if type(layer) not in _PARTED or getattr(layer, "max_norm", None) is not None:
            return False
        weight: Any = layer.weight
        return id(weight) in self._moving and weight.numel() > 0

    def _enter(self, owned: list[_Own], kept: list[tuple[_Own, Tensor]], *_: Any) -> None:
        for own in owned:
            # A module around this one may have it too (BERT's output bias), and have moved it.
            if id(own.p) in self._moving:
                kept.append((own, own.p.data))
                own.p.data = self._new(own)
                del self._moving[id(own.p)]

    def _leave(self, kept: list[tuple[_Own, Tensor]], *_: Any) -> None:
        for own, data in kept:  # an error may have come in between
            own.p.data = data
            self._moving[id(own.p)] = own
        kept.clear()

    def _new(self, own: _Own) -> Tensor:
        """Return a parameter moved, in new memory: what a layer returns may be a view of it."""
        out = torch.empty(own.p.shape, dtype=own.p.dtype, device=own.p.device)
        whole = Piece(0, out.numel(), 0, own.place.tensor)
        self._shift(out.view(-1), [whole], own.p.data.view(-1))
        return out

    def _moved(self, p: Tensor | None) -> Tensor | None:
        """Return a small parameter moved; one that stays, or none, as it is."""
        return p if p is None or id(p) not in self._moving else self._new(self._moving[id(p)])

    # --- layers in parts ------------------------------------------------------------------------

    def _linear(self, layer: nn.Linear, h: Tensor) -> Tensor:
        own, bias = self._own[id(layer.weight)], self._moved(layer.bias)
        if id(layer.weight) not in self._moving:
            return F.linear(h, layer.weight, bias)
        (q, p), flat = layer.weight.shape, layer.weight.data.view(-1)
        rows = max(1, scratch_elements(self._layout.d, flat.device) // p)
        memory, out = flat.new_empty(min(rows, q) * p), None
        for begin in range(0, q, rows):
            end = min(q, begin + rows)
            scratch = memory[: (end - begin) * p]
            self._shift(scratch, [Piece(0, len(scratch), begin * p, own.place.tensor)], flat)
            found = F.linear(h, scratch.view(-1, p), None if bias is None else bias[begin:end])
            if rows >= q:
                return found
            if out is None:
                out = found.new_empty(*found.shape[:-1], q)
            out[..., begin:end] = found
        assert out is not None, "a weight has rows"
        return out

    def _embedding(self, layer: nn.Embedding, tokens: Tensor) -> Tensor:
        own, width = self._own[id(layer.weight)], layer.embedding_dim
        if id(layer.weight) not in self._moving:
            return F.embedding(tokens, layer.weight, layer.padding_idx)
        found, place = torch.unique(tokens, return_inverse=True)
        table = layer.weight.new_empty(len(found), width)
        pieces = [
            Piece(at * width, count * width, token * width, own.place.tensor)
            for at, count, token in _runs(found)
        ]
        self._shift(table.view(-1), pieces, layer.weight.data.view(-1))
        return table[place]


def scratch_elements(d: int, device: torch.device) -> int:
    """Return how many elements of a linear layer move at once, in a model of d."""
    share = 1 << (max(1, d // _SHARE).bit_length() - 1)  # a power of two, as the others are
    return min(_PART[device.type], max(_LEAST, share))


def _runs(ascending: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield (place, length, first) of the runs of consecutive numbers."""
    numbers = ascending.tolist()
    at = 0
    for k, number in enumerate(numbers):
        if k + 1 == len(numbers) or numbers[k + 1] != number + 1:
            yield at, k + 1 - at, numbers[at]
            at = k + 1


_PARTED: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: TransientModule._linear,
    nn.Embedding: TransientModule._embedding,
}
"""Layers that can compute with a part of their weight at a time."""

_WHOLE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
"""Layers that use the parameters of those below them."""
