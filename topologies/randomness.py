"""Counted random numbers for schedules: round t of a seed is a pure function of (seed, t)."""

import numpy as np

from gossamer.topologies.errors import TopologyParameterError


def generator(seed: int, t: int) -> np.random.Generator:
    """Return the generator of round t: the same on every process, whatever was drawn before.

    Philox keyed by the seed, with t in the second word of its counter: drawing advances the first
    word, so rounds do not overlap (they would, with t in the first).
    """
    check_seed(seed)
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, t, 0, 0]))


def check_seed(seed: int) -> None:
    """Raise TopologyParameterError unless the seed is in 0..2^64-1."""
    if not 0 <= seed < 2**64:
        raise TopologyParameterError(f"topology.seed: must be in 0..2^64-1, got {seed}")
