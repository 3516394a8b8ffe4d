"""SLTrain's promises in small (arXiv:2406.02214), with the thresholds of its reproduction."""

from __future__ import annotations

import pytest

from gossamer.launch.reproduce.simulation import Laboratory
from gossamer.launch.reproduce.sltrain import library, sizes, supports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
pytest.importorskip("transformers", reason="needs the extra: gossamer[huggingface]")

RATES = {"full rank": [1e-3], "low rank": [8e-3], "SLTrain": [5e-3]}
"""The best of those that ``gossamer reproduce sltrain`` tries, and for SLTrain the next."""


def test_parameters_are_the_papers(lab: Laboratory):
    claims = list(sizes(lab))
    assert len(claims) == 15
    assert all(claim.passed for claim in claims)


@pytest.mark.parametrize(
    "seeds", [1, pytest.param(3, marks=pytest.mark.long)], ids=["one seed", "three seeds"]
)
def test_sltrain_is_near_full_rank_where_low_rank_is_not(lab: Laboratory, monkeypatch, seeds):
    monkeypatch.setattr(lab, "seeds", seeds)
    claims = list(library(lab, RATES))
    assert [claim for claim in claims if claim.passed is False] == []
    assert sum(claim.passed is True for claim in claims) == 2


@pytest.mark.long
def test_random_supports_are_as_good_as_each_other(lab: Laboratory):
    [claim] = supports(lab)
    assert claim.passed
