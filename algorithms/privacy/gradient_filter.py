"""What the oracles that filter gradients, ``doppler`` and ``disk``, have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from pydantic import PrivateAttr, field_validator
from torch import Tensor

from gossamer.algorithms.estimates import Directions, Estimate, Origin, Sink
from gossamer.algorithms.oracles.wrapper import OracleWrapper
from gossamer.algorithms.privacy.noise_strategies import inverse_coefficients
from gossamer.algorithms.privacy.release import Release
from gossamer.algorithms.problems import DataPlan, Problem, RankBatches
from gossamer.algorithms.protocols import Oracle
from gossamer.runtime import Communicator, ConfigError
from gossamer.runtime import combine as weighted
from gossamer.runtime.rows import empty_rows
from gossamer.runtime.state import flatten, restore

__all__ = ["GradientFilter"]


_LATE = 4095
"""A call at which filters worth having have settled."""


class GradientFilter(OracleWrapper):
    """An oracle that makes one row out of the inner oracle's rows of this call and former ones.

    It counts its calls since it started anew, and says what the noise in its gradient is of what is
    known of the noise in theirs: independent from call to call, of any variances; or made by the
    inner oracle's ``noise_strategy`` of white noise of one variance at all of these calls.
    """

    _rows: dict[str, list[Tensor]] = PrivateAttr(default_factory=dict)
    _calls: Tensor = PrivateAttr()
    _table: tuple[tuple[float, ...], np.ndarray] = PrivateAttr(default=((), np.empty(0)))

    @field_validator("inner")
    @classmethod
    def _check_inner(cls, inner: Oracle) -> Oracle:
        if inner.form != "row":
            raise ValueError(f"a filter needs gradients as rows; this oracle gives {inner.form}")
        layer = inner
        while isinstance(layer, OracleWrapper):
            if isinstance(layer, GradientFilter):
                raise ValueError(
                    f"{layer.name} filters already: a second filter would not know the variance of "
                    "noise that the first made dependent from call to call; keep one of the two"
                )
            layer = layer.inner
        return inner

    def setup(self, comm: Communicator, problem: Problem) -> DataPlan:
        """Set the inner oracle up and make room for former rows."""
        plan = super().setup(comm, problem)
        layout = self.inner.layout
        self._rows = {
            name: [
                empty_rows(comm.local, layout.d, layout.dtype, comm.device) for _ in range(count)
            ]
            for name, count in self._kept().items()
        }
        self._calls = torch.zeros(comm.local, 1, dtype=torch.int64)
        return plan

    @abstractmethod
    def _kept(self) -> dict[str, int]:
        """Return how many rows to keep, by name."""

    @property
    def _t(self) -> int:
        """Calls since it started anew."""
        return int(self._calls[0])

    def restart(self, calls: int | None) -> None:
        """Forget the former rows."""
        super().restart(calls)
        self._forget()

    def branch(self) -> None:
        """Branch the inner oracle; forget the former rows where its correlated noise starts anew.

        What it adds from now on does not take back what is in those rows.
        """
        super().branch()
        if self.inner.noise_strategy is not None:
            self._forget()

    def _forget(self) -> None:
        """Leave former rows out from here on."""
        self._calls.zero_()

    def _gain(self, t: int) -> float | None:
        """Return by what the variance of correlated noise is multiplied in call t; None: of other.

        Where the variance changes with the strategy's row, that of call t is what it multiplies.
        """
        strategy = self.inner.noise_strategy
        if strategy is None:
            return None
        if self._table[0] != strategy or t >= len(self._table[1]):
            # A power of two, so that a resumed run reads its figures off the same table.
            noise = inverse_coefficients(strategy, max(64, 1 << t.bit_length()))
            self._table = (strategy, self._variances(noise) / np.cumsum(noise**2))
        return float(self._table[1][t])

    @abstractmethod
    def _spread(self, white: np.ndarray) -> np.ndarray:
        """Move on to this call, and return the variances of its output, (local, 2) float64.

        Args:
            white: (local, 2) float64, variances of this call's noise, which is independent of that
                of other calls: in a rank's row, in the mean over ranks.
        """

    def _rho_inf(self, white: float) -> float:
        """Return what the gain of the noise variance tends to; ``white``: if it is white."""
        gain = self._gain(_LATE)
        return white if gain is None else gain

    @abstractmethod
    def _variances(self, noise: np.ndarray) -> np.ndarray:
        """Return the variance of the output at t = 0, 1, ..., of noise whose rows are K^-1's.

        Args:
            noise: (count,) float64, first column of the Toeplitz matrix that white noise of
                variance 1 went through.
        """

    @property
    def keeps_whole(self) -> str:
        """Why it takes no sink: it adds former rows up."""
        return f"{self.name} keeps whole rows of former gradients"

    def _refuse(self, sink: Sink | None) -> None:
        if sink is not None:
            raise ConfigError(
                f"oracle: {self.keeps_whole} and cannot hand one out in slices; take {self.name} "
                "out, or use an optimizer that takes whole rows"
            )

    def __call__(
        self,
        x: Tensor,
        batch: RankBatches,
        *,
        combine: Sequence[tuple[float, Tensor]] | None = None,
        sink: Sink | None = None,
    ) -> Estimate:
        """Return the inner estimate with its gradient filtered; that row is reused.

        It is former output of later calls: whoever takes it keeps it.

        Raises:
            ConfigError: the caller takes slices.
        """
        self._refuse(sink)
        return self.deferred(x, batch, combine=combine).dense()

    @staticmethod
    def _combined(
        grad: Tensor | Directions,
        weight: float,
        kept: Sequence[tuple[float, Tensor]],
        out: Tensor,
        raw: Tensor | None = None,
    ) -> Tensor | Directions:
        """Write ``weight * grad`` plus kept rows to ``out``, and ``grad`` to ``raw``, now or then.

        ``out`` and ``raw`` may be kept rows.
        """
        if isinstance(grad, Release):
            return grad.filtered(weight, kept, out, raw)
        rows = grad if isinstance(grad, Tensor) else grad.dense()
        weighted([(weight, rows), *kept], out=out)
        if raw is not None:
            raw.copy_(rows)
        return out

    def _behind(self, estimate: Estimate) -> Estimate:
        """Return the inner estimate of this call with what is known of the noise in the output."""
        origins = (estimate.origin, estimate.mean_origin)
        white = np.full((len(self._calls), 2), np.nan)  # nan: not known
        for column, origin in zip(white.T, origins, strict=True):
            if origin.noise_var is not None:
                column[:] = np.asarray(origin.noise_var).reshape(-1)
        spread, gain = self._spread(white), self._gain(self._t)
        known = [
            _with_noise(origin, column) if gain is None else origin.scaled(gain)
            for origin, column in zip(origins, spread.T, strict=True)
        ]
        return replace(estimate, origin=known[0], mean_origin=known[1])

    def own_state(self) -> dict[str, Tensor]:
        """Return the former rows and the number of calls."""
        return flatten(self._state())[0]

    def load_own_state(self, state: dict[str, Tensor]) -> None:
        """Copy them back in place."""
        restore(self._state(), state, {})

    def _state(self) -> dict[str, Any]:
        return {**self._rows, "calls": self._calls} if self._rows else {}


def _with_noise(origin: Origin, variances: np.ndarray) -> Origin:
    """Return an origin with other variances (local,), spelled as its own: one, or one per rank."""
    if origin.noise_var is None:
        return origin
    if isinstance(origin.noise_var, Tensor):
        return replace(origin, noise_var=torch.from_numpy(variances.copy())[:, None])
    return replace(origin, noise_var=float(variances[0]))
