"""Which process hosts which rank: contiguous blocks, as equal as they can be."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gossamer.runtime.errors import ConfigError

__all__ = ["Placement"]


@dataclass(frozen=True)
class Placement:
    """n ranks over ``processes`` processes; process p hosts ranks ``starts[p]..starts[p + 1]-1``.

    Raises:
        ConfigError: more processes than ranks.
    """

    n: int
    processes: int

    def __post_init__(self) -> None:
        if not 1 <= self.processes <= self.n:
            raise ConfigError(
                f"ranks: {self.n} ranks cannot fill {self.processes} processes; "
                f"set ranks to {self.processes} or a multiple, or start {self.n} processes"
            )

    @cached_property
    def starts(self) -> np.ndarray:
        """Return the first rank of each process and, last, n: int64 (processes + 1,)."""
        base, extra = divmod(self.n, self.processes)
        sizes = np.full(self.processes, base, dtype=np.int64)
        sizes[:extra] += 1
        return np.concatenate([[0], np.cumsum(sizes)])

    def ranks(self, process: int) -> range:
        """Return the ranks that ``process`` hosts."""
        starts = self.starts
        return range(int(starts[process]), int(starts[process + 1]))

    def owner(self, ranks: np.ndarray) -> np.ndarray:
        """Return the process that hosts each of ``ranks``."""
        return np.searchsorted(self.starts, ranks, side="right") - 1

    def owner_of(self, rank: int) -> int:
        """Return the process that hosts ``rank``."""
        return bisect_right(self._starts, rank) - 1

    @cached_property
    def _starts(self) -> list[int]:
        return self.starts.tolist()  # type: ignore[no-any-return]
