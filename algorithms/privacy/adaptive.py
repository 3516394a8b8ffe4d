"""The price of adaptive clipping: a noisy count of unclipped examples beside each gradient."""

from __future__ import annotations

import math

from gossamer.runtime.errors import ConfigError

__all__ = ["shared_noise"]


def shared_noise(sigma: float, expected: float) -> tuple[float, float]:
    """Return the noise of the gradient and of the count that together cost what sigma does.

    sigma_g^-2 + (2 sigma_b)^-2 = sigma^-2 (arXiv:1905.03871, theorem 1), with sigma_b = B / 20.

    Args:
        sigma: noise multiplier of the release.
        expected: B, the expected batch over all ranks.

    Returns:
        sigma_g, a noise multiplier, and sigma_b, a standard deviation; both 0 where sigma is.

    Raises:
        ConfigError: the count would cost more than sigma allows.
    """
    if sigma == 0:
        return 0.0, 0.0
    count_std = expected / 20
    rest = sigma**-2 - (2 * count_std) ** -2
    if rest <= 0:
        raise ConfigError(
            f"oracle.clip: adaptive counts with noise {count_std:g} for an expected batch of "
            f"{expected:g}, too little for sigma = {sigma:g}; use a larger batch_size"
        )
    return math.sqrt(1 / rest), count_std
