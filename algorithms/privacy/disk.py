"""``disk``: a simplified Kalman filter of the gradient (DiSK, arXiv:2410.03883)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, PrivateAttr
from scipy.signal import lfilter
from torch import Tensor

from gossamer.algorithms.estimates import Estimate
from gossamer.algorithms.privacy.gradient_filter import GradientFilter
from gossamer.algorithms.problems import DataPlan, Problem, RankBatches
from gossamer.runtime import Communicator, ConfigError
from gossamer.runtime import combine as weighted

__all__ = ["Disk"]

log = logging.getLogger("gossamer")

_SAME_GAMMA = 1e-3
"""Within it of (1 - kappa) / kappa the second evaluation is left out (as released)."""
_LARGE_WEIGHT = 3.0
"""From here on the pair of weights c, 1 - c makes clipping saturate."""


class Disk(GradientFilter):
    """Predicts the gradient along the last displacement, corrects it (DiSK, arXiv:2410.03883).

    h_i = c grad f_i(x_t + gamma d) + (1 - c) grad f_i(x_t),  d = x_t - x_{t-1},
    g_t = (1 - kappa) g_{t-1} + kappa (mean of the clipped h_i, with noise),
    c = (1 - kappa) / (kappa gamma); g_0 is the plain gradient.

    A moving average of gradients lags behind x; the Hessian times d, as a difference of gradients
    on the same examples, makes up for it: on a quadratic without noise g_t is the gradient at x_t.
    The inner oracle bounds h_i as a whole, so noise and accounting are those of the plain gradient.
    White noise of variance Phi becomes Phi ((1 - kappa)^2t (1 - k) + k), k = kappa / (2 - kappa).

    gamma = (1 - kappa) / kappa makes c = 1: one evaluation, at x_t + gamma d only, where the loss
    is then taken too. d is how far the rows it is called with have moved since the last call, by
    whatever optimizer, decay or average; x itself is never written. Two rows.

    The gain kappa stands on the new gradient, and noise is as large as without the filter; released
    ports exchange the gains, or divide the noise by sqrt(c^2 + (1 - c)^2), which clipping the
    combination does not allow.
    """

    name: Literal["disk"] = "disk"
    kappa: float = Field(default=0.7, gt=0, le=1)
    """Weight of the new gradient; 1 is no filter, whatever gamma."""
    gamma: float = Field(default=0.5, ge=0)
    """How far to look ahead, in displacements; 0 stands for (1 - kappa) / kappa, which needs one
    evaluation instead of two (so does any gamma within .001 of it)."""

    _noise: np.ndarray = PrivateAttr()  # (local, 2), variances in g_{t-1}: in a row, in the mean

    @property
    def evaluations(self) -> int:
        """Gradients a call, after the first."""
        base = (1 - self.kappa) / self.kappa
        return 1 if self.gamma == 0 or abs(self.gamma - base) < _SAME_GAMMA else 2

    @property
    def look_ahead(self) -> float:
        """Gamma as used."""
        return self.gamma if self.evaluations == 2 else (1 - self.kappa) / self.kappa

    @property
    def weight(self) -> float:
        """Return c, the weight of the gradient ahead; 0 without a filter."""
        if self.kappa == 1:
            return 0.0
        return (1 - self.kappa) / (self.kappa * self.gamma) if self.evaluations == 2 else 1.0

    def setup(self, comm: Communicator, problem: Problem) -> DataPlan:
        """Set the inner oracle up and start with no gradient seen."""
        if self.weight > _LARGE_WEIGHT:
            log.warning(
                "oracle.gamma: weighs the two gradients by %.3g and %.3g, so that clipping "
                "saturates; use gamma >= %.3g, or 0 for one evaluation",
                self.weight,
                1 - self.weight,
                (1 - self.kappa) / (self.kappa * _LARGE_WEIGHT),
            )
        self._noise = np.zeros((comm.local, 2))
        return super().setup(comm, problem)

    def _state(self) -> dict[str, Any]:
        state = super()._state()
        return {**state, "noise": torch.from_numpy(self._noise)} if state else {}

    def _kept(self) -> dict[str, int]:
        return {} if self.kappa == 1 else {"gradient": 1, "point": 1}

    def _spread(self, white: np.ndarray) -> np.ndarray:
        """Return Var e_t = (1 - kappa)^2 Var e_{t-1} + kappa^2 Var w_t, Var e_0 = Var w_0."""
        if self._t == 0:
            self._noise[:] = white
        else:
            self._noise[:] = (1 - self.kappa) ** 2 * self._noise + self.kappa**2 * white
        return self._noise.copy()

    def _variances(self, noise: np.ndarray) -> np.ndarray:
        """Return those of e_t = (1 - kappa) e_{t-1} + kappa w_t, e_0 = w_0.

        It is the moving average of w plus (1 - kappa)^{t+1} w_0, of which only the first white
        number is a part.
        """
        keep = 1 - self.kappa
        rows = lfilter([self.kappa], [1.0, -keep], noise)
        oldest = rows + keep ** np.arange(1, len(rows) + 1) * noise[0]
        return np.asarray(np.cumsum(rows**2) - rows**2 + oldest**2)

    def deferred(
        self,
        x: Tensor,
        batch: RankBatches,
        *,
        combine: Sequence[tuple[float, Tensor]] | None = None,
    ) -> Estimate:
        """Return the filtered gradient, maybe not written down yet.

        Where the inner oracle says only now that its gradients come from another source, this one
        stands for g_0 although it looked ahead; what that adds fades with the old displacement.

        Raises:
            ConfigError: the caller combines points itself.
        """
        if combine is not None:
            raise ConfigError(
                "oracle: disk evaluates two points of its own and cannot combine those of this "
                "algorithm (gt-hsgd does); use doppler, or another algorithm"
            )
        if not self._rows:
            return self.inner.deferred(x, batch)
        (gradient,), (point,) = self._rows["gradient"], self._rows["point"]
        estimate = self._observe(x, batch, point)
        if estimate.origin.restart or estimate.mean_origin.restart:
            self._forget()
        estimate = self._behind(estimate)
        t = self._t
        kappa, past = self.kappa, [(1 - self.kappa, gradient)]
        grad = self._combined(estimate.grad, kappa if t else 1.0, past if t else [], gradient)
        point.copy_(x)
        self._calls += 1
        return replace(estimate, grad=grad)

    def _observe(self, x: Tensor, batch: RankBatches, point: Tensor) -> Estimate:
        """Return the inner estimate of h; ``point`` goes from x_{t-1} to x_t + gamma d."""
        if self._t == 0:
            return self.inner.deferred(x, batch)
        # Not (1 + gamma) x - gamma x_{t-1}, whose rounding is of the size of d for small steps.
        weighted([(1.0, x), (-1.0, point)], out=point)
        weighted([(1.0, x), (self.look_ahead, point)], out=point)
        if self.evaluations == 1:
            return self.inner.deferred(point, batch)
        c = self.weight
        return self.inner.deferred(x, batch, combine=[(c, point), (1 - c, x)])

    def statement(self) -> dict[str, Any]:
        """Add the filter and its variance gain."""
        filtered = {
            "name": self.name,
            "kappa": self.kappa,
            "gamma": self.look_ahead,
            "evaluations": self.evaluations,
            "rho_inf": self._rho_inf(self.kappa / (2 - self.kappa)),
        }
        return {**super().statement(), "filter": filtered}
