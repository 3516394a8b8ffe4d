"""Secret noise that takes back part of what it added before: K^-1 Z, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from gossamer.algorithms.privacy.noise import SecretNoise
from gossamer.algorithms.privacy.noise_strategies import (
    StreamingNoise,
    banded,
    inverse_coefficients,
    sqrt_toeplitz,
)
from gossamer.algorithms.problems import RankBatches
from gossamer.runtime import Communicator, ConfigError, RowLayout, combine
from gossamer.runtime.component import Component
from gossamer.runtime.perturb import Probe
from gossamer.runtime.rows import empty_rows

__all__ = ["CorrelatedNoise", "Correlation"]


class Correlation(Component):
    """A strategy K of ``bands`` bands, its first column of norm 1 (arXiv:2306.08153)."""

    name: Literal["banded", "sqrt-toeplitz"]
    """``banded``: the least mean error over the steps of the run; ``sqrt-toeplitz``: the first
    coefficients of the square root of prefix sums (arXiv:2405.15913), whatever the steps."""
    bands: int = Field(ge=1)
    """b: over how many steps noise is correlated, and between two an example can take part in; each
    costs a row. 1 is independent noise."""

    def strategy(self, releases: int | None) -> tuple[float, ...]:
        """Return K's first column, (bands,), for a run of so many releases (None: open-ended).

        Raises:
            ConfigError: there are fewer releases than bands, or no number of them to optimise for.
        """
        if self.name == "sqrt-toeplitz":
            k = sqrt_toeplitz(self.bands)
            return tuple((k / np.sqrt(k @ k)).tolist())
        if releases is None:
            raise ConfigError(
                "oracle.correlation: banded is found for a number of steps; add 'steps: ...', or "
                "use sqrt-toeplitz"
            )
        if self.bands > releases:
            raise ConfigError(
                f"oracle.correlation.bands: {self.bands} is more than the {releases} gradients of "
                f"the run; use at most {releases}"
            )
        return tuple(banded(releases, self.bands).tolist())


class CorrelatedNoise:
    """Noise K^-1 Z, where Z is the noise of another source: row t goes to release t of a stream.

    Each rank correlates its own part (the map is linear, so parts add up and cancel as they did),
    and keeps bands - 1 rows. An example takes part in releases that are ``bands`` apart or more,
    which ``take_turn`` checks; K's columns for them don't overlap, |k| = 1, and so a stream of T
    releases costs what ceil(T / bands) releases of independent noise do.

    A stream begins at the start, at a restart, and where a run branches off one that is resumed:
    had both continuations the kept rows, each would take the same noise back from the prefix's last
    bands - 1 gradients, with new noise of its own, and show these twice; with none, what they share
    is released once and each continuation is a mechanism by itself. Streams are counted apart.

    Attributes:
        strategy: K's first column; set by ``begin``.
    """

    def __init__(self, white: SecretNoise, correlation: Correlation) -> None:
        """Wrap a source of independent noise; ``begin`` comes before the first release."""
        self.white, self._correlation = white, correlation
        self.strategy: tuple[float, ...] = ()
        self._variances = np.empty(0)

    def begin(self, comm: Communicator, layout: RowLayout, strategy: Sequence[float]) -> None:
        """Begin a stream; nothing of a former one is taken back."""
        self.strategy = tuple(strategy)
        # Sums of half precision are float32 until they are released, and so is their noise.
        wide = layout.dtype if layout.dtype == torch.float64 else torch.float32
        self._z = empty_rows(comm.local, layout.d, wide, comm.device)
        self._stream = StreamingNoise(self.strategy, self._z)
        self._place = torch.tensor([[0, -1]] * comm.local)  # releases, block of the last one
        self._variances = np.empty(0)

    def take_turn(self, batch: RankBatches) -> None:
        """Refuse a batch that is not of the block after that of the last release.

        Raises:
            ConfigError: an example could then take part again within the bands.
        """
        bands, last = self._correlation.bands, int(self._place[0, 1])
        if last >= 0 and batch[0].block != (last + 1) % bands:
            raise ConfigError(
                "oracle.correlation: the algorithm leaves drawn batches out or takes them out of "
                "order, so that an example could take part twice within the bands; use an "
                "algorithm with one gradient per batch, or leave correlation out"
            )
        self._place[:, 1] = batch[0].block

    # --- as SecretNoise ----------------------------------------------------------------------

    def agree(self, layout: RowLayout) -> None:
        """As the source."""
        self.white.agree(layout)

    def coin_seed(self, rank: int) -> int:
        """As the source."""
        return self.white.coin_seed(rank)

    def scales(self, total: float) -> list[float]:
        """As the source: the standard deviation of the hosted rows of Z."""
        return self.white.scales(total)

    def add_(self, rows: Tensor, layout: RowLayout, release: int, scales: Sequence[float]) -> None:
        """Add the next row of K^-1 Z to the hosted ranks' rows (local, d)."""
        self.white.add_(self._z.zero_(), layout, release, scales)
        noise = self._stream.correlate_(self._z)
        combine([(1.0, rows), (1.0, noise)], out=rows)
        self._place[:, 0] += 1

    def pending(
        self, rows: Tensor, layout: RowLayout, release: int, scales: Sequence[float]
    ) -> list[list[tuple[int, Probe]]]:
        """Add all of it now: the next releases need the row of noise by itself."""
        self.add_(rows, layout, release, scales)
        return [[] for _ in scales]

    def variances(self, total: float, sizes: Sequence[float]) -> tuple[list[float], float]:
        """As the source, times the squared norm of the last release's row of K^-1."""
        t = int(self._place[0, 0]) - 1
        if t >= len(self._variances):
            # A power of two, so that a resumed run reads its figures off the same table.
            inverse = inverse_coefficients(self.strategy, max(64, 1 << t.bit_length()))
            self._variances = np.cumsum(inverse**2)
        gain = float(self._variances[t])
        rows, mean = self.white.variances(total, sizes)
        return [gain * row for row in rows], gain * mean

    def state(self) -> dict[str, Tensor]:
        """Return the secrets, among them the kept rows, and where the stream stands."""
        local = len(self._place)
        strategy = torch.tensor([self.strategy] * local, dtype=torch.float64)
        return {
            **self.white.state(),
            **self._stream.state_dict(),
            "strategy": strategy,
            "place": self._place.clone(),
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on with the stream that was saved, its strategy included."""
        self.white.load(state)
        self.strategy = tuple(state["strategy"][0].tolist())
        self._stream = StreamingNoise(self.strategy, self._z)
        rows = {name: block for name, block in state.items() if name.startswith("past.")}
        self._stream.load_state_dict(rows)
        self._place = state["place"].clone()
        self._variances = np.empty(0)
