"""What the claims share: a laboratory whose processes live as long as the tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from gossamer.launch.reproduce.simulation import Laboratory


@pytest.fixture(scope="session")
def lab() -> Iterator[Laboratory]:
    """Run simulations on the cores of this worker, three seeds where something is random."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    with Laboratory(seeds=3, jobs=max(1, min(8, (os.cpu_count() or 1) // workers))) as laboratory:
        yield laboratory
