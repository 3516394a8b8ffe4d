"""Linear filters of a sequence of gradients, as coefficients; numbers only.

A filter turns u_0, u_1, ... into

    m_t = sum_{k=0}^{nb} b_k u_{t-k} - sum_{k=1}^{na} a_k m_{t-k},    y_t = m_t / c_t

with terms before t = 0 left out, and c_t what the same recursion makes of u = 1 (DOPPLER,
arXiv:2408.13460). Dividing by c_t makes y_0 = u_0 and hands a constant through unchanged at every
t. Where u_t = u + w_t with white w_t of variance Phi, Var y_t = rho_t Phi, rho_t =
sum_{k<=t} h_k^2 / c_t^2, h the impulse response, whose partial sums are c.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Coefficients", "Response", "bilinear", "butter2", "cheby_default", "ema", "none"]

SMALLEST_GAIN = 1e-12
"""A |c_t| below it is taken for 0: the output would be rounding error, magnified."""
_LONGEST_CHECK = 100_000
"""Calls over which c_t is checked where a run has no end; filters worth having settle sooner."""


@dataclass(frozen=True)
class Coefficients:
    """A stable filter.

    Attributes:
        a: a_1 .. a_na, what is subtracted of former outputs (without the leading a_0 = 1); may be
            empty.
        b: b_0 .. b_nb, weights of the newest input and those before it.

    Raises:
        ValueError: names ``a`` or ``b`` and the way out: a pole outside the unit circle or on it,
            b_0 = 0, or no response to a constant.

    Example:
        >>> ema(0.5).variance_gains(3).tolist()
        [1.0, 0.5555555555555556, 0.42857142857142855]
    """

    a: tuple[float, ...] = ()
    b: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (*self.a, *self.b))):
            raise ValueError("every coefficient must be finite")
        radius = self.radius
        if not radius < 1:
            raise ValueError(
                f"the filter is unstable: its largest pole has modulus {radius:.6g}, must be below "
                f"1 (the roots of z^na + a_1 z^(na-1) + ...); multiply every a_k by r^k with "
                f"r < {1 / radius:.6g}, and leave out the leading a_0 = 1"
            )
        if not self.b or self.b[0] == 0:
            raise ValueError(
                "b_0 must not be 0: the first output would be 0 / 0; drop the leading zeros, which "
                "only delay"
            )
        if abs(self.dc_gain) < SMALLEST_GAIN:
            raise ValueError(
                f"the filter answers a constant by {self.dc_gain:.3g}, must not be 0: sum(b) / "
                "(1 + sum(a)) is what reaches the optimizer of the true gradient; use a low-pass"
            )

    @property
    def order(self) -> int:
        """How many steps back it looks."""
        return max(len(self.a), len(self.b) - 1)

    @property
    def radius(self) -> float:
        """Modulus of the largest pole, 0 without feedback."""
        return float(max(np.abs(np.roots([1.0, *self.a])), default=0.0))

    @property
    def dc_gain(self) -> float:
        """What c_t tends to: sum(b) / (1 + sum(a))."""
        return math.fsum(self.b) / (1 + math.fsum(self.a))

    @property
    def rho_inf(self) -> float:
        """Variance of white noise after the filter over before, at c = 1, as t grows.

        sum h^2 / (sum h)^2 without summing: r_k = sum_j h_j h_{j+k} solves, with a_0 = 1,
        sum_i a_i r_{|k-i|} = sum_j b_{j+k} h_j for k = 0 .. na (multiply the recursion of h by
        h_{t-k} and sum over t). Order 2 gives the usual closed form.
        """
        a, b, count = (1.0, *self.a), self.b, len(self.a) + 1
        h = self.impulse_response(len(b))
        left, right = np.zeros((count, count)), np.zeros(count)
        for k in range(count):
            for i in range(count):
                left[k, abs(k - i)] += a[i]
            right[k] = math.fsum(b[j + k] * h[j] for j in range(len(b) - k))
        return float(np.linalg.solve(left, right)[0]) / self.dc_gain**2

    def impulse_response(self, count: int) -> np.ndarray:
        """Return h_0 .. h_{count-1}: b_k - sum_i a_i h_{k-i}, float64 (count,)."""
        return self._driven([1.0] + [0.0] * (count - 1))

    def gains(self, count: int) -> np.ndarray:
        """Return c_0 .. c_{count-1}, float64 (count,)."""
        return self._driven([1.0] * count)

    def variance_gains(self, count: int) -> np.ndarray:
        """Return rho_0 .. rho_{count-1}, float64 (count,); rho_0 = 1."""
        response = Response(self)
        return np.array([response.advance() for _ in range(count)])

    def require_gain(self, calls: int | None) -> None:
        """Check that no c_t of so many calls is 0; it need not grow steadily.

        Args:
            calls: how many there will be; None: until the filter has settled.

        Raises:
            ValueError: names t and c_t.
        """
        longest = _LONGEST_CHECK if calls is None else calls
        c = self.gains(min(longest, self._settled_after()))
        bad = np.flatnonzero(np.abs(c) < SMALLEST_GAIN)
        if len(bad):
            raise ValueError(
                f"the filter's answer to a constant is {c[bad[0]]:.3g} at call {bad[0]}, must not "
                "be 0: the output is divided by it; change b, or use a named filter"
            )

    def rings(self, calls: int) -> bool:
        """Say whether the answer to a constant still swings, by over a tenth, after ``calls``."""
        if calls >= self._settled_after(1e-3):
            return False
        gains = self.gains(calls)
        return bool(np.abs(gains).max(initial=0.0) > 1.1 * abs(self.dc_gain))

    def _settled_after(self, share: float = 1e-16) -> int:
        """Return after how many calls the largest pole has died away to ``share``."""
        feedback = math.log(share) / math.log(self.radius) if self.radius > share else 1.0
        return len(self.b) + math.ceil(feedback)

    def _driven(self, inputs: Sequence[float]) -> np.ndarray:
        """Return m_t of the inputs, in the order of sums that ``Response`` uses."""
        m = np.zeros(len(inputs))
        for t in range(len(inputs)):
            ahead = sum(b * inputs[t - k] for k, b in enumerate(self.b) if k <= t)
            m[t] = ahead - sum(a * m[t - k] for k, a in enumerate(self.a, start=1) if k <= t)
        return m


class Response:
    """c_t of a filter, and the variance of noise behind it, one t after the other.

    A filter of order p keeps p numbers s_1 .. s_p, at first 0: m_t = b_0 u_t + s_1, and then s_k
    becomes b_k u_t - a_k m_t + s_{k+1}. Independent noise in u_t makes the covariance of the new s
    from that of the old one.

    Attributes:
        c: c_t, c_{t-1}, ... back to c_{t-na}, as far as there are any; empty before ``advance``.
        covariance: of the noise in s after t, (*shape, p, p) float64.
    """

    def __init__(self, coefficients: Coefficients, shape: tuple[int, ...] = (), t: int = 0) -> None:
        """Start before t, with no noise so far; ``shape``: of the variances."""
        order, a, b = coefficients.order, coefficients.a, coefficients.b
        self._coefficients, self._t = coefficients, t - 1
        self._a = np.pad(np.array(a), (0, order - len(a)))
        self._b = np.pad(np.array(b[1:]), (0, order + 1 - len(b))) - b[0] * self._a
        self.covariance = np.zeros((*shape, order, order))
        self.c = deque(coefficients.gains(t)[::-1].tolist()[: len(a) + 1], maxlen=len(a) + 1)

    def advance(self, white: ArrayLike = 1.0) -> NDArray[np.float64]:
        """Move on to the next t and return Var y_t; ``white``: Phi_t, of ``shape``."""
        a, b = self._coefficients.a, self._coefficients.b
        self._t += 1
        c = sum(b[: self._t + 1])
        c -= sum(weight * old for weight, old in zip(a, self.c, strict=False))
        self.c.appendleft(c)
        phi = np.asarray(white, np.float64)
        variance = b[0] * b[0] * phi
        if len(self._a):
            variance = variance + self.covariance[..., 0, 0]
            rows = -self._a[:, None] * self.covariance[..., :1, :]
            rows[..., :-1, :] += self.covariance[..., 1:, :]
            moved = phi[..., None, None] * np.outer(self._b, self._b) - rows[..., :1] * self._a
            moved[..., :-1] += rows[..., 1:]
            self.covariance = moved
        return np.asarray(variance / (c * c))


def none() -> Coefficients:
    """Return the filter that changes nothing."""
    return Coefficients()


def ema(beta: float) -> Coefficients:
    """Return the moving average m = beta m + (1 - beta) u; y is Adam's bias-corrected m.

    rho_t = (1 - beta) / (1 + beta) * (1 + beta^(t+1)) / (1 - beta^(t+1)).
    """
    return Coefficients((-beta,), (1 - beta,))


def bilinear(beta: float) -> Coefficients:
    """Return the moving average of the means of two neighbours; rho_inf = (1 - beta) / 2.

    Alternating signs do not pass at all.
    """
    return Coefficients((-beta,), ((1 - beta) / 2, (1 - beta) / 2))


def butter2(cutoff: float) -> Coefficients:
    """Return the Butterworth low-pass of order 2, as ``scipy.signal.butter(2, cutoff)``.

    Args:
        cutoff: where the power falls to half, 1 being the Nyquist frequency (half a cycle a step).
    """
    k = math.tan(math.pi * cutoff / 2)
    scale = 1 + math.sqrt(2) * k + k * k
    b = k * k / scale
    return Coefficients(
        (2 * (k * k - 1) / scale, (1 - math.sqrt(2) * k + k * k) / scale), (b, 2 * b, b)
    )


def cheby_default() -> Coefficients:
    """Return the default of DOPPLER's released code: Chebyshev I, order 2, 10 dB, cutoff .02.

    Exactly its rounded digits, which move a trajectory by 1e-7. It rings for about 1000 calls (the
    gain of a constant is .316, that at resonance 3.16 times as much).
    """
    return Coefficients((-1.98342955, 0.98549544), (1.6332e-4, 3.2665e-4, 1.6332e-4))
