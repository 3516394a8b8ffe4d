"""What the fault tests share."""

import pytest
from harness import Zygote


@pytest.fixture(scope="session")
def zygote():
    """One process that has imported torch, from which all others are forked."""
    parent = Zygote()
    yield parent
    parent.close()
