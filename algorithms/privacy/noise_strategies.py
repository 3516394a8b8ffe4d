"""Strategies of correlated noise, as numbers: BandMF and the square-root Toeplitz mechanism.

The noise of the clipped sums is K^-1 Z: row t goes to step t, Z is white, K the strategy, a lower
triangular Toeplitz matrix given by its first column ``k`` (bands,). What a step adds, later steps
partly take back, so that the sum of all gradients, which SGD follows, carries less noise
(arXiv:2306.08153, arXiv:2405.15913). The rows of Z have standard deviation
noise_multiplier * C * sqrt(sensitivity_squared), accounted for by ``amplified_history`` or
``joint_history``.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.signal import lfilter
from torch import Tensor

from gossamer.algorithms.privacy.accounting import Segment
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.rows import combine, empty_rows

__all__ = [
    "StreamingNoise",
    "amplified_history",
    "banded",
    "inverse_coefficients",
    "joint_history",
    "max_error",
    "mean_error",
    "sensitivity_squared",
    "sqrt_toeplitz",
]

Coefficients = NDArray[np.float64]
"""First column of K, (bands,) float64: k_0, k_1, ...; zeros from there on."""


# --- strategies -----------------------------------------------------------------------------


def sqrt_toeplitz(steps: int) -> Coefficients:
    """Return the coefficients of the square root of the prefix-sum matrix, (steps,).

    k_0 = 1, k_j = k_{j-1} (2j - 1) / (2j): the least maximal error of one pass, in which each
    example takes part once (arXiv:2405.15913). Not normalised.
    """
    _check_count("steps", steps, steps)
    j = np.arange(1, steps)
    return np.cumprod(np.concatenate([[1.0], (2 * j - 1) / (2 * j)]))


def banded(steps: int, bands: int) -> Coefficients:
    """Return the coefficients (bands,) of norm 1 with the least ``mean_error`` over ``steps``.

    Found by L-BFGS from the truncated ``sqrt_toeplitz``, with the exact gradient; one evaluation
    costs O(steps * bands). One band is independent noise.

    Args:
        steps: of the run, T.
        bands: steps between two participations of an example at least; up to ``steps``.

    Raises:
        ConfigError: a count is out of range.
    """
    _check_count("bands", bands, steps)
    weights = np.arange(steps, 0, -1) / steps  # column j of A K^-1 has steps - j equal entries

    def objective(tail: Coefficients) -> tuple[float, Coefficients]:
        # k_0 = 1 fixes the scale: |k|^2 * mean error doesn't depend on it.
        k = np.concatenate([[1.0], tail])
        sums = _prefix_sums(k, steps)
        error, square = float(weights @ sums**2), float(k @ k)
        # K c = 1 moves by K dc = -dK c, so that the gradient needs one solve with K transposed.
        adjoint = lfilter([1.0], k, (weights * sums)[::-1])[::-1]
        slope = [-2 * float(adjoint[m:] @ sums[: steps - m]) for m in range(1, bands)]
        return error * square, np.asarray(slope) * square + 2 * error * tail

    k = sqrt_toeplitz(bands)
    if bands > 1:
        options = {"maxiter": 5000, "maxfun": 10_000, "ftol": 1e-15, "gtol": 1e-11}
        with np.errstate(over="ignore", invalid="ignore"):  # a line search may leave stable k
            found = minimize(objective, k[1:], jac=True, method="L-BFGS-B", options=options)
        k = np.concatenate([[1.0], found.x])
    return k / float(np.sqrt(k @ k))


def inverse_coefficients(coefficients: ArrayLike, steps: int) -> Coefficients:
    """Return the first column of K^-1, (steps,)."""
    impulse = np.zeros(steps)
    impulse[:1] = 1.0
    return np.asarray(lfilter([1.0], _strategy(coefficients), impulse), np.float64)


# --- privacy --------------------------------------------------------------------------------


def sensitivity_squared(coefficients: ArrayLike, participations: int, min_separation: int) -> float:
    """Return the squared sensitivity of K times the clipped sums, for C = 1.

    An example that takes part p times, always ``min_separation`` steps apart or more, moves p
    columns of K that don't overlap: p |k|^2. Where they overlap this would be too small (13.8 are
    needed for 7.8 with the full square root over 16 steps, every fourth), so that is refused.

    Args:
        coefficients: (bands,); zeros at the end don't count as bands.
        participations: how often an example takes part at most, p.
        min_separation: least difference between two steps an example takes part in; of no
            importance with one participation.

    Raises:
        ConfigError: participations can be closer than the bands.
    """
    k = _strategy(coefficients)
    _check_count("participations", participations, participations)
    if participations > 1 and min_separation < len(k):
        raise ConfigError(
            f"bands: {len(k)} bands need an example's participations {len(k)} steps apart, they "
            f"are {min_separation}; use {max(min_separation, 1)} bands or fewer"
        )
    return participations * float(k @ k)


def amplified_history(
    noise_multiplier: float, rate: float, steps: int, bands: int
) -> tuple[Segment, ...]:
    """Return what to account for when the steps sample from ``bands`` blocks in turn.

    The data is split into ``bands`` fixed blocks; step t takes each example of block t mod bands
    with probability ``rate * bands``. Each block then sees DP-SGD of ceil(steps / bands) steps at
    that rate (arXiv:2306.08153), with Z scaled for one participation.

    Args:
        noise_multiplier: standard deviation of Z over C |k|.
        rate: expected batch over all examples, as without blocks.
        steps: of the run, or taken so far.
        bands: of the strategy; 1 is plain DP-SGD.

    Raises:
        ConfigError: a block has fewer examples than the batch expects.
    """
    block_rate = rate * bands
    if block_rate > 1 + 1e-12:  # rounding aside: 1 where a batch is a whole block
        raise ConfigError(
            f"bands: {bands} blocks with rate {rate:g} would sample each example of a block with "
            f"probability {block_rate:g}; use {max(1, math.floor(1 / rate))} bands or fewer"
        )
    return (Segment(noise_multiplier, min(block_rate, 1.0), -(-steps // bands)),)


def joint_history(noise_multiplier: float) -> tuple[Segment, ...]:
    """Return what to account for without sampling: all steps are one Gaussian mechanism.

    Args:
        noise_multiplier: standard deviation of Z over C sqrt(``sensitivity_squared``) for all
            participations.
    """
    return (Segment(noise_multiplier, 1.0, 1),)


# --- utility --------------------------------------------------------------------------------


def max_error(coefficients: ArrayLike, steps: int) -> float:
    """Return the largest variance of a prefix sum of the noise: max_t |row t of A K^-1|^2.

    For Z of variance 1; times ``sensitivity_squared`` it compares strategies at equal privacy.
    """
    return float(np.sum(_prefix_sums(_strategy(coefficients), steps) ** 2))


def mean_error(coefficients: ArrayLike, steps: int) -> float:
    """Return the mean over steps of what ``max_error`` is the maximum of."""
    return float(np.mean(np.cumsum(_prefix_sums(_strategy(coefficients), steps) ** 2)))


class StreamingNoise:
    """Turns white noise into correlated noise step by step: row t of K^-1 Z.

    out_t = (z_t - sum_{j=1}^{bands-1} k_j out_{t-j}) / k_0, out of a negative index being 0. Keeps
    bands - 1 blocks like z and makes no other of that size. Linear: the ranks' parts of one noise
    may be correlated each by itself and then added.
    """

    def __init__(self, coefficients: ArrayLike, z: Tensor) -> None:
        """Start before step 0.

        Args:
            coefficients: (bands,), k_0 not zero.
            z: (local, d) like those to come; only its shape, dtype and device are read.

        Raises:
            ConfigError: the coefficients describe no invertible strategy.
        """
        k = _strategy(coefficients)
        self._weights = [1 / float(k[0]), *(-float(kj) / float(k[0]) for kj in k[1:])]
        local, d = z.shape
        # Newest first.
        self._past = deque(empty_rows(local, d, z.dtype, z.device) for _ in k[1:])

    @torch.no_grad()
    def correlate_(self, z: Tensor) -> Tensor:
        """Overwrite white noise z (local, d) with this step's correlated noise and return it."""
        if not self._past:
            return z.mul_(self._weights[0])
        combine(list(zip(self._weights, [z, *self._past], strict=True)), out=z)
        self._past.appendleft(self._past.pop().copy_(z))
        return z

    def state_dict(self) -> dict[str, Tensor]:
        """Return the blocks (local, d), newest first, not copied: ``past.1``, ``past.2``, ..."""
        return {f"past.{age}": block for age, block in enumerate(self._past, start=1)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state_dict`` returned.

        Raises:
            ValueError: it is of another number of bands, or its rows differ in shape.
        """
        mine = self.state_dict()
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in mine.items()}:
            raise ValueError(
                f"correlated noise: state of {len(state)} blocks for {len(mine)}, or of other "
                "rows; resume with the bands and the model it was saved with"
            )
        for key, block in mine.items():
            block.copy_(state[key])


# --- shared ---------------------------------------------------------------------------------


def _prefix_sums(k: Coefficients, steps: int) -> Coefficients:
    """Return the first column of A K^-1, (steps,)."""
    return np.asarray(lfilter([1.0], k, np.ones(steps)), np.float64)


def _strategy(coefficients: ArrayLike | Sequence[float]) -> Coefficients:
    """Return the coefficients without the zeros at their end, checked."""
    k = np.trim_zeros(np.asarray(coefficients, np.float64).reshape(-1), "b")
    if not len(k) or k[0] == 0 or not np.isfinite(k).all():
        raise ConfigError(
            "coefficients: must be finite and start with one that is not 0, or K has no inverse; "
            "use sqrt_toeplitz or banded"
        )
    return k


def _check_count(name: str, count: int, limit: int) -> None:
    if not 1 <= count <= limit:
        raise ConfigError(f"{name}: {count} must lie between 1 and {max(limit, 1)}")
