"""``doppler``: a low-pass filter behind the noise (DOPPLER, arXiv:2408.13460)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, PrivateAttr, ValidationInfo, field_validator, model_validator
from scipy.signal import lfilter
from torch import Tensor

from gossamer.algorithms.estimates import Estimate
from gossamer.algorithms.privacy.filter_coefficients import (
    Coefficients,
    Response,
    bilinear,
    butter2,
    cheby_default,
    ema,
    none,
)
from gossamer.algorithms.privacy.gradient_filter import GradientFilter
from gossamer.algorithms.problems import DataPlan, Problem, RankBatches
from gossamer.runtime import Communicator, ConfigError

__all__ = ["Doppler"]

log = logging.getLogger("gossamer")

_DEFAULT_BETA = 0.9


class Doppler(GradientFilter):
    """Filters the inner oracle's gradients over calls (DOPPLER, arXiv:2408.13460).

    m_t = sum_k b_k g_{t-k} - sum_k a_k m_{t-k};  the gradient becomes m_t / c_t, where c_t is what
    the same recursion makes of the constant 1.

    The true gradient changes slowly and noise does not: the sum keeps the one and averages the
    other. It only processes what is private already, so it costs no privacy. A constant gradient
    passes unchanged, and white noise of variance Phi becomes rho_t Phi. Of first order it is
    momentum with bias correction. One gradient a call, no message; len(a) + len(b) - 1 rows.

    What the released code calls parameter c (a second moment of the *unfiltered* gradient) is left
    out: the optimizer behind sees the filtered one.
    """

    name: Literal["doppler"] = "doppler"
    filter: Literal["none", "ema", "bilinear", "butter2", "cheby_default", "custom"] = "ema"
    """``ema`` and ``bilinear`` take beta, ``butter2`` cutoff, ``custom`` a and b (and is chosen by
    giving them); ``cheby_default`` is the released code's and needs 1000 steps."""
    beta: float | None = Field(default=None, ge=0, lt=1)
    """Share of the old average that stays; .5 to .9, None: .9. Of ``ema`` and ``bilinear``."""
    cutoff: float | None = Field(default=None, gt=0, lt=1, validate_default=True)
    """Frequency of half the power; 1 is Nyquist's, half a cycle a step. Of ``butter2``."""
    a: tuple[float, ...] | None = Field(default=None, validate_default=True)
    """a_1, a_2, ...: what is subtracted of former outputs, without a_0 = 1; None or []: none."""
    b: tuple[float, ...] | None = Field(default=None, validate_default=True)
    """b_0, b_1, ...: weights of the newest gradient and those before."""

    _coefficients: Coefficients = PrivateAttr()
    _response: Response = PrivateAttr()

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        if "filter" not in values and {"a", "b"} & set(values):
            values["filter"] = "custom"
        if values.get("filter", "ema") in ("ema", "bilinear") and values.get("beta") is None:
            values["beta"] = _DEFAULT_BETA
        return values

    @field_validator("beta", "cutoff")
    @classmethod
    def _check_use(cls, value: float | None, info: ValidationInfo) -> float | None:
        users = {"beta": ("ema", "bilinear"), "cutoff": ("butter2",)}[str(info.field_name)]
        chosen = info.data.get("filter")
        if value is not None and chosen is not None and chosen not in users:
            raise ValueError(f"has no effect with filter {chosen}, only with {' and '.join(users)}")
        if value is None and chosen in users:
            raise ValueError(f"missing ({chosen} needs it); add '{info.field_name}: 0.1'")
        return value

    @field_validator("a")
    @classmethod
    def _check_feedback(
        cls, value: tuple[float, ...] | None, info: ValidationInfo
    ) -> tuple[float, ...] | None:
        cls._check_custom(value, info)
        Coefficients(value or ())
        return value

    @field_validator("b")
    @classmethod
    def _check_weights(
        cls, value: tuple[float, ...] | None, info: ValidationInfo
    ) -> tuple[float, ...] | None:
        cls._check_custom(value, info)
        if info.data.get("filter") == "custom" and value is None:
            raise ValueError("missing (custom takes the weights b, and a if any); add 'b: [...]'")
        if value is not None and "a" in info.data:
            Coefficients(info.data["a"] or (), value)
        return value

    @classmethod
    def _check_custom(cls, value: tuple[float, ...] | None, info: ValidationInfo) -> None:
        chosen = info.data.get("filter", "custom")
        if value is not None and chosen != "custom":
            raise ValueError(f"has no effect with filter {chosen}; leave out 'filter', or this")

    def model_post_init(self, context: Any) -> None:
        """Build the filter."""
        super().model_post_init(context)
        self._coefficients = self._chosen()

    def _chosen(self) -> Coefficients:
        if self.filter == "butter2":
            assert self.cutoff is not None, "checked by its validator"
            return butter2(self.cutoff)
        if self.filter in ("ema", "bilinear"):
            assert self.beta is not None, "filled in before validation"
            return ema(self.beta) if self.filter == "ema" else bilinear(self.beta)
        if self.filter == "custom":
            assert self.b is not None, "checked by its validator"
            return Coefficients(self.a or (), self.b)
        return cheby_default() if self.filter == "cheby_default" else none()

    @property
    def coefficients(self) -> Coefficients:
        """What is applied."""
        return self._coefficients

    def setup(self, comm: Communicator, problem: Problem) -> DataPlan:
        """Set the inner oracle up and start with no gradient seen."""
        plan = super().setup(comm, problem)
        self._response = self._response_at(0)
        return plan

    def _response_at(self, t: int) -> Response:
        """Return the filter's response before call t: in a row, in the mean."""
        return Response(self._coefficients, (len(self._calls), 2), t)

    def _forget(self) -> None:
        """Leave former rows out from here on, and what they weighed."""
        super()._forget()
        self._response = self._response_at(0)

    def start(self, steps: int | None, draws: int) -> None:
        """Start the inner oracle, and check the filter over the calls of the run."""
        super().start(steps, draws)
        calls = None if steps is None else steps * draws
        try:
            self._coefficients.require_gain(calls)
        except ValueError as error:
            raise ConfigError(f"oracle.b: {error}, got {list(self._coefficients.b)}") from None
        if calls is not None and self._coefficients.rings(calls):
            log.warning(
                "oracle.filter: %s still rings when the run ends after %d calls; its gradients lag "
                "and overshoot until then; use ema or bilinear, or more steps",
                self.filter,
                calls,
            )

    def _kept(self) -> dict[str, int]:
        if self._coefficients.order == 0:
            return {}  # m_t / c_t is the gradient
        a, b = self._coefficients.a, self._coefficients.b
        return {"inputs": len(b) - 1, "outputs": max(1, len(a))}

    def deferred(
        self,
        x: Tensor,
        batch: RankBatches,
        *,
        combine: Sequence[tuple[float, Tensor]] | None = None,
    ) -> Estimate:
        """Return the inner estimate with its gradient filtered, maybe not written down yet."""
        estimate = self.inner.deferred(x, batch, combine=combine)
        if not self._rows:
            return estimate
        if estimate.origin.restart or estimate.mean_origin.restart:
            self._forget()
        estimate = self._behind(estimate)
        t = self._t
        inputs, outputs = self._rows["inputs"], self._rows["outputs"]
        output = outputs[t % len(outputs)]
        newest = inputs[t % len(inputs)] if inputs else None
        weight = self._coefficients.b[0] / self._response.c[0]
        grad = self._combined(estimate.grad, weight, self._past(t), output, newest)
        self._calls += 1
        return replace(estimate, grad=grad)

    def _spread(self, white: np.ndarray) -> np.ndarray:
        """Return sum_{k<=t} h_k^2 white_{t-k} / c_t^2."""
        return self._response.advance(white)

    def _past(self, t: int) -> list[tuple[float, Tensor]]:
        """Return m_t / c_t without the newest gradient, as a sum over kept rows.

        Outputs are kept divided, y = m / c, which saves a row and a pass: m_{t-k} = c_{t-k}
        y_{t-k}.
        """
        a, b, c = self._coefficients.a, self._coefficients.b, self._response.c
        inputs, outputs = self._rows["inputs"], self._rows["outputs"]
        terms = [(b[k] / c[0], inputs[(t - k) % len(inputs)]) for k in range(1, len(b)) if k <= t]
        terms += [
            (-a[k - 1] * c[k] / c[0], outputs[(t - k) % len(outputs)])
            for k in range(1, len(a) + 1)
            if k <= t
        ]
        return terms

    def _variances(self, noise: np.ndarray) -> np.ndarray:
        """Return sum_{k<=t} (h * noise)_k^2 / c_t^2: filters in a row convolve."""
        found = self._coefficients
        rows = lfilter(found.b, (1.0, *found.a), noise)
        return np.asarray(np.cumsum(rows**2) / found.gains(len(noise)) ** 2)

    def _state(self) -> dict[str, Any]:
        state = super()._state()
        return {**state, "noise": torch.from_numpy(self._response.covariance)} if state else {}

    def load_own_state(self, state: dict[str, Tensor]) -> None:
        """Copy rows and covariances back in place; c_t follows from the number of calls."""
        super().load_own_state(state)
        covariance = self._response.covariance
        self._response = self._response_at(self._t)
        self._response.covariance = covariance

    def statement(self) -> dict[str, Any]:
        """Add the filter and its variance gain."""
        found = self._coefficients
        filtered = {
            "name": self.name,
            "filter": self.filter,
            "a": list(found.a),
            "b": list(found.b),
            "rho_inf": self._rho_inf(found.rho_inf),
        }
        return {**super().statement(), "filter": filtered}
