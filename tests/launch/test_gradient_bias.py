"""Mean gradients at fixed parameters against the exact one; and EMC^2's groups without data."""

from __future__ import annotations

from functools import partial

import pytest

from gossamer.launch.reproduce.emc2 import METHODS, mnist, run
from gossamer.launch.reproduce.gradient_bias import exact_gradient, gradient_bias
from gossamer.launch.reproduce.simulation import Laboratory, Simulation, simulate

BETA = 5.0
OPTIONS = {"examples": 8, "batch_size": 4, "beta": BETA, "steps": 2, "probes": []}


def norm_and_travel(program):
    """The exact gradient's norm, and how far parameters are from where they were before."""
    before = program.state.x.clone()
    norm = float(exact_gradient(program, BETA).norm())
    return {"exact_norm": norm, "moved": float((program.state.x - before).abs().max())}


def watched(probe):
    values = run(METHODS["DCL"], **OPTIONS).values
    return simulate(Simulation(values, evaluations=2, probe=probe))


def test_the_exact_gradient_is_that_of_the_evaluation():
    found = watched(norm_and_travel)
    for record in found.records:
        assert record["exact_norm"] == pytest.approx(record["grad_norm"], rel=1e-5)
        assert record["moved"] == 0


def test_a_softmax_over_all_has_no_bias_and_one_over_the_batch_has():
    for loss, batch_size, low, high in (
        ({"name": "full"}, 8, 0.0, 1e-5),
        ({"name": "full"}, 4, 0.0, 1e-5),  # an epoch holds every anchor once
        (METHODS["DCL"], 8, 0.0, 1e-5),
        (METHODS["DCL"], 4, 1e-3, 1.0),
    ):
        section = {**loss, "beta": BETA}
        probe = partial(gradient_bias, loss=section, batch_size=batch_size, epochs=2)
        found = watched(probe)
        assert "bias" not in found.records[0]
        assert low <= found.last("bias") <= high
        assert found.last("bias_cosine") == pytest.approx(1, abs=0.1)


def test_a_look_at_biases_leaves_the_run_as_it_is():
    section = {**METHODS["EMC^2"], "beta": BETA}
    probe = partial(gradient_bias, loss=section, batch_size=2, epochs=1)
    assert watched(probe).sha256 == watched(None).sha256


def test_mnist_is_skipped_and_says_why_without_its_data(monkeypatch, tmp_path):
    monkeypatch.delenv("GOSSAMER_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    [claim] = mnist(Laboratory())
    assert claim.passed is None
    assert "GOSSAMER_DATA" in claim.note
