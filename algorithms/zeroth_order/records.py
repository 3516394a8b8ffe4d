"""Records: a random direction's step and number, and the coefficient that came of it, 16 bytes.

What travels between ranks (``flood``), and what a run is replayed from.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from gossamer.algorithms.protocols import Algorithm, Oracle
from gossamer.runtime.errors import ConfigError

__all__ = ["RECORD", "as_records", "as_tensor", "make_records", "require_own_directions"]

RECORD = np.dtype([("step", "<u4"), ("probe", "<u4"), ("coefficient", "<f8")])


def make_records(step: int, probes: ArrayLike, coefficients: ArrayLike) -> NDArray[np.void]:
    """Return the records of one step, (probes,) of ``RECORD``."""
    numbers = np.asarray(probes, np.uint32)
    records = np.empty(numbers.shape, RECORD)
    records["step"], records["probe"], records["coefficient"] = step, numbers, coefficients
    return records


def as_tensor(records: NDArray[np.void]) -> Tensor:
    """Return the bytes of records, (16 m,) uint8."""
    return torch.from_numpy(records.view(np.uint8))


def as_records(message: Tensor) -> NDArray[np.void]:
    """Return the records of a message, (m,)."""
    return message.numpy(force=True).view(RECORD)


def require_own_directions(algorithm: Algorithm, oracle: Oracle) -> None:
    """Refuse an oracle whose estimates are not numbers for directions of each rank's own.

    Raises:
        ConfigError: says what would do.
    """
    if oracle.recipe is None:
        raise ConfigError(
            f"oracle: {algorithm.name} exchanges numbers for random directions of whole rows, "
            f"which this {oracle.name} does not give; use oracle: {{name: zeroth-order, "
            "directions: own} without pool, blocks and first_order"
        )
    if oracle.recipe["directions"] != "own":
        raise ConfigError(
            f"oracle.directions: {algorithm.name} needs directions that no two ranks share, got "
            f"{oracle.recipe['directions']}; use own"
        )
