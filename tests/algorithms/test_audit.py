"""The audit: what guesses prove, where epsilon is known and where a run is broken."""

import json
import math

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from gossamer.algorithms.privacy.audit import epsilon_lower_bound
from gossamer.algorithms.privacy.noise import SecretNoise
from gossamer.launch.audit import audit
from gossamer.launch.cli import app
from gossamer.runtime.errors import ConfigError

RUN = {
    "task": {"name": "digits", "standardize": False},
    "oracle": [
        {"name": "backprop", "sampling": "full"},
        {"name": "dp", "noise_multiplier": 8.0, "delta": 1e-5, "noise_seed": 0},
    ],
    "algorithm": {"name": "all-reduce"},
    "optimizer": {"name": "sgd", "lr": 1.0},
    "ranks": 4,
    "steps": 30,
}


@pytest.fixture
def file(tmp_path):
    """Return a function that writes a run and returns its path."""

    def write(**changes):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(RUN | changes))
        return path

    return write


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_randomised_answers_are_seldom_thought_worse_than_they_are(epsilon):
    # Each canary's coin is told right with the most that epsilon allows: the bound's worst case.
    share = 1 / (1 + math.exp(-epsilon))
    right = np.random.default_rng(0).binomial(200, share, size=600)
    bound_of = {v: epsilon_lower_bound(v, 200, 200, delta=0.0) for v in set(right.tolist())}
    bounds = [bound_of[v] for v in right.tolist()]
    assert np.mean(np.array(bounds) > epsilon) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 600)
    assert np.mean(bounds) > epsilon / 2


def test_every_guess_right_proves_what_a_binomial_proves():
    found = epsilon_lower_bound(100, 100, 100, delta=0.0, confidence=0.95)
    assert 1 / (1 + math.exp(-found)) ** 100 == pytest.approx(0.05, rel=1e-4)


def test_guesses_no_better_than_a_coin_prove_nothing():
    assert epsilon_lower_bound(50, 100, 1000, delta=1e-5) == 0.0


def test_delta_weakens_the_proof():
    bounds = [epsilon_lower_bound(95, 100, 1000, delta) for delta in (0.0, 1e-6, 1e-4)]
    assert bounds[0] > bounds[1] > bounds[2] > 0


@pytest.mark.parametrize(
    ("algorithm", "mode"),
    [("all-reduce", "split"), ("all-reduce", "replicated"), ("dsgd", "local")],
)
def test_a_run_leaks_no_more_than_it_reports(algorithm, mode, file):
    oracle = [RUN["oracle"][0], RUN["oracle"][1] | {"noise_mode": mode}]
    path = file(oracle=oracle, algorithm={"name": algorithm})
    for seed in range(2):
        found = audit(path, [f"oracle.dp.noise_seed={seed}"], canaries=400, seed=seed)
        assert 0 < found.lower_bound <= found.reported


def test_poisson_batches_leak_no_more_than_reported_either(file):
    oracle = [{"name": "backprop", "batch_size": 64}, RUN["oracle"][1] | {"noise_multiplier": 2.0}]
    found = audit(file(oracle=oracle, steps=60), [], canaries=400)
    assert 0 < found.lower_bound <= found.reported


def test_noise_a_fifth_of_what_was_accounted_for_is_found_out(file, monkeypatch):
    honest = SecretNoise.scales
    monkeypatch.setattr(
        SecretNoise, "scales", lambda self, total: [s / 5 for s in honest(self, total)]
    )
    path = file()
    found = audit(path, [], canaries=400)
    assert found.refuted
    command = ["analyze", "audit", str(path), "--canaries", "400", "--json"]
    result = CliRunner().invoke(app, command, standalone_mode=False)
    assert result.return_value == 1
    assert json.loads(result.output)["lower_bound"] == found.lower_bound


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"oracle": {"name": "backprop"}}, {}, "oracle: there is no dp in it"),
        ({}, {"canaries": 2000}, "canaries: 2000 must be between 2 and the 1440 examples"),
        ({}, {"guesses": 2000}, "--guesses: 2000 must be between 1 and the 1000 canaries"),
    ],
)
def test_what_cannot_be_audited_is_refused(changes, options, message, file):
    with pytest.raises(ConfigError, match=message):
        audit(file(**changes), [], **options)
