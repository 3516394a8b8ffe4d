"""Counted random numbers: every value is a function of (seed, name; step, id, draw, position).

Nothing depends on call order, process count, rank layout or a global generator, so a run is
repeatable on any number of processes and after any resume. Philox4x32-10 underneath
(``csrc/philox.h``): key = 64 bits hashed from (seed, name), counter = (position, id, step, draw).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from gossamer.runtime import native

__all__ = ["Random", "Stream", "derive_key"]


@lru_cache(maxsize=4096)
def derive_key(seed: int, name: str) -> int:
    """Return the 64-bit key of the streams called ``name`` in a run with this ``seed``."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


@dataclass(frozen=True)
class Stream:
    """One stream per id: row k of an output belongs to ``ids[k]``.

    Example:
        >>> import torch
        >>> one = Random(0).stream("noise", ids=[3]).normal_(torch.empty(1, 4))
        >>> many = Random(0).stream("noise", ids=range(8)).normal_(torch.empty(8, 4))
        >>> torch.equal(one[0], many[3])
        True
    """

    key: int
    ids: tuple[int, ...]
    step: int = 0
    draw: int = 0

    def normal_(self, out: Tensor, begin: int = 0) -> Tensor:
        """Fill ``out`` (len(ids), m) with standard normals from position ``begin`` on."""
        return self._fill("normal", out, begin)

    def uniform_(self, out: Tensor, begin: int = 0) -> Tensor:
        """Fill ``out`` (len(ids), m) with uniforms in (0, 1), multiples of 2**-24."""
        return self._fill("uniform", out, begin)

    def rademacher_(self, out: Tensor, begin: int = 0) -> Tensor:
        """Fill ``out`` (len(ids), m) with signs, +1 or -1."""
        return self._fill("rademacher", out, begin)

    def integers(self, high: int, count: int) -> Tensor:
        """Return int64 (len(ids), count) in [0, high), each (to 2**-32 * high) equally likely.

        Raises:
            ValueError: ``high`` is not in 1..2**32.
        """
        if not 1 <= high <= 2**32:
            raise ValueError(f"integers: high must be in 1..2**32, got {high}")
        words = self._words(count).astype(np.uint64)
        return torch.from_numpy(((words * np.uint64(high)) >> np.uint64(32)).astype(np.int64))

    def permutation(self, length: int) -> Tensor:
        """Return int64 (len(ids), length): a permutation of 0..length-1 for each id."""
        words = self._words(2 * length).astype(np.uint64)
        keys = (words[:, 0::2] << np.uint64(32)) | words[:, 1::2]
        return torch.from_numpy(np.argsort(keys, axis=1, kind="stable"))

    def seed(self) -> int:
        """Return a 63-bit seed for a generator that is not ours (a module's initialisation)."""
        low, high = self._words(2)[0]
        return (int(high) << 32 | int(low)) >> 1

    def _fill(self, distribution: str, out: Tensor, begin: int) -> Tensor:
        if out.shape[0] != len(self.ids):
            raise ValueError(f"{distribution}_: out has {out.shape[0]} rows, ids {len(self.ids)}")
        direct = out.is_cpu and out.dtype in (torch.float32, torch.float64)
        host = out if direct else torch.empty(out.shape, dtype=torch.float32)
        counter = (self.step, self.draw)
        native.fill_rows(distribution, host, self.key, self.ids, counter, begin)
        return out if direct else out.copy_(host)

    def _words(self, count: int) -> np.ndarray:
        return native.fill_word_rows(count, self.key, self.ids, (self.step, self.draw))


@dataclass(frozen=True)
class Random:
    """The source of a run's streams.

    Attributes:
        value: the run's seed, any integer.
    """

    value: int

    def stream(self, name: str, ids: Iterable[int] = (0,), step: int = 0, draw: int = 0) -> Stream:
        """Return the streams called ``name``, one per id, at (step, draw)."""
        return Stream(derive_key(self.value, name), tuple(ids), step, draw)
