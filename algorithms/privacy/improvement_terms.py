"""Estimates of a loss's gradient, curvature and noise at one point, for ``improvement``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gossamer.algorithms.oracles.per_sample import PerSampleGradients
from gossamer.algorithms.privacy.clipping import AnyClip
from gossamer.algorithms.privacy.improvement import Terms
from gossamer.algorithms.problems import Dataset, Problem
from gossamer.algorithms.tasks.arrays import TensorDataset
from gossamer.runtime import RowLayout
from gossamer.runtime.random import Random

__all__ = ["estimate_terms"]

_SMALL = 2**20
"""Models of up to so many parameters are looked at in float64."""


def estimate_terms(
    problem: Problem,
    *,
    places: np.ndarray | None = None,
    parameters: Mapping[str, Tensor] | None = None,
    clip: AnyClip | None = None,
    probes: int = 32,
    examples: int = 2048,
    chunk: int = 256,
    seed: int = 0,
) -> Terms:
    """Estimate |G|^2, G'HG, tr(H), tr(H Sigma) and c.

    G and G'HG are exact for the examples taken. tr(H) is the mean of z'Hz over probes z of random
    signs, tr(H Sigma) that of u'Hu with u = sum_i r_i (g_i - G) / sqrt(m - 1) and random signs r_i
    (Hutchinson); the signs are counted numbers. Hessian times vector is two backward passes. Costs
    about 4 + 5 ``probes`` gradients over the examples. Without dropout; float64 up to 2^20
    parameters. What comes out says something of the examples: no privacy covers it.

    Args:
        problem: its module is copied, and kept.
        places: int64, the training examples to take; None: all.
        parameters: by name, where to look; None: where the module is.
        clip: bounds an example's gradient; None: none does, c = 1.
        probes: random vectors for each trace, at least 2.
        examples: at most so many of them, evenly spaced.
        chunk: examples of one pass.
        seed: of the signs.
    """
    point = _Point(problem, places, parameters, examples, chunk)
    loss, gradient = point.gradient()
    random = Random(seed)
    traces, noises = [], []
    signs = torch.empty(1, len(gradient), dtype=torch.float32)
    m = len(point.places)
    coins = torch.empty(1, m, dtype=torch.float32)
    for k in range(probes):
        z = random.stream("improvement/parameters", [k]).rademacher_(signs)[0].to(gradient)
        traces.append(float(z @ point.hessian_times(z)))
        r = random.stream("improvement/examples", [k]).rademacher_(coins)[0].to(gradient)
        u = (point.weighted_gradients(r) - r.sum() * gradient) / max(1, m - 1) ** 0.5
        noises.append(float(u @ point.hessian_times(u)))
    (trace, trace_error), (noise, noise_error) = _mean(traces), _mean(noises)
    return Terms(
        grad_square=float(gradient @ gradient),
        curvature=float(gradient @ point.hessian_times(gradient)),
        trace=trace,
        noise_curvature=noise,
        clip_factor=1.0 if clip is None else point.mean_factor(clip) / clip.sensitivity,
        trace_error=trace_error,
        noise_curvature_error=noise_error,
        loss=loss,
        examples=m,
        parameters=point.layout.size,
    )


def _mean(values: list[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    table = np.array(values)
    return float(table.mean()), float(table.std(ddof=1) / len(table) ** 0.5)


class _Point:
    """A copy of the model at one point, and the examples it is looked at with."""

    def __init__(
        self,
        problem: Problem,
        places: np.ndarray | None,
        parameters: Mapping[str, Tensor] | None,
        examples: int,
        chunk: int,
    ) -> None:
        module = copy.deepcopy(problem.module).eval()
        train: Any = problem.train
        if hasattr(train, "draw"):
            train = TensorDataset(train.draw(0, 0, 0, 0, examples))
        if sum(p.numel() for p in module.parameters()) <= _SMALL:
            module, train = module.double(), _Double(train)
        self.layout = RowLayout(module)
        self.row = self.layout.gather(module, torch.empty(self.layout.d, dtype=self.layout.dtype))
        if parameters is not None:
            for s, view in zip(self.layout.slices, self.layout.views(self.row), strict=True):
                view.copy_(parameters[s.name])
        self.layout.bind(module, self.row)
        self._problem = replace(problem, module=module, train=train)
        self._module: nn.Module = module
        taken = np.arange(len(train)) if places is None else places
        if len(taken) > examples:
            taken = taken[np.arange(examples) * len(taken) // examples]
        self.places = taken
        self._chunks = [
            train[torch.from_numpy(part)] for part in np.array_split(taken, -(-len(taken) // chunk))
        ]
        self._total = sum(problem.weigh(chunk) for chunk in self._chunks)
        self._each = PerSampleGradients(self._problem, self.layout)

    def gradient(self) -> tuple[float, Tensor]:
        """Return f and G (d,)."""
        whole, row = 0.0, torch.zeros_like(self.row)
        for chunk in self._chunks:
            loss = self._loss(chunk)
            whole += loss.item()
            self._add_(row, torch.autograd.grad(loss, self._parameters(), allow_unused=True))
        return whole, row

    def hessian_times(self, vector: Tensor) -> Tensor:
        """Return H ``vector``, (d,)."""
        row, parameters = torch.zeros_like(self.row), self._parameters()
        # The fused kernels of attention have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            for chunk in self._chunks:
                grads = torch.autograd.grad(
                    self._loss(chunk), parameters, create_graph=True, allow_unused=True
                )
                terms = [
                    (g * v).sum()
                    for g, v in zip(grads, self.layout.views(vector), strict=True)
                    if g is not None and g.requires_grad
                ]
                if terms:  # else linear in all parameters: H = 0
                    total = torch.stack(terms).sum()
                    self._add_(row, torch.autograd.grad(total, parameters, allow_unused=True))
        return row

    def weighted_gradients(self, weights: Tensor) -> Tensor:
        """Return sum_i ``weights``_i g_i, (d,), without holding any g_i."""
        row, begin = torch.zeros_like(self.row), 0
        for chunk in self._chunks:
            end = begin + len(chunk[0])
            # Signs, where a bound's factors are never negative: only the sum is of interest.
            self._each.add_clipped(
                [(1.0, self.row)], chunk, _Weights(weights[begin:end, None]), row, self._bind
            )
            begin = end
        return row

    def mean_factor(self, clip: AnyClip) -> float:
        """Return the mean of what ``clip`` multiplies an example's gradient by."""
        total, row = 0.0, torch.zeros_like(self.row)
        for chunk in self._chunks:
            kept = _Factors(clip)
            self._each.add_clipped([(1.0, self.row)], chunk, kept, row, self._bind)
            total += kept.mean * len(chunk[0])
        return total / len(self.places)

    def _loss(self, chunk: tuple[Tensor, ...]) -> Tensor:
        share = self._problem.weigh(chunk) / self._total
        return self._problem.loss(self._module, chunk) * share

    def _parameters(self) -> list[nn.Parameter]:
        return self.layout.parameters(self._module)

    def _add_(self, row: Tensor, grads: tuple[Tensor | None, ...]) -> None:
        for view, grad in zip(self.layout.views(row), grads, strict=True):
            if grad is not None:
                view += grad

    def _bind(self, row: Tensor) -> None:
        self.layout.bind(self._module, row)


@dataclass(frozen=True)
class _Weights:
    """Multiplies each example's gradient by a number given for it, (examples, 1)."""

    values: Tensor

    def factors(self, squares: Tensor) -> Tensor:
        return self.values.to(squares)


@dataclass
class _Factors:
    """A bound that keeps the mean of its factors."""

    clip: AnyClip
    mean: float = 0.0

    def factors(self, squares: Tensor) -> Tensor:
        found = self.clip.factors(squares)
        self.mean = float(found.mean())
        return found


@dataclass(frozen=True)
class _Double:
    """A dataset whose floating point columns are float64."""

    dataset: Dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.double() if t.is_floating_point() else t for t in self.dataset[indices])
