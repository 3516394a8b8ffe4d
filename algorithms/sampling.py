"""Which examples a rank sees when: a pure function of (seed, step, draw).

Nothing is kept between calls but caches, so a resumed run draws what the undisturbed one would
have drawn, and a rank's batches do not depend on which process hosts it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from gossamer.algorithms.problems import Batch, DataPlan, Dataset, Problem, Stream
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.native import ALIGNMENT
from gossamer.runtime.random import Random

__all__ = ["Sampler"]


@dataclass(frozen=True)
class _Group:
    """Hosted ranks whose shards have one length, drawn together.

    Attributes:
        rows: their places among the hosted ranks.
        ranks: their ids.
        shards: int64 (ranks, length), places in the dataset.
    """

    rows: tuple[int, ...]
    ranks: tuple[int, ...]
    shards: np.ndarray

    def take(self, places: np.ndarray) -> np.ndarray:
        """Return the dataset places at ``places`` (ranks, m) of each shard."""
        return np.take_along_axis(self.shards, places, axis=1)


class Sampler:
    """Draws the hosted ranks' batches as an oracle's plan asks.

    ``shuffle`` goes through the shard in a fresh counted permutation per epoch. An epoch ends where
    the shard does, not where a batch does: a batch may span two epochs, and one that is larger than
    the shard holds whole passes over it. Ranks with shorter shards are in later epochs.

    Example:
        >>> from gossamer.algorithms.tasks.bundled import Digits
        >>> problem = Digits().build(n=4, seed=0)
        >>> sampler = Sampler(problem, DataPlan(batch_size=32), ranks=range(4), seed=0)
        >>> [[len(batch) for batch in draw] for draw in sampler.batches(step=7, count=1)]
        [[32, 32, 32, 32]]
    """

    def __init__(self, problem: Problem, plan: DataPlan, ranks: Iterable[int], seed: int) -> None:
        """Get ready to draw.

        Args:
            problem: whose training examples are drawn, unless the plan says from which.
            plan: how the oracle wants them.
            ranks: those hosted here.
            seed: of the draws, the run's.

        Raises:
            ConfigError: an empty shard, a Poisson rate above 1, or a plan that needs a finite
                dataset where the task is a stream.
        """
        self._problem, self._plan = problem, plan
        self._ranks, self._seed = tuple(ranks), seed
        self._random = Random(seed)
        self._shards = problem.shards if plan.shards is None else plan.shards
        self._is_stream = hasattr(problem.train, "draw")
        self._size = plan.batch_size // plan.parts
        self._check()
        owned = [rank * plan.parts + part for rank in self._ranks for part in range(plan.parts)]
        self._groups = [] if self._is_stream else _group(self._shards, owned)
        self._epochs: dict[int, tuple[int, np.ndarray]] = {}
        self._whole: list[Batch] | None = None

    def batches(self, step: int, count: int) -> list[list[Batch]]:
        """Return ``count`` draws of ``step``, each with one batch per hosted rank.

        Args:
            step: from 0.
            count: draws of every step of the run, so that a shuffled epoch goes on from step to
                step.
        """
        if self._is_stream:
            return [self._fresh(step, draw, count) for draw in range(count)]
        if self._plan.sampling == "full":
            if self._whole is None:
                self._whole = self._fetch(self._joined(self._shards, self._ranks))
            return [self._whole] * count
        places: list[np.ndarray] = []
        for draw in range(count):
            drawn: dict[int, np.ndarray] = {}
            for group in self._groups:
                drawn.update(zip(group.rows, self._draw(group, step, draw, count), strict=True))
            parts = [drawn[row] for row in range(len(drawn))]
            places += self._joined(parts, range(len(self._ranks)))
        local = len(self._ranks)
        batches = self._fetch(places)
        return [
            [
                replace(batch, block=(step * count + draw) % self._plan.blocks, drawn=(step, draw))
                for batch in batches[draw * local : (draw + 1) * local]
            ]
            for draw in range(count)
        ]

    def _joined(self, parts: Sequence[np.ndarray], ranks: Iterable[int]) -> list[np.ndarray]:
        """Return, for each of ``ranks``, its consecutive ``parts`` as one."""
        each = self._plan.parts
        if each == 1:
            return [parts[rank] for rank in ranks]
        return [np.concatenate(parts[rank * each : (rank + 1) * each]) for rank in ranks]

    def _draw(self, group: _Group, step: int, draw: int, count: int) -> list[np.ndarray]:
        """Return the places in the dataset of one draw, per rank of the group."""
        length, size = group.shards.shape[1], self._size
        if self._plan.sampling == "shuffle":
            return list(self._shuffled(group, (step * count + draw) * size))
        if self._plan.sampling == "replacement":
            stream = self._random.stream("data", group.ranks, step, draw)
            return list(group.take(stream.integers(length, size).numpy()))
        rate, blocks = self._plan.rate, self._plan.blocks
        # 32-bit coins, rounded down: never more likely than the rate that privacy is counted for.
        heads = (
            size * blocks * 2**32 // length if rate is None else math.floor(rate * blocks * 2**32)
        )
        # Every blocks-th example: a shard may be sorted, and all its blocks are to be alike.
        parts = group.shards[:, (step * count + draw) % blocks :: blocks]
        return [
            part[self._coins(rank, len(part), step, draw) < heads]
            for rank, part in zip(group.ranks, parts, strict=True)
        ]

    def _coins(self, rank: int, length: int, step: int, draw: int) -> np.ndarray:
        seed_of = self._plan.seed_of
        random = self._random if seed_of is None else Random(seed_of(rank))
        return random.stream("data", [rank], step, draw).integers(2**32, length)[0].numpy()

    def _shuffled(self, group: _Group, first: int) -> np.ndarray:
        """Return samples ``first``.. of the endless sequence of epochs, (ranks, batch_size)."""
        length, size = group.shards.shape[1], self._size
        parts = []
        for epoch in range(first // length, (first + size - 1) // length + 1):
            begin = max(first - epoch * length, 0)
            end = min(first + size - epoch * length, length)
            parts.append(self._epoch(group, epoch)[:, begin:end])
        return np.concatenate(parts, axis=1)

    def _epoch(self, group: _Group, epoch: int) -> np.ndarray:
        """Return the group's shards in the order of ``epoch``, (ranks, length)."""
        length = group.shards.shape[1]
        cached, order = self._epochs.get(length, (None, group.shards))
        if cached != epoch:
            stream = self._random.stream("data", group.ranks, step=epoch)
            order = group.take(stream.permutation(length).numpy())
            self._epochs[length] = (epoch, order)
        return order

    def _fresh(self, step: int, draw: int, count: int) -> list[Batch]:
        stream = cast(Stream, self._problem.train)
        size = self._plan.batch_size
        sequential = getattr(stream, "sequential", False)
        at = (step * count + draw, 0) if sequential else (step, draw)
        return [
            Batch(stream.draw(self._seed, rank, *at, size), drawn=(step, draw))
            for rank in self._ranks
        ]

    def _fetch(self, places: list[np.ndarray]) -> list[Batch]:
        """Look all examples up at once, then cut them into one batch per element of ``places``.

        One by one where a lookup is padded to its own longest example: a batch must not depend on
        the others that this process happens to host.
        """
        train = cast(Dataset, self._problem.train)
        if len(places) > 1 and getattr(train, "pads_lookups", False):
            return [batch for each in places for batch in self._fetch([each])]
        flat = torch.from_numpy(np.concatenate(places))
        columns = train[flat]
        if self._plan.indices:
            columns = (*columns, flat)
        sizes = [len(p) for p in places]
        cut = [map(_aligned, torch.split(column, sizes)) for column in columns]
        if not self._plan.indices:
            return [Batch(tuple(inputs)) for inputs in zip(*cut, strict=True)]
        return [Batch(tuple(inputs), last) for *inputs, last in zip(*cut, strict=True)]

    def _check(self) -> None:
        plan = self._plan
        if self._is_stream:
            if plan.sampling in ("poisson", "full") or plan.indices:
                wish = "indices" if plan.indices else plan.sampling
                raise ConfigError(
                    f"oracle: asks for '{wish}', which needs a finite dataset, but the task is a "
                    "stream; use a task with a dataset, or sampling: replacement"
                )
            return
        # Of all ranks, not of the hosted ones only: all processes refuse, or none.
        for rank, length in enumerate(map(len, self._shards)):
            if length == 0:
                raise ConfigError(
                    f"task: rank {rank} has no training example; use fewer ranks, or another split"
                )
            most = length // plan.blocks
            if plan.sampling == "poisson" and plan.rate is None and plan.batch_size > most:
                raise ConfigError(
                    f"oracle.batch_size: rank {rank} holds {length} examples in {plan.blocks} "
                    f"blocks, so that each cannot be drawn with probability "
                    f"{plan.batch_size * plan.blocks}/{length}; use at most {most}, or fewer ranks"
                )
            if length < plan.blocks:
                raise ConfigError(
                    f"oracle: rank {rank} holds {length} examples, too few for {plan.blocks} "
                    "blocks; use fewer blocks, or fewer ranks"
                )


def _group(shards: Sequence[np.ndarray], ranks: Sequence[int]) -> list[_Group]:
    by_length: dict[int, list[int]] = {}
    for row, rank in enumerate(ranks):
        by_length.setdefault(len(shards[rank]), []).append(row)
    return [
        _Group(
            rows=tuple(rows),
            ranks=tuple(ranks[row] for row in rows),
            shards=np.stack([shards[ranks[row]] for row in rows]),
        )
        for rows in by_length.values()
    ]


def _aligned(part: Tensor) -> Tensor:
    """Return ``part`` where a fresh tensor would lie: BLAS may round by its operands' alignment.

    Otherwise a rank's gradient would depend on how many ranks' batches were fetched with its own.
    """
    return part if part.data_ptr() % ALIGNMENT == 0 else part.clone()
