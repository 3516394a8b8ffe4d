"""Strategies of correlated noise, as numbers: BandMF and the square-root Toeplitz mechanism.

The noise of the clipped sums is K^-1 Z: row t goes to step t, Z is white, K the strategy, a lower
triangular Toeplitz matrix given by its first column ``k`` (bands,). What a step adds, later steps
partly take back, so that the sum of all gradients, which SGD follows, carries less noise
(arXiv:2306.08153, arXiv:2405.15913). The rows of Z have standard deviation noise_multiplier * C *
|k|: an example takes part in steps ``bands`` apart or more, so that the columns of K it moves do
not overlap, and ``amplified_history`` is what to account for.
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
    """Return the coefficients (bands,) of norm 1 with the least mean error over ``steps``.

    The error of step t is the variance of the noise in the sum of the gradients so far, |row t of
    A K^-1|^2 with A the prefix-sum matrix. Found by L-BFGS from the truncated ``sqrt_toeplitz``,
    with the exact gradient; one evaluation costs O(steps * bands). One band is independent noise.

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
        sums = np.asarray(lfilter([1.0], k, np.ones(steps)), np.float64)  # A K^-1's first column
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
