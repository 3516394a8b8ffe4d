"""Gradients of single examples of one parameter, without forming them where that costs less.

A parameter's gradient on example i is a sum of terms: an outer product of what went into a layer
and of what came back to it (Linear, convolutions), a look-up (embeddings), or the gradient itself
where it is small (biases, norms). Squared norms come from the parts (ghost norms,
arXiv:2009.03106, arXiv:2110.05679), and so does the clipped sum (book-keeping, arXiv:2210.00038).

Shapes: m examples, t positions in each, a parameter (q, p).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Dense", "Lookup", "Outer", "Term", "add_weighted", "norms", "squared_norms"]


@dataclass
class Outer:
    """sum_t e_t a_t^T: of a weight (q, p).

    Attributes:
        a: (m, t, p), what went in.
        e: (m, t, q), the gradient of what came out.
    """

    a: Tensor
    e: Tensor

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
        """Return the squared norms, (m,), by Gram matrices: O(t^2 (p + q)) per example.

        In float64: positions may cancel, and a norm that is too small is no bound.
        """
        a, e = self.a.double(), self.e.double()
        if a.shape[1] == 1:
            return a.square().sum((1, 2)) * e.square().sum((1, 2))
        return (a @ a.mT).mul_(e @ e.mT).sum((1, 2)).clamp_(min=0)

    def rounding(self) -> Tensor:
        """Return bounds (m,) on what float32 sums over positions may add to a gradient."""
        mass = (norms(self.a) * norms(self.e)).sum(1)
        return mass * (self.a.shape[1] * torch.finfo(self.a.dtype).eps)

    @property
    def is_wide(self) -> bool:
        """Whether Gram matrices cost less than the gradients themselves (arXiv:2205.10683)."""
        return 2 * self.a.shape[1] ** 2 <= self.a.shape[2] * self.e.shape[2]

    def add_to_(self, out: Tensor, factors: Tensor) -> None:
        """Add ``sum_i factors_i g_i`` to the parameter's gradient ``out``."""
        e = (self.e * factors[:, None, None]).flatten(0, 1)
        out.view(e.shape[1], -1).addmm_(e.mT, self.a.flatten(0, 1))


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
        mass = norms(self.e).sum(1)
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
        """Return the term with the examples ``bad`` (m,) at zero."""
        return Dense(_zeroed(self.g, bad), self.slack)

    def dense(self, shape: torch.Size) -> Dense:
        """Return the term."""
        return Dense(self.g.reshape(-1, *shape), self.slack)

    def squares(self) -> Tensor:
        """Return the squared norms, (m,)."""
        return self.g.flatten(1).double().square().sum(1)

    def rounding(self) -> Tensor:
        """Return bounds (m,) on what rounding may have added."""
        return self.g.new_zeros(len(self.g)) if self.slack is None else self.slack

    def add_to_(self, out: Tensor, factors: Tensor) -> None:
        """Add ``sum_i factors_i g_i`` to the parameter's gradient ``out``."""
        out.view(-1).addmv_(self.g.flatten(1).mT, factors)


Term = Outer | Lookup | Dense


def norms(values: Tensor) -> Tensor:
    """Return the norms (m, t) of (m, t, ...) over all but the first two dimensions."""
    # Not norm(dim=2), which takes fifty times as long on a convolution's maps, transposed.
    return values.flatten(2).square().sum(2).sqrt()


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
        whole = outer[0]
        if len(outer) > 1:
            whole = Outer(torch.cat([o.a for o in outer], 1), torch.cat([o.e for o in outer], 1))
        merged.append(whole if whole.is_wide else whole.dense(shape))
    if lookup:
        tokens = torch.cat([term.tokens for term in lookup], 1)
        merged.append(Lookup(tokens, torch.cat([term.e for term in lookup], 1)))
    if dense:
        merged.append(_total(dense))
    if len(merged) == 2 and isinstance(merged[0], Outer) and isinstance(merged[1], Lookup):
        squares = merged[0].squares() + merged[1].squares() + 2 * _inner(merged[0], merged[1])
    else:
        if len(merged) > 1:
            merged = [_total([term.dense(shape) for term in merged])]
        squares = merged[0].squares()
    slack = torch.stack([term.rounding() for term in merged]).sum(0).double()
    return (squares.clamp(min=0).sqrt() + slack).square(), merged


def add_weighted(terms: Sequence[Term], factors: Tensor, bad: Tensor, out: Tensor) -> None:
    """Add ``sum_i factors_i g_i`` to ``out``, shaped as the parameter.

    Args:
        terms: of one parameter, from ``squared_norms``.
        factors: (m,).
        bad: (m,) bool, examples that count as zero: 0 times NaN would be NaN.
        out: the parameter's gradient.
    """
    for term in terms:
        clean = term.cleared(bad) if bad.any() else term
        clean.add_to_(out, factors.to(out.dtype))


def _total(terms: Sequence[Dense]) -> Dense:
    """Return the sum of terms, with what its rounding may add."""
    g = torch.stack([term.g for term in terms]).sum(0)
    slack = torch.stack([term.rounding() for term in terms]).sum(0)
    if len(terms) > 1:
        lengths = torch.stack([term.g.flatten(1).norm(dim=1) for term in terms]).sum(0)
        slack = slack + lengths * (len(terms) * torch.finfo(g.dtype).eps)
    return Dense(g, slack)


def _inner(outer: Outer, lookup: Lookup) -> Tensor:
    """Return the inner products, (m,), of a tied head's and its embedding's gradients."""
    at = lookup.tokens[:, None].expand(-1, outer.e.shape[1], -1)
    heads = outer.e.gather(2, at).double()  # (m, t of the head, t of the embedding)
    return (outer.a.double() @ lookup.e.double().mT).mul_(heads).sum((1, 2))


def _zeroed(values: Tensor, bad: Tensor) -> Tensor:
    return values.masked_fill(bad.view(-1, *[1] * (values.dim() - 1)), 0)
