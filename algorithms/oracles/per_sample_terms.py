"""Gradients of single examples of one parameter, without forming them where that costs less.

A parameter's gradient on example i is a sum of terms: an outer product of what went into a layer
and of what came back to it (Linear, convolutions), a look-up (embeddings), or the gradient itself
where it is small (biases, norms). Squared norms come from the parts (ghost norms,
arXiv:2009.03106, arXiv:2110.05679), and so does the clipped sum (book-keeping, arXiv:2210.00038).

Shapes: m examples, t positions in each, a parameter (q, p).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.runtime.native import add_rows, gram_roundings, outer_squares, takes_positions
from gossamer.runtime.rows import row_dot

__all__ = [
    "LOOSE",
    "Dense",
    "Lookup",
    "Outer",
    "Term",
    "add_weighted",
    "full_precision",
    "lengths_of",
    "squared_norms",
]

_BLOCK = 128
"""Features that are summed at once: sums of blocks lose less than one long sum."""
LOOSE = 0.02
"""Share of a squared norm that float32 may account for, 1 % of the norm; beyond it: float64."""
_FLOOR = 1e-13
"""Shorter vectors count as this long in bounds, so that what underflows is within them."""


@dataclass
class Outer:
    """sum_t e_t a_t^T: of a weight (q, p).

    Attributes:
        a: (m, t, p), what went in.
        e: (m, t, q), the gradient of what came out.
        mass: (m,), sum_t |a_t| |e_t|, what rounding is relative to; None until it was needed.
    """

    a: Tensor
    e: Tensor
    mass: Tensor | None = None

    def scaled(self, c: float) -> Outer:
        """Return the term times c."""
        return Outer(self.a, self.e * c)

    def cleared(self, bad: Tensor) -> Outer:
        """Return the term with the examples ``bad`` (m,) at zero."""
        return Outer(_zeroed(self.a, bad), _zeroed(self.e, bad))

    def dense(self, shape: torch.Size) -> Dense:
        """Return the gradients themselves, (m, *shape)."""
        g = torch.einsum("mtq,mtp->mqp", self.e, self.a).reshape(-1, *shape)
        return Dense(g, self.rounding())

    def squares(self) -> Tensor:
        """Return bounds (m,) float64 on the squared norms, by Gram matrices: O(t^2 (p + q)) each.

        Their inner products are float32, faster than float64, and what these may lose is added: a
        norm that is too small is no bound. An inner product of vectors x, y in which no product is
        rounded more than k times, alone and in sums, is off by at most k u |x| |y| to first order,
        u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 4.2).
        Hence sum_st <a_s, a_t> <e_s, e_t> is off by at most (k_a + k_e) u mass^2,
        mass = sum_t |a_t| |e_t|. Where positions cancel that is much more than the norm: the
        example is done in float64, with the bound of that.
        """
        if self.a.shape[1] == 1:
            return Dense(self.a).squares() * Dense(self.e).squares()
        if self.a.dtype == torch.float64:
            return _exact_squares(self.a, self.e)
        found, self.mass, roundings = _float32_squares(self.a, self.e)
        unit = torch.finfo(self.a.dtype).eps / 2
        # A tenth more: higher orders, the rounding of the mass, and products that underflow.
        lost = self.mass.square() * (1.1 * roundings * unit)
        loose = ~(lost <= LOOSE * found)  # so is NaN
        if bool(loose.any()):
            found[loose], lost[loose] = _exact_squares(self.a[loose], self.e[loose]), 0.0
        return found + lost

    def rounding(self) -> Tensor:
        """Return bounds (m,) on what float32 sums over positions may add to a gradient."""
        mass = self.mass
        if mass is None:
            mass = _mass(self.a, self.e)
        return mass * (self.a.shape[1] * torch.finfo(self.a.dtype).eps)

    @property
    def is_wide(self) -> bool:
        """Whether Gram matrices cost less than the gradients themselves (arXiv:2205.10683)."""
        return 2 * self.a.shape[1] ** 2 <= self.a.shape[2] * self.e.shape[2]

    def add_to_(self, out: Tensor, factors: Tensor) -> None:
        """Add ``sum_i factors_i g_i`` to the parameter's gradient ``out``."""
        a, e, factors = self.a, self.e, factors[:, None, None]
        if a.shape[2] < e.shape[2]:  # the copy is of the narrower one
            a = a * factors
        else:
            e = e * factors
        e = e.flatten(0, 1)
        out.view(e.shape[1], -1).addmm_(e.mT, a.flatten(0, 1))


@dataclass
class Lookup:
    """Row ``tokens[t]`` of a table (q, p) gets e_t.

    Attributes:
        tokens: (m, t) int64.
        e: (m, t, p).
    """

    tokens: Tensor
    e: Tensor

    def scaled(self, c: float) -> Lookup:
        """Return the term times c."""
        return Lookup(self.tokens, self.e * c)

    def cleared(self, bad: Tensor) -> Lookup:
        """Return the term with the examples ``bad`` (m,) at zero."""
        return Lookup(self.tokens, _zeroed(self.e, bad))

    def dense(self, shape: torch.Size) -> Dense:
        """Return the gradients themselves, (m, *shape)."""
        out = self.e.new_zeros(len(self.tokens), *shape)
        at = self.tokens[..., None].expand_as(self.e)
        return Dense(out.scatter_add_(1, at, self.e), self.rounding())

    def squares(self) -> Tensor:
        """Return the squared norms, (m,): equal tokens of an example are added first."""
        m = len(self.tokens)
        examples = torch.arange(m, device=self.e.device)[:, None]
        keys = examples * (int(self.tokens.max()) + 1) + self.tokens
        found, place = torch.unique(keys, return_inverse=True)
        sums = torch.zeros(len(found), self.e.shape[2], dtype=torch.float64, device=self.e.device)
        sums.index_add_(0, place.flatten(), self.e.double().flatten(0, 1))
        owner = torch.empty_like(found)
        owner[place.flatten()] = examples.expand_as(place).flatten()
        return sums.new_zeros(m).index_add_(0, owner, sums.square().sum(1))

    def rounding(self) -> Tensor:
        """Return bounds (m,) on what float32 sums over positions may add to a gradient."""
        mass = lengths_of(self.e).sum(1)
        return mass * (self.e.shape[1] * torch.finfo(self.e.dtype).eps)

    def add_to_(self, out: Tensor, factors: Tensor) -> None:
        """Add ``sum_i factors_i g_i`` to the table's gradient ``out``."""
        e = (self.e * factors[:, None, None]).flatten(0, 1)
        out.index_add_(0, self.tokens.flatten(), e)


@dataclass
class Dense:
    """The gradients themselves.

    Attributes:
        g: (m, *shape of the parameter).
        slack: (m,), what rounding may have added to each; None: nothing.
    """

    g: Tensor
    slack: Tensor | None = None

    def scaled(self, c: float) -> Dense:
        """Return the term times c."""
        return Dense(self.g * c, None if self.slack is None else self.slack * abs(c))

    def cleared(self, bad: Tensor) -> Dense:
        """Return the term: ``add_to_`` leaves out examples whose factor is 0."""
        return self

    def dense(self, shape: torch.Size) -> Dense:
        """Return the term."""
        return Dense(self.g.reshape(-1, *shape), self.slack)

    def squares(self) -> Tensor:
        """Return the squared norms, (m,), reading each gradient once."""
        g = self.rows()
        return row_dot(g, g)[:, 0]

    def rows(self) -> Tensor:
        """Return the gradients as rows (m, size)."""
        return self.g.reshape(len(self.g), self.g[0].numel()).contiguous()

    def rounding(self) -> Tensor:
        """Return bounds (m,) on what rounding may have added."""
        return self.g.new_zeros(len(self.g)) if self.slack is None else self.slack

    def add_to_(self, out: Tensor, factors: Tensor) -> None:
        """Add ``sum_i factors_i g_i`` to the parameter's gradient ``out``."""
        add_rows(out.view(-1), self.rows(), factors)


Term = Outer | Lookup | Dense


def squared_norms(terms: Sequence[Term], shape: torch.Size) -> tuple[Tensor, list[Term]]:
    """Return the squared norms (m,) of the sum of one parameter's terms, float64, never too small.

    The sum itself is rounded to float32, and where terms cancel that may be most of it: what
    rounding may add counts as part of the norm, so that a bound by it holds for what is added.

    Args:
        terms: of one parameter: several where it is used, or evaluated, several times.
        shape: of the parameter.

    Returns:
        The norms, and terms with the same sum that ``add_weighted`` takes.
    """
    outer = [term for term in terms if isinstance(term, Outer)]
    lookup = [term for term in terms if isinstance(term, Lookup)]
    dense = [term.dense(shape) for term in terms if isinstance(term, Dense)]
    merged: list[Term] = []
    if outer:  # positions side by side: the sum of outer products is one outer product
        whole = Outer(_beside([term.a for term in outer]), _beside([term.e for term in outer]))
        merged.append(whole if whole.is_wide else whole.dense(shape))
    if lookup:
        tokens = _beside([term.tokens for term in lookup])
        merged.append(Lookup(tokens, _beside([term.e for term in lookup])))
    if dense:
        merged.append(_total(dense))
    if len(merged) == 2 and isinstance(merged[0], Outer) and isinstance(merged[1], Lookup):
        squares = merged[0].squares() + merged[1].squares() + 2 * _inner(merged[0], merged[1])
        squares += _lost_in_inner(merged[0], merged[1])
    else:
        if len(merged) > 1:
            merged = [_total([term.dense(shape) for term in merged])]
        squares = merged[0].squares()
    slack = torch.stack([term.rounding() for term in merged]).sum(0).double()
    return (squares.clamp(min=0).sqrt() + slack).square(), merged


def add_weighted(terms: Sequence[Term], factors: Tensor, bad: Tensor | None, out: Tensor) -> None:
    """Add ``sum_i factors_i g_i`` to ``out``, shaped as the parameter.

    Args:
        terms: of one parameter, from ``squared_norms``.
        factors: (m,), of either sign.
        bad: (m,) bool, examples that count as zero: 0 times NaN would be NaN; None: there is none.
        out: the parameter's gradient, of the terms' dtype.
    """
    factors = factors.to(out.dtype)
    # Below it they keep few digits, and round up as often as down.
    factors = factors.masked_fill(factors.abs() < torch.finfo(out.dtype).tiny, 0)
    if bad is not None:
        factors = factors.masked_fill(bad, 0)
    for term in terms:
        clean = term if bad is None else term.cleared(bad)
        clean.add_to_(out, factors)


def lengths_of(values: Tensor) -> Tensor:
    """Return the norms over the last axis, (m, t, p) -> (m, t)."""
    if values.stride(2) != 1:  # torch 2.13 takes such norms element by element
        return values.square().sum(2).sqrt_()
    lengths: Tensor = values.norm(dim=2)
    return lengths


@contextmanager
def full_precision() -> Iterator[None]:
    """Keep products in float32: in TF32 or bfloat16 a sum may lie beyond what its norm says."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # somebody chose by backend, which torch does not let one mix with this
        with _full_precision_by_backend():
            yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _full_precision_by_backend() -> Iterator[None]:
    backends: Any = torch.backends  # mkldnn.matmul has no types
    products = [backends.cuda.matmul, backends.mkldnn.matmul]
    kept = [backend.fp32_precision for backend in products]
    try:
        for backend in products:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(products, kept, strict=True):
            backend.fp32_precision = precision


def _beside(parts: Sequence[Tensor]) -> Tensor:
    """Return the parts with their positions side by side."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


def _float32_squares(a: Tensor, e: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return (m,) float64 squared norms and masses, and the most roundings in two inner products.

    By the compiled kernel where features are side by side on the CPU; patches of a convolution are
    not, and a copy of them costs what the kernel saves.
    """
    if takes_positions(a, e):
        roundings = gram_roundings(a.shape[2]) + gram_roundings(e.shape[2])
        return *outer_squares(a, e, _FLOOR), roundings
    grams = [_gram(a), _gram(e)]
    lengths = [gram.diagonal(dim1=1, dim2=2).sqrt().clamp_(min=_FLOOR) for gram in grams]
    mass = (lengths[0] * lengths[1]).sum(1, dtype=torch.float64)
    return grams[0].double().mul_(grams[1]).sum((1, 2)), mass, _summed(a, e)


def _gram(values: Tensor) -> Tensor:
    """Return the inner products of positions, (m, t, p) -> (m, t, t), block by block."""
    first, *rest = values.split(_BLOCK, dim=2)
    total: Tensor = first @ first.mT
    for block in rest:
        total += block @ block.mT
    return total


def _summed(a: Tensor, e: Tensor) -> int:
    """Return how many roundings an element of both Gram matrices has, in blocks and of blocks."""
    return sum(min(v.shape[2], _BLOCK) + -(-v.shape[2] // _BLOCK) for v in (a, e))


def _exact_squares(a: Tensor, e: Tensor) -> Tensor:
    """Return bounds on the squared norms of ``sum_t e_t a_t^T``, by Gram matrices in float64.

    As in ``Outer.squares``, with u = 2^-53, and the sum of the t^2 products is off as well.
    """
    a, e = a.double(), e.double()
    found = _gram(a).mul_(_gram(e)).sum((1, 2)).clamp_(min=0)
    terms = _summed(a, e) + a.shape[1] ** 2
    return found + _mass(a, e).square() * (1.1 * terms * torch.finfo(torch.float64).eps / 2)


def _mass(a: Tensor, e: Tensor) -> Tensor:
    """Return the sums over positions of |a_t| |e_t|, (m,)."""
    lengths = [lengths_of(values).clamp(min=_FLOOR) for values in (a, e)]
    return (lengths[0] * lengths[1]).sum(1)


def _lost_in_inner(outer: Outer, lookup: Lookup) -> Tensor:
    """Return bounds (m,) on what float64 may lose in twice ``_inner``, and in the table's norm."""
    positions = outer.a.shape[1] + lookup.e.shape[1]
    terms = outer.a.shape[2] + positions**2
    mass = _mass(outer.a.double(), outer.e.double()) + lengths_of(lookup.e.double()).sum(1)
    return mass.square() * (1.1 * terms * torch.finfo(torch.float64).eps)


def _total(terms: Sequence[Dense]) -> Dense:
    """Return the sum of terms, with what its rounding may add."""
    if len(terms) == 1:
        return terms[0]
    g = sum((term.g for term in terms[1:]), terms[0].g)
    slack = torch.stack([term.rounding() for term in terms]).sum(0)
    norms = torch.stack([term.rows().norm(dim=1) for term in terms]).sum(0)
    return Dense(g, slack + norms * (len(terms) * torch.finfo(g.dtype).eps))


def _inner(outer: Outer, lookup: Lookup) -> Tensor:
    """Return the inner products, (m,), of a tied head's and its embedding's gradients."""
    at = lookup.tokens[:, None].expand(-1, outer.e.shape[1], -1)
    heads = outer.e.gather(2, at).double()  # (m, t of the head, t of the embedding)
    return (outer.a.double() @ lookup.e.double().mT).mul_(heads).sum((1, 2))


def _zeroed(values: Tensor, bad: Tensor) -> Tensor:
    return values.masked_fill(bad.view(-1, *[1] * (values.dim() - 1)), 0)
