"""EMC^2's promises in small (arXiv:2404.10575), with the thresholds of its reproduction."""

from __future__ import annotations

import pytest

from gossamer.algorithms.tasks.files import find_data
from gossamer.launch.reproduce.emc2 import ELSEWHERE, bias, chains, digits, elsewhere, mnist
from gossamer.launch.reproduce.simulation import Laboratory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SEEDS = pytest.mark.parametrize(
    "seeds", [1, pytest.param(3, marks=pytest.mark.long)], ids=["one seed", "three seeds"]
)


def failed(claims):
    return [claim for claim in claims if claim.passed is False]


def judged(claims):
    return sum(claim.passed is not None for claim in claims)


def test_the_chains_laws_hold(lab: Laboratory):
    claims = list(chains(lab))
    assert failed(claims) == []
    assert judged(claims) == 7


@SEEDS
def test_the_mean_gradient_of_small_batches_is_near_the_exact_one(
    lab: Laboratory, monkeypatch, seeds
):
    monkeypatch.setattr(lab, "seeds", seeds)
    claims = list(bias(lab, [(14.28, 4), (14.28, 32)], ["EMC^2"]))
    claims += bias(lab, [(14.28, 4)], ["SimCLR", "DCL"], epochs=20)  # far beyond Monte Carlo's part
    assert failed(claims) == []
    assert judged(claims) == 4


@SEEDS
def test_the_exact_loss_ends_below_that_of_its_peers(lab: Laboratory, monkeypatch, seeds):
    monkeypatch.setattr(lab, "seeds", seeds)
    claims = list(digits(lab, ["SimCLR", "SogCLR", "EMC^2"]))
    assert failed(claims) == []
    assert judged(claims) == 4


@pytest.mark.long
def test_where_emc2_does_not_win(lab: Laboratory):
    claims = list(elsewhere(lab))
    assert failed(claims) == []
    assert judged(claims) == len(ELSEWHERE)


@pytest.mark.long
@pytest.mark.skipif(find_data("mnist10k") is None, reason="needs mnist10k in GOSSAMER_DATA")
def test_on_mnist_the_exact_loss_ends_below_that_of_its_peers(lab: Laboratory):
    best = {"SimCLR": [3e-3], "DCL": [1e-3], "SogCLR": [1e-3], "EMC^2": [1e-3]}
    claims = list(mnist(lab, best))
    assert failed(claims) == []
    assert judged(claims) == 1
