"""A small problem with exact gradients, and ways to run algorithms over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from gossamer.algorithms.estimates import Estimate
from gossamer.algorithms.optimizers.sgd import SGD, Momentum
from gossamer.algorithms.problems import Batch, DataPlan, Problem, RankBatches
from gossamer.algorithms.protocols import Algorithm, Oracle
from gossamer.runtime import Communicator, RowLayout, StackedTransport
from gossamer.topologies import Round, Topology

ROWS = 12
"""Examples per rank."""
LR = 0.3
PLAIN, MOMENTUM = SGD(lr=LR), Momentum(lr=LR, beta=0.9, nesterov=True)


class _Parameters(nn.Module):
    """Two tensors, 5 and 2 x 3, which do not fill a row: there is padding."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(5, dtype=dtype))
        self.b = nn.Parameter(torch.zeros(2, 3, dtype=dtype))


class LogisticOracle(Oracle):
    """f_i(x) = scale (mean log(1 + exp(-b a.x)) + .1 sum x^2 / (1 + x^2)), unlike data by rank.

    Gradients are computed row by row in float64, so their bits depend on the row alone.
    """

    name: Literal["logistic"] = "logistic"
    scale: float = 1.0
    dtype: Literal["float32", "float64"] = "float64"
    _comm: Any = PrivateAttr(default=None)
    _layout: Any = PrivateAttr(default=None)

    def model_post_init(self, context: Any) -> None:
        self._layout = RowLayout(_Parameters(getattr(torch, self.dtype)))

    def setup(self, comm: Communicator, problem: Problem | None = None) -> DataPlan:
        self._comm = comm
        return DataPlan(batch_size=ROWS, sampling="full")

    @property
    def layout(self) -> RowLayout:
        return self._layout

    @property
    def used(self) -> np.ndarray:
        """Places of a row that are parameters."""
        return np.concatenate([np.arange(s.begin, s.end) for s in self._layout.slices])

    def data(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """Return features (ROWS, d), zero on the padding, and labels; skewed by rank."""
        random = np.random.default_rng(rank)
        features = np.zeros((ROWS, self._layout.d))
        features[:, self.used] = random.normal(size=(ROWS, self._layout.size)) + 0.3 * (rank % 3)
        return features, np.where(random.uniform(size=ROWS) < 0.2 + 0.15 * (rank % 5), 1.0, -1.0)

    def gradient(self, rank: int, x: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return the gradient of f_i at x (d,) over the examples at ``places``."""
        features, labels = self.data(rank)
        a, b = features[places], labels[places]
        slope = -b / (1 + np.exp(b * (a * x).sum(axis=1)))
        penalty = 0.2 * x / (1 + x * x) ** 2
        return self.scale * ((a * slope[:, None]).sum(axis=0) / len(places) + penalty)

    def __call__(
        self,
        x: Tensor,
        batch: RankBatches,
        *,
        combine: Sequence[tuple[float, Tensor]] | None = None,
        sink: Any = None,
    ) -> Estimate:
        grad = torch.zeros_like(x)
        for i, (rank, examples) in enumerate(zip(self._comm.ranks, batch, strict=True)):
            places = examples.inputs[0].numpy()
            for c, point in combine or [(1.0, x)]:
                g = self.gradient(rank, point[i].double().numpy(), places)
                grad[i] += torch.from_numpy(c * g).to(grad.dtype)
        return Estimate(self.loss(x, batch), grad, torch.full((len(x),), 1.0, dtype=torch.float64))

    def loss(self, x: Tensor, batch: RankBatches) -> Tensor:
        losses = []
        for rank, row, examples in zip(self._comm.ranks, x, batch, strict=True):
            features, labels = (v[examples.inputs[0].numpy()] for v in self.data(rank))
            margin = labels * (features * row.double().numpy()).sum(axis=1)
            losses.append(self.scale * np.log1p(np.exp(-margin)).mean())
        return torch.tensor(losses, dtype=torch.float64)


def places(rank: int, step: int, draw: int, size: int | None) -> np.ndarray:
    """Return which examples a rank sees: all (None), or ``size`` drawn with replacement."""
    if size is None:
        return np.arange(ROWS)
    return np.random.default_rng((rank, step, draw)).integers(0, ROWS, size)


class Trial:
    """One algorithm over the logistic problem; all ranks in one process unless told otherwise."""

    def __init__(
        self,
        algorithm: Algorithm,
        topology: Topology,
        *,
        oracle: LogisticOracle | None = None,
        x0: np.ndarray | None = None,
        batch_size: int | None = None,
        steps: int | None = None,
        transport: Any = None,
    ) -> None:
        self.oracle = oracle or LogisticOracle()
        self.algorithm, self.batch_size = algorithm, batch_size
        self.comm = Communicator(
            algorithm.adapt(topology), transport or StackedTransport(), steps=steps
        )
        self.oracle.setup(self.comm)
        layout = self.oracle.layout
        x = self.comm.alloc(layout.d, layout.dtype)
        x[:] = torch.from_numpy(start(self.oracle) if x0 is None else x0)
        self.state = algorithm.init(self.comm, self.oracle, x, self._batches())

    def _batches(self) -> list[list[Batch]]:
        return [
            [
                Batch((torch.from_numpy(places(r, self.comm.step, draw, self.batch_size)),))
                for r in self.comm.ranks
            ]
            for draw in range(self.algorithm.batches_per_step)
        ]

    def step(self, count: int = 1) -> Any:
        """Make ``count`` steps as the loop does; return the last figures."""
        for _ in range(count):
            figures = self.algorithm.step(self.comm, self.oracle, self.state, self._batches())
            self.comm.step += 1
            self.comm.round += self.algorithm.rounds_per_step
        return figures

    @property
    def x(self) -> np.ndarray:
        """The parameters, a copy."""
        return self.state.x.numpy().copy()

    def gradients(self, x: np.ndarray, step: int, draw: int = 0) -> np.ndarray:
        """Return what the oracle said at x (n, d) in a step, for references."""
        return np.stack(
            [
                self.oracle.gradient(r, x[r], places(r, step, draw, self.batch_size))
                for r in range(self.comm.n)
            ]
        )


def start(oracle: LogisticOracle) -> np.ndarray:
    """Return a point that is not a special one, (1, d), zero on the padding."""
    x0 = np.zeros((1, oracle.layout.d))
    x0[0, oracle.used] = np.random.default_rng(99).normal(size=oracle.layout.size)
    return x0


def digraph(n: int, extra: Sequence[tuple[int, int]] = ((2, 0), (4, 0), (6, 0))) -> Topology:
    """i -> i + 1, and ``extra`` (source, target); column weights 1 / out-degree, own included."""
    adjacency = np.eye(n)
    for i in range(n):
        adjacency[(i + 1) % n, i] = 1
    for source, target in extra:
        adjacency[target, source] = 1
    return Topology.static("digraph", Round.from_matrix(adjacency / adjacency.sum(axis=0)))


def switching_digraph(n: int) -> Topology:
    """Two column-stochastic rounds in turn, with different diagonals."""
    first, second = digraph(n, ()), digraph(n, ((2, 0), (4, 0), (6, 0), (1, 4)))
    return Topology("switching", n, lambda t: (first, second)[t].round(0), kind="CS", period=2)


def matrix(topology: Topology, t: int = 0) -> np.ndarray:
    """Return W(t)."""
    return topology.round(t).matrix()


def close(a: np.ndarray, b: np.ndarray) -> None:
    """Compare with a reference: a few dozen steps whose sums run in another order."""
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
