"""Problems: what a task hands over, and how its examples are drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.algorithms.contrastive.contrast import Contrast
from gossamer.runtime.collectives import RankGroup
from gossamer.runtime.component import Component
from gossamer.runtime.random import derive_key
from gossamer.runtime.rows import RowLayout, Slice

__all__ = [
    "Batch",
    "Batches",
    "DataPlan",
    "Dataset",
    "Figures",
    "Problem",
    "RankBatches",
    "Restarts",
    "Stream",
    "Task",
    "default_dtype",
]


class Dataset(Protocol):
    """A finite set of examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, ...]:
        """Return the examples at int64 ``indices`` (m,): tensors whose first size is m.

        Each example's depend on itself alone, unless the dataset has ``pads_lookups = True``.
        """
        ...


class Stream(Protocol):
    """Examples without end: drawn, not looked up.

    One with ``sequential = True`` is read in order: where a step of the run has K draws, draw k of
    step t is asked for as draw 0 of step t K + k, so that consecutive steps are neighbours.
    """

    def draw(self, seed: int, rank: int, step: int, draw: int, count: int) -> tuple[Tensor, ...]:
        """Return ``count`` fresh examples: a pure function of the arguments."""
        ...


@dataclass(frozen=True)
class Batch:
    """One rank's examples of one update.

    Attributes:
        inputs: what the loss takes after the module; the first size is the number of examples.
        indices: int64 (examples,), their places in the dataset; None unless the plan asks.
        block: which of the plan's blocks they were drawn from.
        drawn: (step, draw) whose coins or order chose them, alike for the batches of all ranks;
            None: nothing chose, they are the whole shard or were put together by hand.
    """

    inputs: tuple[Tensor, ...]
    indices: Tensor | None = None
    block: int = 0
    drawn: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.inputs[0])


RankBatches = Sequence[Batch]
"""One batch per hosted rank."""
Batches = Sequence[RankBatches]
"""``batches_per_step`` draws, each with one batch per hosted rank."""


@dataclass(frozen=True)
class DataPlan:
    """How an oracle wants its batches drawn.

    Attributes:
        batch_size: examples per rank and draw (the expected number under ``poisson``).
        sampling: ``shuffle`` (epochs without replacement), ``replacement``, ``poisson`` (each
            example by its own coin) or ``full`` (the whole shard, ``batch_size`` ignored).
        indices: whether batches carry the examples' places in the dataset.
        rate: probability of an example under ``poisson``, the same on every rank; None:
            ``batch_size`` over the length of the rank's shard.
        seed_of: rank -> seed of its coins under ``poisson``, where they must stay secret; asked
            for at every draw. None: the run's seed.
        shards: per rank, int64 places in the training set to draw from; None: the problem's own.
        blocks: parts of each shard that take turns under ``poisson``, draw by draw, each at
            ``blocks`` times the rate. An example's block follows from its place in the shard.
        parts: shards of each rank, consecutive ones of ``shards``: each is shuffled by itself and
            gives as many examples of a batch, so that what all ranks draw together does not
            depend on how many they are. Divides ``batch_size``.
    """

    batch_size: int
    sampling: Literal["shuffle", "replacement", "poisson", "full"] = "shuffle"
    indices: bool = False
    rate: float | None = None
    seed_of: Callable[[int], int] | None = None
    shards: tuple[np.ndarray, ...] | None = None
    blocks: int = 1
    parts: int = 1


Loss = Callable[[nn.Module, tuple[Tensor, ...]], Tensor]
Score = Callable[[nn.Module, tuple[Tensor, ...]], dict[str, Tensor]]


Figures = Callable[[RankGroup, RowLayout, Tensor, Tensor], dict[str, float]]


class Restarts(Protocol):
    """Moves parameters into what is not trained from time to time, so that outputs stay."""

    @property
    def every(self) -> int:
        """Steps between two times."""
        ...

    def merge_(self, module: nn.Module, step: int) -> Sequence[str]:
        """Do it to the module as it is bound; return the parameters that begin anew."""
        ...

    def prune_(self, state: Tensor, where: Slice, step: int) -> None:
        """Reset an optimizer's state (local, d) of a parameter that begins anew, in place."""
        ...


def _count_examples(inputs: tuple[Tensor, ...]) -> float:
    return float(len(inputs[0]))


@dataclass
class Problem:
    """A task made ready for n ranks.

    Attributes:
        module: holds x0: the same parameters on every rank, a function of the seed alone.
        train: the examples.
        shards: per rank, int64 places in ``train``; empty for a stream.
        test: held-out examples, or None.
        dev: further ones, to choose by, or None.
        loss: (module, inputs) -> (): the mean over examples (tokens for a language model).
        score: (module, inputs) -> sums over examples, each divided by their ``weigh`` at the end:
            ``{"accuracy": number right}``; None where the task has none.
        weigh: inputs -> how many examples (tokens) the mean of ``loss`` runs over.
        objective: what f is when the user says nothing: the mean over ranks of f_i, or over
            examples.
        mixes_examples: whether an example's inputs were made with knowledge of other training
            examples (their mean, say), so that no privacy of single examples can be had.
        uneven: whether batches of one size may weigh differently: documents of unequal length.
        figures: (ranks, layout, rows (local, d), their mean (1, d)) -> figures of an evaluation;
            every process calls it; None: none.
        restarts: what moves parameters into what is not trained between steps; None: nothing.
        contrast: views and an encoder, where examples have no loss of their own but by comparison;
            ``loss`` is not called then, and ``figures`` make the whole evaluation;
            the oracle tells them its inverse temperature, where they have a ``beta``.
    """

    module: nn.Module
    train: Dataset | Stream
    shards: tuple[np.ndarray, ...]
    loss: Loss
    test: Dataset | None = None
    dev: Dataset | None = None
    score: Score | None = None
    weigh: Callable[[tuple[Tensor, ...]], float] = _count_examples
    objective: Literal["ranks", "examples"] = "ranks"
    mixes_examples: bool = False
    uneven: bool = False
    figures: Figures | None = None
    restarts: Restarts | None = None
    contrast: Contrast | None = None

    def examples(self, count: int) -> tuple[Tensor, ...]:
        """Return at most ``count`` from all over the training set: sorted ones keep their classes.

        To look at the model with, not to train it.
        """
        train: Any = self.train
        if hasattr(train, "draw"):
            # No run's seed: a sequential stream would leave the place where the run reads on.
            seed = derive_key(0, "examples")
            drawn: tuple[Tensor, ...] = train.draw(seed, 0, 0, 0, count)
            return drawn
        count = min(count, len(train))
        places = torch.arange(count) * (len(train) - 1) // max(count - 1, 1)
        found: tuple[Tensor, ...] = train[places]
        return found


class Task(Component, ABC):
    """A model, its data (sharded over ranks) and its metrics."""

    name: str = ""

    @abstractmethod
    def build(self, n: int, seed: int) -> Problem:
        """Load, split over n ranks, and build the module.

        Raises:
            ConfigError: a file is missing or broken, or there are fewer examples than ranks.
        """


def default_dtype(dtype: Literal["float32", "float64"]) -> torch.dtype:
    """Return the torch dtype a task calls by name."""
    return {"float32": torch.float32, "float64": torch.float64}[dtype]
