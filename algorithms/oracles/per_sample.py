"""Sums of bounded gradients of single examples, in one forward and one backward pass.

Taps on the layers keep what went in and the gradient of what came out; norms and clipped sums come
from these (book-keeping, arXiv:2210.00038), so no gradient of a single example is held. A model
with parameters that no known layer owns, or whose gradients disagree with autograd's on a few
examples, goes through torch.func instead, one gradient per example.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.algorithms.estimates import Clip
from gossamer.algorithms.oracles.per_sample_layers import terms_of
from gossamer.algorithms.oracles.per_sample_terms import (
    LOOSE,
    Dense,
    Term,
    add_weighted,
    full_precision,
    squared_norms,
)
from gossamer.algorithms.oracles.vectorized import Stateless
from gossamer.algorithms.problems import Problem
from gossamer.runtime import ConfigError, RowLayout

__all__ = ["PerSampleGradients", "add_bounded", "check_layers"]

log = logging.getLogger("gossamer")

Points = Sequence[tuple[float, Tensor]]
"""[(c_k, row_k)]: the gradient of an example is sum_k c_k grad f(row_k)."""
Bind = Callable[[Tensor], None]
"""Makes the module's parameters those of a row (d,)."""
Cast = Callable[[], AbstractContextManager[Any]]
"""Makes the precision of a forward pass."""

_CHECKED = 12
"""Examples whose gradients are compared with autograd's before any is trusted."""
_MIXES_EXAMPLES = (nn.modules.batchnorm._BatchNorm,)


@dataclass
class _Call:
    """One use of a layer: what went in, and the gradient of what came out (set by backward)."""

    layer: nn.Module
    a: Tensor
    e: Tensor = field(default_factory=lambda: torch.empty(0))


class _Tap(torch.autograd.Function):
    """Passes a layer's output on, and keeps the gradient that comes back."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, anchor: Tensor, call: _Call) -> Tensor:
        ctx.call = call
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.call.e = grads[0].detach()
        # The anchor makes every tap a leaf's descendant, so that backward comes here although the
        # parameters take no gradients.
        return grads[0] if ctx.needs_input_grad[0] else None, torch.zeros(()), None


class PerSampleGradients:
    """The gradients of single examples of one problem.

    Attributes:
        is_tapped: whether layers are tapped; else torch.func makes each gradient.
    """

    def __init__(self, problem: Problem, layout: RowLayout) -> None:
        """Look at the module; valid while its trainable parameters stay the same ones.

        Raises:
            ConfigError: a layer mixes the examples of a batch, or the module can neither be tapped
                nor go through torch.func.
        """
        self._problem, self._layout, module = problem, layout, problem.module
        check_layers(module, "task.model")
        self._owners = _owners(module, layout)
        self.is_tapped = self._owners is not None and self._agrees_with_autograd()
        if not self.is_tapped:
            self._require_functions()
            log.info("gradients of single examples: by torch.func, which holds each of them")

    def add_clipped(
        self,
        points: Points,
        inputs: tuple[Tensor, ...],
        clip: Clip,
        out: Tensor,
        bind: Bind,
        cast: Cast = nullcontext,
    ) -> Tensor:
        """Add the sum over examples of their bounded gradients to ``out``.

        Args:
            points: where gradients are taken, and their coefficients.
            inputs: (m, ...), m > 0 examples.
            clip: bounds an example's gradient.
            out: (d,), zero or a sum so far; float32 at least, whatever the module's dtype.
            bind: called before each forward pass; repeats its random numbers too.
            cast: around each forward pass; norms and sums are computed outside it.

        Returns:
            (), the mean loss at the first point.
        """
        find = self._tapped if self.is_tapped and self._weigh_alike(inputs) else self._by_functions
        terms, loss = find(points, inputs, bind, cast)
        each = [terms[s.name] for s in self._layout.slices]
        add_bounded(each, len(inputs[0]), clip, self._layout, out)
        return loss

    def _weigh_alike(self, inputs: tuple[Tensor, ...]) -> bool:
        """Say whether an example's share in the loss is 1 / m, whatever the other examples are."""
        weigh, m = self._problem.weigh, len(inputs[0])
        if weigh is Problem.weigh:
            return True
        weights = [weigh(tuple(t[k : k + 1] for t in inputs)) for k in range(m)]
        return len(set(weights)) == 1

    # --- by taps ----------------------------------------------------------------------------

    def _tapped(
        self, points: Points, inputs: tuple[Tensor, ...], bind: Bind, cast: Cast
    ) -> tuple[dict[str, list[Term]], Tensor]:
        """Return the terms of every parameter by name, and the loss at the first point."""
        assert self._owners is not None
        terms: dict[str, list[Term]] = {s.name: [] for s in self._layout.slices}
        first = None
        for c, row in points:
            bind(row)
            calls, loss = self._run(inputs, cast)
            first = loss if first is None else first
            for call in calls:
                if not len(call.e):
                    continue  # its output did not matter
                find = terms_of(call.layer)
                assert find is not None
                a = call.a if not call.a.is_floating_point() else _wide(call.a)
                for own, term in find(call.layer, a, _wide(call.e)).items():
                    if (name := self._owners.get((call.layer, own))) is not None:
                        terms[name].append(term.scaled(c) if c != 1.0 else term)
        assert first is not None
        return terms, first

    def _run(self, inputs: tuple[Tensor, ...], cast: Cast) -> tuple[list[_Call], Tensor]:
        assert self._owners is not None
        m, calls = len(inputs[0]), list[_Call]()
        anchor = torch.zeros((), requires_grad=True)

        def tap(layer: nn.Module, taken: tuple[Tensor, ...], out: Tensor) -> Tensor:
            a = taken[0].detach()
            if len(a) == 1 < m:  # shared by all examples, as positions are: each gets its own
                a, out = a.expand(m, *a.shape[1:]), out.expand(m, *out.shape[1:])
            calls.append(_Call(layer, a))
            result: Tensor = _Tap.apply(out, anchor, calls[-1])  # type: ignore[no-untyped-call]
            return result

        hooks = [layer.register_forward_hook(tap) for layer in {own[0] for own in self._owners}]
        try:
            with _frozen(self._layout, self._problem.module), torch.enable_grad():
                with cast():
                    loss = self._problem.loss(self._problem.module, inputs)
                torch.autograd.grad(loss * m, anchor)  # of the mean: an example's share is 1 / m
        finally:
            for hook in hooks:
                hook.remove()
        return calls, loss.detach()

    def _agrees_with_autograd(self) -> bool:
        """Compare examples' norms and sum, in one batch, with a backward pass for each.

        At a point beside x0, where no part of the loss has a gradient of zero by chance; without
        dropout, but otherwise in training mode.
        """
        problem, module = self._problem, self._problem.module
        device = next(module.parameters()).device
        inputs = tuple(t.to(device) for t in problem.examples(_CHECKED))
        row = self._layout.gather(module, torch.empty(self._layout.d, dtype=self._layout.dtype))
        before = [p.data for p in module.parameters()]
        row = row + 0.01 * torch.randn(row.shape, generator=torch.Generator().manual_seed(0)).to(
            row
        )
        row, kept = row.to(device), _Keep()
        modes = [(layer, layer.training) for layer in module.modules()]
        for layer in module.modules():
            layer.training = not isinstance(layer, nn.modules.dropout._DropoutNd)
        self._layout.bind(module, row)
        try:
            total = torch.zeros_like(_wide(row))
            self.is_tapped = True
            self.add_clipped([(1.0, row)], inputs, kept, total, lambda _: None)
            parameters = list(self._layout.parameters(module))
            sums = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
            squares = torch.zeros(len(inputs[0]), len(sums), dtype=torch.float64)
            for k in range(len(squares)):  # one at a time: all of them may not fit
                loss = problem.loss(module, tuple(t[k : k + 1] for t in inputs))
                grads = torch.autograd.grad(loss, parameters, allow_unused=True)
                for j, (g, whole) in enumerate(zip(grads, sums, strict=True)):
                    if g is not None:
                        whole += g
                        squares[k, j] = g.double().square().sum().cpu()
        except (RuntimeError, ValueError, IndexError, AttributeError, KeyError) as error:
            log.info("gradients of single examples: layers cannot be tapped: %s", error)
            return False
        finally:
            for layer, mode in modes:
                layer.training = mode
            for p, data in zip(module.parameters(), before, strict=True):
                p.data = data
        norms, found_norms = squares.sqrt(), kept.squares.double().sqrt().cpu()
        scale = norms.max(dim=0).values + 1e-6 * norms.max()  # of each tensor
        apart = torch.stack(
            [
                (view.double() - whole).norm().cpu()
                for view, whole in zip(self._layout.views(total), sums, strict=True)
            ]
        )
        # Autograd's own gradients are rounded to the module's dtype, layer by layer.
        share = max(1e-3, 8 * torch.finfo(row.dtype).eps)
        over = found_norms - norms
        norms_agree = bool(
            (over >= -share * scale - 1e-12).all()
            and (over <= share * scale + LOOSE / 2 * norms + 1e-12).all()
        )
        return norms_agree and bool((apart <= share * len(squares) * scale + 1e-12).all())

    # --- by torch.func ----------------------------------------------------------------------

    def _require_functions(self) -> None:
        """Take the gradients of two examples, and refuse a module that gives none."""
        device = next(self._problem.module.parameters()).device
        inputs = tuple(t[:2].to(device) for t in self._problem.examples(_CHECKED))
        row = torch.empty(self._layout.d, dtype=self._layout.dtype)
        row = self._layout.gather(self._problem.module, row).to(device)
        try:
            self._by_functions([(1.0, row)], inputs, lambda _: None, nullcontext)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(
                "task.model: gradients of single examples go through torch.func here, which this "
                f"model does not ({reason}); use layers of torch.nn, and no .item() or branch on "
                "values in forward"
            ) from error

    def _by_functions(
        self, points: Points, inputs: tuple[Tensor, ...], bind: Bind, cast: Cast
    ) -> tuple[dict[str, list[Term]], Tensor]:
        problem, layout = self._problem, self._layout

        def loss_of(parameters: dict[str, Tensor], *example: Tensor) -> Tensor:
            one = tuple(part[None] for part in example)
            return problem.loss(Stateless(problem.module, parameters), one)

        each = torch.func.vmap(
            torch.func.grad_and_value(loss_of),
            in_dims=(None, *[0] * len(inputs)),
            randomness="different",
        )
        terms: dict[str, list[Term]] = {s.name: [] for s in layout.slices}
        first = None
        for c, row in points:
            bind(row)
            values = dict(zip([s.name for s in layout.slices], layout.views(row), strict=True))
            with cast():
                grads, losses = each(values, *inputs)
            first = losses.detach().mean() if first is None else first
            for name, grad in grads.items():
                terms[name].append(Dense(_wide(grad)).scaled(c))
        assert first is not None
        return terms, first


def add_bounded(
    terms: Sequence[Sequence[Term]], count: int, clip: Clip, layout: RowLayout, out: Tensor
) -> None:
    """Add the sum over examples of their bounded gradients to ``out``.

    Args:
        terms: of each parameter in the order of the layout; none where no gradient reached it.
        count: m > 0, of examples.
        clip: bounds an example's gradient.
        layout: of the row.
        out: (d,), zero or a sum so far, of the terms' dtype.
    """
    with full_precision():
        unreached = torch.zeros(count, dtype=torch.float64, device=out.device), list[Term]()
        found = [
            squared_norms(own, s.shape) if own else unreached
            for own, s in zip(terms, layout.slices, strict=True)
        ]
        squares = torch.stack([square for square, _ in found], dim=1)
        factors = clip.factors(squares).expand_as(squares)
        bad = ~torch.isfinite(squares).all(dim=1)
        skipped = bad if bool(bad.any()) else None
        for k, (view, (_, merged)) in enumerate(zip(layout.views(out), found, strict=True)):
            add_weighted(merged, factors[:, k], skipped, view)


def check_layers(module: nn.Module, field: str) -> None:
    """Refuse a module in which no example has a gradient of its own.

    Raises:
        ConfigError: a layer mixes the examples of a batch; begins with ``field``.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, _MIXES_EXAMPLES) or getattr(layer, "track_running_stats", False):
            raise ConfigError(
                f"{field}: '{name}' is a {type(layer).__name__}, which mixes the examples of a "
                "batch or keeps their statistics, so that none has a gradient of its own; use "
                "GroupNorm or LayerNorm"
            )


@dataclass
class _Keep:
    """Bounds nothing, and keeps the norms."""

    squares: Tensor = field(default_factory=lambda: torch.empty(0))

    def factors(self, squares: Tensor) -> Tensor:
        self.squares = squares
        return torch.ones_like(squares[:, :1])


def _owners(module: nn.Module, layout: RowLayout) -> dict[tuple[nn.Module, str], str] | None:
    """Return (layer, its name for a parameter) -> name in the row; None if some has no known layer.

    Tied parameters have several owners.
    """
    names = {id(p): s.name for s, p in zip(layout.slices, layout.parameters(module), strict=True)}
    owners = {
        (layer, own): names[id(p)]
        for layer in module.modules()
        for own, p in layer._parameters.items()
        if p is not None and id(p) in names
    }
    return owners if all(terms_of(layer) is not None for layer, _ in owners) else None


@contextmanager
def _frozen(layout: RowLayout, module: nn.Module) -> Iterator[None]:
    """Let backward skip the parameters' gradients: the taps are enough."""
    parameters = list(layout.parameters(module))
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def _wide(values: Tensor) -> Tensor:
    """Return values in float32 at least: norms and sums of half precision lose the small ones."""
    return values if values.dtype == torch.float64 else values.float()
