"""A quadratic with counted noise, and what filters of its gradient must come to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from gossamer.algorithms.estimates import Estimate, Origin
from gossamer.algorithms.privacy.disk import Disk
from gossamer.algorithms.privacy.doppler import Doppler
from gossamer.algorithms.problems import DataPlan
from gossamer.algorithms.protocols import Oracle
from gossamer.runtime import Communicator, RowLayout, StackedTransport
from gossamer.topologies import build

D = 40
CURVATURE = np.logspace(-3, 0, D)
FILTERS = {
    "none": {"filter": "none"},
    "ema": {"beta": 0.9},
    "bilinear": {"filter": "bilinear", "beta": 0.5},
    "butter2": {"filter": "butter2", "cutoff": 0.1},
    "cheby_default": {"filter": "cheby_default"},
    "fir": {"b": [0.5, 0.3, 0.2]},
    "order 3": {"a": [-1.2, 0.5, -0.1], "b": [0.1, 0.2]},
}
PAIRS = [(0.7, 0.5), (0.5, 0.7), (0.3, 2.33), (0.1, 1.0), (0.5, 1.0), (0.3, 0.0)]
"""(kappa, gamma): the last two take one evaluation."""
STACKS = {f"doppler {name}": partial(Doppler, **fields) for name, fields in FILTERS.items()}
STACKS |= {f"disk {k} {g}": partial(Disk, kappa=k, gamma=g) for k, g in PAIRS}


class Quadratic(Oracle):
    """f = sum_j lambda_j x_j^2 / 2; the gradient plus noise that is a function of the step.

    As under privacy, noise is added once to whatever combination of points is asked for.
    """

    name: Literal["quadratic"] = "quadratic"
    noise: float = 0.0
    dtype: Literal["float32", "float64"] = "float64"
    restart_at: int | None = None
    """The step whose gradients come from another source."""
    _comm: Any = PrivateAttr()
    _points: list[list[tuple[float, Tensor]]] = PrivateAttr(default_factory=list)

    @property
    def points(self) -> list[list[tuple[float, Tensor]]]:
        """Of the last 20 calls: weights and copies of the points where it was evaluated."""
        return self._points

    @property
    def layout(self) -> RowLayout:
        module = nn.Module()
        module.a = nn.Parameter(torch.zeros(D, dtype=getattr(torch, self.dtype)))
        return RowLayout(module)

    def setup(self, comm: Communicator, problem: Any) -> DataPlan:
        self._comm = comm
        return DataPlan(batch_size=1)

    def curvature(self, x: Tensor) -> Tensor:
        padded = torch.zeros(x.shape[1], dtype=torch.float64)
        padded[:D] = torch.from_numpy(CURVATURE)
        return padded.to(x.dtype)

    def noise_rows(self, x: Tensor, step: int) -> Tensor:
        """Return the noise (local, d) of a step."""
        generator = torch.Generator().manual_seed(step)
        # float32 normals are drawn many at a time: 20 times as fast
        return torch.randn(x.shape, generator=generator).to(x.dtype).mul_(self.noise)

    def __call__(
        self,
        x: Tensor,
        batch: Any,
        *,
        combine: Sequence[tuple[float, Tensor]] | None = None,
        sink: Any = None,
    ) -> Estimate:
        at = combine if combine is not None else [(1.0, x)]
        if len(x) < 8:
            self._points = [*self._points[-19:], [(c, point.clone()) for c, point in at]]
        grad = self.noise_rows(x, self._comm.step) if self.noise else torch.zeros_like(x)
        for c, point in at:
            grad.addcmul_(self.curvature(x), point, value=c)
        origin = Origin(self.noise**2, restart=self._comm.step == self.restart_at)
        mean_origin = Origin(self.noise**2 / len(x), restart=origin.restart)
        ones = torch.ones(len(x), dtype=torch.float64)
        return Estimate(0 * ones, grad, ones, origin, mean_origin)

    def loss(self, x: Tensor, batch: Any) -> Tensor:
        return 0.5 * (x.double() ** 2 @ self.curvature(x).double())


class Given(Quadratic):
    """Gradients given beforehand, whatever the point: of shape (steps, local, d)."""

    gradients: Any = None

    def __call__(self, x: Tensor, batch: Any, **ignored: Any) -> Estimate:
        origin = Origin(1.0, restart=self._comm.step == self.restart_at)
        ones = torch.ones(len(x), dtype=torch.float64)
        return Estimate(0 * ones, self.gradients[self._comm.step].clone(), ones, origin, origin)


class Run:
    """An oracle and a local optimizer on n ranks that exchange nothing, from x = 1."""

    def __init__(self, oracle: Oracle, optimizer: Any, ranks: int = 2) -> None:
        self.comm = Communicator(build("ring", ranks), StackedTransport())
        self.oracle, self.optimizer = oracle, optimizer
        oracle.setup(self.comm, None)
        layout = oracle.layout
        self.x = self.comm.alloc(layout.d, layout.dtype)
        self.x[:, :D] = 1
        self.state = optimizer.init(self.x)

    def steps(self, count: int, watch: Callable[[Tensor, Estimate], None] | None = None) -> Run:
        for _ in range(count):
            estimate = self.oracle(self.x, [None] * len(self.x))
            if watch is not None:
                watch(self.x.clone(), estimate)
            grad, origin = estimate.grad, estimate.origin
            self.optimizer.update_(self.state, self.x, grad, self.comm, origin)
            self.comm.step += 1
        return self


def gradients(oracle: Oracle, optimizer: Any, steps: int, ranks: int = 2) -> list[Estimate]:
    """Return copies of the estimates of a run."""
    found: list[Estimate] = []

    def watch(x: Tensor, estimate: Estimate) -> None:
        kept = (estimate.loss, estimate.grad.clone(), estimate.weight)
        found.append(Estimate(*kept, estimate.origin, estimate.mean_origin))

    Run(oracle, optimizer, ranks).steps(steps, watch)
    return found


def given_rows(rows: Tensor, **fields: Any) -> Given:
    return Given(gradients=rows, **fields)


def random_rows(steps: int, local: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(
        steps, local, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def expected_loss(
    method: str, kappa: float, steps: int, std: float, rate: np.ndarray
) -> np.ndarray:
    """Return the mean over the 40 of lambda x_T^2 / 2 from x = 1, exactly, for each rate.

    By mean and covariance of the linear recursion: ``sgd``; ``gain1``, a moving average whose first
    step has gain 1; ``doppler``, the moving average of 1 - kappa with bias correction; ``disk``.
    """
    lam, eta = CURVATURE[None, :], np.asarray(rate, float)[:, None]
    shape = (eta.shape[0], lam.shape[1])
    mean = np.zeros((*shape, 2))
    mean[..., 0] = 1.0
    cov = np.zeros((*shape, 2, 2))
    one = np.ones(shape)
    for t in range(steps):
        if method == "doppler":
            gain, share, c = kappa, 1 - kappa, 1 - (1 - kappa) ** (t + 1)
        else:
            gain, share, c = (1.0, 0.0, 1.0) if t == 0 or method == "sgd" else (kappa, 1 - kappa, 1)
        # second: m (an average of noisy gradients) or, for disk, e (of the noise alone)
        follows = 0.0 if method == "disk" else 1.0
        a = np.empty((*shape, 2, 2))
        a[..., 1, 0], a[..., 1, 1] = gain * lam * follows * one, share
        a[..., 0, 0] = 1 - eta / c * (lam * (1 - follows) + a[..., 1, 0])
        a[..., 0, 1] = -eta / c * share
        b = np.stack([-eta / c * gain * one, gain * one], axis=-1)
        mean = np.einsum("...ij,...j->...i", a, mean)
        cov = a @ cov @ np.swapaxes(a, -1, -2) + std**2 * b[..., :, None] * b[..., None, :]
    return (0.5 * lam * (mean[..., 0] ** 2 + cov[..., 0, 0])).mean(axis=1)
