"""How good a run is at a moment: figures of the mean row, of each rank's row, and their distance.

Every rank evaluates its own part and the parts are added in rank order, so that the figures do not
depend on how ranks are split over processes. Nothing here counts as the run's traffic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from gossamer.algorithms.oracles.buffers import BufferRows
from gossamer.algorithms.problems import Dataset, Problem, Stream
from gossamer.algorithms.protocols import Oracle
from gossamer.algorithms.tasks.arrays import TensorDataset
from gossamer.runtime.collectives import RankGroup
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.random import derive_key
from gossamer.runtime.rows import empty_rows, row_dot, row_norm

__all__ = ["Evaluator"]

_STREAM_EXAMPLES = 1024
"""Fresh examples per rank that stand for the objective of a stream."""
_TEXT_EXAMPLES = 128
"""Windows of text per rank that stand for a language model's objective."""
_CHUNK = 512
"""Examples of a forward pass."""
_COLUMNS = 2**20
"""Columns of a row that are compared at once, to hold no second row."""

Part = tuple[Dataset, np.ndarray]
"""Examples to evaluate: a dataset and int64 places in it."""


class Evaluator:
    """Computes the figures of a run that need more than a step's batch.

    The module is in evaluation mode meanwhile (no dropout; batch normalisation by running averages:
    of the mean row, those are the means over ranks) and is bound again to what it was bound to.
    """

    def __init__(
        self,
        comm: RankGroup,
        oracle: Oracle,
        problem: Problem,
        *,
        objective: Literal["ranks", "examples"] | None = None,
        examples: int | None = None,
        per_rank: bool = True,
        rank_grad_norm: bool = False,
        training: bool = True,
        gradient: bool | None = None,
        chunk: int | None = None,
        seed: int = 0,
    ) -> None:
        """Get ready to evaluate; every process passes the same arguments.

        Args:
            comm: how ranks talk.
            oracle: after ``setup``; gives the layout of a row, and the ranks' ``buffers`` where it
                keeps some.
            problem: the module, the data, the loss and the score.
            objective: f, the mean of the ranks' f_i or the mean over examples; what the oracle
                trains when None.
            examples: at most so many of each shard and of the test set, evenly spaced over it.
                None: all of a finite dataset, but 128 of a language model's, whose full gradient
                costs more than most runs; 1,024 of a stream.
            per_rank: evaluate every rank's own row too.
            rank_grad_norm: compute the gradient of f at every rank's row too: n times the work.
            training: also what comes of the training examples; where False, and there is no test
                set, only the consensus is left.
            gradient: compute grad_norm, which takes a row and the graph of a forward pass; None:
                where the oracle backpropagates, too.
            chunk: examples of one forward pass at most; None: as many as the oracle takes, or 512.
            seed: of a stream's examples, which differ from those of the training.

        Raises:
            ConfigError: ``examples`` or ``gradient`` where a task's own figures are the evaluation.
        """
        for name, value in (("examples", examples), ("gradient", gradient)):
            if problem.contrast is not None and value is not None:
                raise ConfigError(
                    f"evaluate_{name}: has no effect on a task of comparisons, got {value}; leave "
                    "it out, and set the task's probe_examples"
                )
        self._comm, self._layout, self._problem = comm, oracle.layout, problem
        self._buffers: BufferRows | None = getattr(oracle, "buffers", None)
        self._objective = objective or oracle.weighting or problem.objective
        # A loss that is not weighed by examples is one per token: the language models' mark.
        self._per_token = problem.weigh is not Problem.weigh
        self._examples = examples or (_TEXT_EXAMPLES if self._per_token else None)
        self._chunk = chunk or oracle.examples_at_once or _CHUNK
        self._gradient = oracle.backpropagates if gradient is None else gradient
        self._training = training
        self._per_rank, self._rank_grad_norm = per_rank, rank_grad_norm
        self._stream_seed = derive_key(seed, "evaluation")
        self._score_names: list[str] = []
        if problem.score is not None:
            dataset, places = self._shard(comm.ranks.start)
            with self._evaluating(), torch.no_grad():
                scores = problem.score(problem.module, self._look_up(dataset, places[:1]))
            self._score_names = list(scores)

    def evaluate(self, x: Tensor, *, equal: bool = False) -> dict[str, float]:
        """Return the figures at ``x``, the same on every process.

        - ``loss``, ``grad_norm``: f and |grad f| at the mean row, over the training examples;
          without gradients the loss alone.
        - ``consensus``: sqrt(sum_i |x_i - mean|^2 / n).
        - ``test_loss``: the loss of the mean row on the test set, where there is one.
        - ``dev_loss``, ``dev_accuracy``: of the mean row on the examples to choose by, likewise.
        - ``accuracy`` (or what the task's score is called): of the mean row on the test set, or on
          the training examples where there is none.
        - ``rank_loss``, ``worst_rank_loss``, ``rank_accuracy``, ``worst_rank_accuracy``: mean and
          worst over ranks of what each one's own row does on the whole test set, or on the rank's
          own training examples where there is none.
        - ``perplexity``: exp(test_loss), or of the loss, where that is a mean over tokens.
        - ``rank_grad_norm``: the mean over ranks of |grad f(x_i)|.
        - what the problem's ``figures`` add, where the ranks' rows differ.

        Args:
            x: (local, d), the hosted ranks' parameters; kept.
            equal: all ranks' rows are equal to the bit: their mean is one of them, and no copy.
        """
        comm, problem = self._comm, self._problem
        with self._evaluating():
            self._bind_mean_buffers()
            equal = equal or comm.n == 1
            mean = x[:1] if equal else comm.all_reduce(x, op="mean", count=False)
            figures = {"consensus": 0.0 if equal else self._distance(x, mean)}
            if problem.contrast is not None:
                assert problem.figures is not None
                return figures | problem.figures(comm, self._layout, x, mean)
            if self._training:
                figures |= self._objective_at(mean, self._gradient)
            if self._training and self._rank_grad_norm:
                rows = comm.all_gather(x, count=False)
                norms = [self._objective_at(row[None])["grad_norm"] for row in rows]
                figures["rank_grad_norm"] = sum(norms) / comm.n
            if problem.test is not None:
                found = self._held_out_at(problem.test, mean)
                figures |= {"test_loss": found.pop("loss"), **found}
            if problem.dev is not None:
                found = self._held_out_at(problem.dev, mean)
                figures |= {f"dev_{name}": value for name, value in found.items()}
            if self._per_rank and (self._training or problem.test is not None):
                figures |= self._by_rank(x)
            if problem.figures is not None and not equal:
                figures |= problem.figures(comm, self._layout, x, mean)
        nats = figures.get("test_loss", figures.get("loss"))
        if self._per_token and nats is not None:
            figures["perplexity"] = torch.tensor(nats, dtype=torch.float64).exp().item()
        return figures

    @property
    def training_names(self) -> set[str]:
        """The figures that come of the training examples."""
        names = {"loss", "grad_norm", "rank_grad_norm"}
        if self._problem.test is None:
            scores = {"loss", *self._score_names}
            names |= {"perplexity", *scores}
            names |= {f"{where}{name}" for where in ("rank_", "worst_rank_") for name in scores}
        return names

    # --- figures ----------------------------------------------------------------------------

    def _objective_at(self, point: Tensor, gradient: bool = True) -> dict[str, float]:
        """Return f at ``point`` (1, d), the norm of its gradient, and the score if no test has."""
        comm, layout = self._comm, self._layout
        shape = (comm.local, layout.d) if gradient else (comm.local, 0)
        grads = empty_rows(*shape, layout.dtype, point.device)
        sums = []
        for rank, grad in zip(comm.ranks, grads, strict=True):
            layout.bind(self._problem.module, point[0], grad if gradient else None)
            scored = self._problem.test is None  # else it would be computed for nothing
            sums.append(self._sums(self._shard(rank), backward=gradient, scored=scored))
        weight, table = self._table(sums)
        share = torch.where(weight > 0, 1 / weight, 0.0)
        if self._problem.uneven and self._objective == "ranks":  # those that have a token
            share = share * (comm.n / comm.all_reduce((weight > 0).double(), count=False))
        if self._objective == "examples":
            whole = weight * self._thinned()
            share = share * whole * (comm.n / comm.all_reduce(whole, count=False))
        # Now row i is rank i's term of a mean over ranks: f_i, or n N_i / N f_i.
        figures = self._named(comm.all_reduce(table * share, op="mean", count=False)[0])
        if not gradient:
            return figures
        mean = comm.all_reduce(grads.mul_(share.to(grads)), op="mean", count=False)
        return {**figures, "grad_norm": float(row_norm(mean))}

    def _held_out_at(self, held_out: Dataset, mean: Tensor) -> dict[str, float]:
        """Return loss and score of the mean row: rank i evaluates the i-th part of the examples."""
        comm = self._comm
        parts = np.array_split(self._test_places(held_out), comm.n)
        self._layout.bind(self._problem.module, mean[0])
        weight, table = self._table([self._sums((held_out, parts[rank])) for rank in comm.ranks])
        weight, table = (comm.all_reduce(t, count=False) for t in (weight, table))
        return self._named((table / weight)[0])

    def _by_rank(self, x: Tensor) -> dict[str, float]:
        """Return mean and worst over ranks of what each one's own row does."""
        test, sums = self._problem.test, []
        for i, (rank, row) in enumerate(zip(self._comm.ranks, x, strict=True)):
            self._layout.bind(self._problem.module, row)
            if self._buffers is not None:
                self._buffers.bind(i)
            part = self._shard(rank) if test is None else (test, self._test_places(test))
            sums.append(self._sums(part))
        weight, table = self._table(sums)
        rows = self._comm.all_gather(torch.cat([weight, table / weight], dim=1), count=False)
        rows = rows[rows[:, 0] > 0][:, 1:]  # a rank's texts may have no token to predict
        mean, high, low = (
            self._named(t) for t in (rows.mean(dim=0), rows.amax(dim=0), rows.amin(dim=0))
        )
        figures = {f"rank_{name}": value for name, value in mean.items()}
        for name in mean:
            figures[f"worst_rank_{name}"] = (high if name == "loss" else low)[name]
        return figures

    def _distance(self, x: Tensor, mean: Tensor) -> float:
        squares = torch.zeros(len(x), 1, dtype=torch.float64, device=x.device)
        for columns in zip(x.split(_COLUMNS, dim=1), mean.split(_COLUMNS, dim=1), strict=True):
            apart = torch.sub(*columns)
            squares += row_dot(apart, apart)
        return math.sqrt(self._comm.all_reduce(squares, count=False).item() / self._comm.n)

    # --- sums over examples -----------------------------------------------------------------

    def _sums(self, part: Part, backward: bool = False, scored: bool = True) -> list[float]:
        """Return [weight, loss, *score] summed over ``part``; gradients add to the bound row."""
        problem, (dataset, places) = self._problem, part
        names = self._score_names if scored else []
        sums = [0.0] * (2 + len(names))
        for begin in range(0, len(places), self._chunk):
            inputs = self._look_up(dataset, places[begin : begin + self._chunk])
            weight = problem.weigh(inputs)
            if not weight:
                continue  # no token to predict: the mean loss is none
            with torch.set_grad_enabled(backward):
                loss = problem.loss(problem.module, inputs) * weight
                if backward:
                    loss.backward()
            terms = [weight, loss.item()]
            if problem.score is not None and names:
                with torch.no_grad():
                    scores = problem.score(problem.module, inputs)
                terms += [scores[name].item() for name in names]
            sums = [a + b for a, b in zip(sums, terms, strict=True)]
        return sums

    def _table(self, sums: list[list[float]]) -> tuple[Tensor, Tensor]:
        """Return the weights (local, 1) and the other sums (local, k), float64."""
        table = torch.tensor(sums, dtype=torch.float64, device=self._comm.device)
        return table[:, :1].contiguous(), table[:, 1:].contiguous()

    def _named(self, values: Tensor) -> dict[str, float]:
        names = ["loss", *self._score_names][: len(values)]
        return dict(zip(names, values.tolist(), strict=True))

    # --- examples ---------------------------------------------------------------------------

    def _shard(self, rank: int) -> Part:
        """Return the training examples that stand for f_i of ``rank``."""
        if hasattr(self._problem.train, "draw"):
            count = self._examples or _STREAM_EXAMPLES
            stream = cast(Stream, self._problem.train)
            drawn = TensorDataset(stream.draw(self._stream_seed, rank, 0, 0, count))
            return drawn, np.arange(count)
        shard = self._problem.shards[rank]
        return self._problem.train, _spread(shard, self._examples)

    def _thinned(self) -> Tensor:
        """Return how many examples of a shard each evaluated one stands for, (local, 1)."""
        sizes = [len(s) for s in self._problem.shards] or [1] * self._comm.n
        most = self._examples or max(sizes)
        ratios = [[sizes[rank] / min(sizes[rank], most)] for rank in self._comm.ranks]
        return torch.tensor(ratios, dtype=torch.float64, device=self._comm.device)

    def _test_places(self, test: Dataset) -> np.ndarray:
        return _spread(np.arange(len(test)), self._examples)

    def _look_up(self, dataset: Dataset, places: np.ndarray) -> tuple[Tensor, ...]:
        return tuple(t.to(self._comm.device) for t in dataset[torch.from_numpy(places)])

    # --- the module -------------------------------------------------------------------------

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Put the module in evaluation mode; give mode, tensors and gradients back afterwards."""
        module = self._problem.module
        modes = [(m, m.training) for m in module.modules()]
        bound = [(t, t.data, t.grad) for t in (*module.parameters(), *module.buffers())]
        module.eval()
        try:
            yield
        finally:
            for tensor, data, grad in bound:
                tensor.data, tensor.grad = data, grad
            for m, mode in modes:
                m.training = mode

    def _bind_mean_buffers(self) -> None:
        """Make the module's floating buffers the means over the ranks' ones."""
        buffers = [b for b in self._problem.module.buffers() if b.is_floating_point()]
        if self._buffers is None or not buffers:
            return
        rows = []
        for i in range(self._comm.local):
            self._buffers.bind(i)
            # float64: the mean of equal float32 buffers (masks, frequencies) is that buffer.
            rows.append(torch.cat([b.double().flatten() for b in buffers]))
        mean = self._comm.all_reduce(torch.stack(rows), op="mean", count=False)[0]
        for buffer, values in zip(
            buffers, torch.split(mean, [b.numel() for b in buffers]), strict=True
        ):
            buffer.data = values.view_as(buffer).to(buffer.dtype)


def _spread(places: np.ndarray, most: int | None) -> np.ndarray:
    """Return at most ``most`` of ``places``, evenly spaced: sorted shards keep their classes."""
    if most is None or len(places) <= most:
        return places
    return places[np.arange(most) * len(places) // most]
