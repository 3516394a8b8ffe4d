"""The exact (epsilon, delta) of Gaussian mechanisms without sampling.

Balle and Wang, arXiv:1805.06530, Theorem 8: with mu = sensitivity / standard deviation, the least
delta at epsilon is Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu).
"""

from __future__ import annotations

import math

from scipy.optimize import brentq
from scipy.special import log_ndtr

__all__ = ["gaussian_delta", "gaussian_epsilon", "gaussian_mu"]

_ROOT = {"xtol": 1e-13, "rtol": 1e-13}


def gaussian_delta(epsilon: float, mu: float) -> float:
    """Return the least delta at ``epsilon`` >= 0."""
    return math.exp(_log_delta(epsilon, mu))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the least epsilon >= 0 at ``delta``, rounded up by 1e-12."""
    if gaussian_delta(0.0, mu) <= delta:
        return 0.0
    target = math.log(delta)
    # Already the first term alone is below delta there: Phi(-sqrt(2 log(1/delta))) <= delta.
    high = mu * mu / 2 + mu * _tail(delta)
    root = float(brentq(lambda e: _log_delta(e, mu) - target, 0.0, high, **_ROOT))
    return root * (1 + 1e-12) + 1e-12


def gaussian_mu(epsilon: float, delta: float) -> float:
    """Return the largest mu that is (epsilon, delta)-DP, rounded down by 1e-11 of itself."""
    target = math.log(delta)

    def excess(log_mu: float) -> float:
        return _log_delta(epsilon, math.exp(log_mu)) - target

    # The mu whose upper bound `high` above is epsilon has too small a delta; delta grows to 1.
    tail = _tail(delta)
    low = math.log(2 * epsilon / (math.sqrt(tail * tail + 2 * epsilon) + tail))
    high = low + 1
    while excess(high) < 0:
        high += 1
    return math.exp(float(brentq(excess, low, high, **_ROOT))) * (1 - 1e-11)


def _tail(delta: float) -> float:
    return math.sqrt(2 * math.log(1 / delta))


def _log_delta(epsilon: float, mu: float) -> float:
    # In logarithms: at the deltas of interest the two terms are alike, and both are tiny.
    first = float(log_ndtr(mu / 2 - epsilon / mu))
    second = float(log_ndtr(-mu / 2 - epsilon / mu))
    # Never positive but by rounding, where delta is 0 to all digits.
    return first + math.log(-math.expm1(min(epsilon + second - first, -1e-300)))
