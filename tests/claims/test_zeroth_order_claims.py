"""The small benchmark of the zeroth-order page, with its thresholds and fewer seeds."""

from __future__ import annotations

import pytest

from gossamer.launch.reproduce.simulation import Laboratory
from gossamer.launch.reproduce.zo_bench import accuracy, derivatives, queries, unstable
from gossamer.launch.reproduce.zo_prompts import alignment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SEEDS = {accuracy: 2, derivatives: 2, queries: 2, unstable: 2, alignment: 2}


LONG = {alignment: pytest.mark.long}
"""Pretrains two models, and takes longer than all others together."""


@pytest.mark.parametrize(
    "group",
    [pytest.param(group, marks=LONG.get(group, ()), id=group.__name__) for group in SEEDS],
)
def test_the_claims_of_zeroth_order_training_hold(group, lab: Laboratory, monkeypatch):
    monkeypatch.setattr(lab, "seeds", SEEDS[group])
    claims = list(group(lab))
    assert [claim for claim in claims if claim.passed is False] == []
    assert any(claim.passed for claim in claims)
