"""What the claims share: a laboratory whose processes live as long as the tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from gossamer.launch.reproduce.simulation import Laboratory


@pytest.fixture(scope="session")
def lab() -> Iterator[Laboratory]:
    """Run simulations on all cores, three seeds each where something is random."""
    with Laboratory(seeds=3, jobs=min(8, os.cpu_count() or 1)) as laboratory:
        yield laboratory
