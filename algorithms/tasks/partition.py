"""Which rank holds which examples: the fields of every task whose data is cut over ranks."""

from __future__ import annotations

from abc import ABC
from typing import Literal

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from gossamer.algorithms.problems import Task
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.random import Random

__all__ = ["ShardedTask"]

_DIRICHLET_DRAWS = 100
"""How often a Dirichlet split that left a rank empty is drawn again."""


class ShardedTask(Task, ABC):
    """A task whose examples are split over the ranks: each lands on exactly one."""

    heterogeneity: Literal["iid", "sorted", "dirichlet", "contiguous"] = "iid"
    """How the ranks' shards differ: `iid` (a seeded permutation, cut), `sorted` (a stable sort by
    label, cut: the hardest), `dirichlet` (each class divided in proportions drawn from
    Dirichlet(alpha)) or `contiguous` (cut in the order of the file)."""
    alpha: float | None = Field(None, gt=0, validate_default=True)
    """Concentration of `dirichlet`, which requires it: 0.1 leaves most ranks a few classes, 100 is
    nearly iid."""
    drop_remainder: bool = False
    """Cut equal shards of floor(N / n) examples and leave the last N mod n out, instead of shards
    whose sizes differ by one. Not for `dirichlet`, whose shards are unequal by nature."""

    @field_validator("alpha")
    @classmethod
    def _alpha_goes_with_dirichlet(cls, alpha: float | None, info: ValidationInfo) -> float | None:
        if info.data.get("heterogeneity") == "dirichlet" and alpha is None:
            raise ValueError("missing; heterogeneity: dirichlet needs a concentration, such as 0.1")
        if info.data.get("heterogeneity", "dirichlet") != "dirichlet" and alpha is not None:
            raise ValueError("has no effect without heterogeneity: dirichlet; leave it out")
        return alpha

    @field_validator("drop_remainder")
    @classmethod
    def _equal_shards_are_cut(cls, drop: bool, info: ValidationInfo) -> bool:
        if drop and info.data.get("heterogeneity") == "dirichlet":
            raise ValueError("dirichlet shards are unequal by nature; leave it out")
        return drop

    def split(self, labels: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, ...]:
        """Return the places of each rank's examples, n non-empty int64 arrays.

        Args:
            labels: int64 (N,), the examples' classes in the order of the file.
            n: number of ranks.
            seed: of the run.

        Raises:
            ConfigError: fewer examples than ranks, or no Dirichlet draw filled every rank.
        """
        if len(labels) < n:
            raise ConfigError(
                f"ranks: {n} ranks for {len(labels)} training examples of task '{self.name}'; "
                f"use at most {len(labels)}"
            )
        if self.heterogeneity == "dirichlet":
            return self._split_dirichlet(labels, n, seed)
        order = self._order(labels, seed)
        if self.drop_remainder:
            order = order[: len(order) // n * n]
        return tuple(np.array_split(order, n))

    def _order(self, labels: np.ndarray, seed: int) -> np.ndarray:
        if self.heterogeneity == "iid":
            return Random(seed).stream("task/partition").permutation(len(labels))[0].numpy()
        if self.heterogeneity == "sorted":
            return np.argsort(labels, kind="stable")
        return np.arange(len(labels))

    def _split_dirichlet(self, labels: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, ...]:
        order = Random(seed).stream("task/partition").permutation(len(labels))[0].numpy()
        classes = [order[labels[order] == label] for label in np.unique(labels)]
        for draw in range(_DIRICHLET_DRAWS):
            source = Random(seed).stream("task/dirichlet", draw=draw)
            shares = np.random.default_rng(source.seed()).dirichlet(
                np.full(n, self.alpha), size=len(classes)
            )
            parts = [
                np.split(members, (np.cumsum(share)[:-1] * len(members)).astype(np.int64))
                for members, share in zip(classes, shares, strict=True)
            ]
            shards = tuple(np.concatenate(rank) for rank in zip(*parts, strict=True))
            if min(map(len, shards)) > 0:
                return shards
        raise ConfigError(
            f"task.alpha: Dirichlet({self.alpha}) over {n} ranks left a rank without examples in "
            f"each of {_DIRICHLET_DRAWS} draws of {len(labels)} examples; use a larger alpha or "
            "fewer ranks"
        )
