"""A contrastive run from YAML: its figures, summary, report and schema."""

import json
import math

import pytest

from gossamer.launch.schema import json_schema

RUN = {
    "task": {
        "name": "contrastive",
        "examples": 24,
        "views": {"mode": "finite"},
        "encoder": {"name": "mlp", "hidden": [16], "dim": 8},
        "probe_examples": 24,
    },
    "oracle": {"name": "contrastive", "batch_size": 4, "loss": {"name": "emc2", "beta": 5}},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "algorithm": {"name": "all-reduce"},
    "ranks": 2,
    "steps": 4,
    "log_every": 2,
    "evaluate_every": 2,
}


@pytest.fixture
def lines(invoke, tmp_path):
    (tmp_path / "run.yaml").write_text(json.dumps(RUN))
    status, err = invoke("run", "run.yaml", "--out", "out")
    assert status == 0, err
    return [json.loads(x) for x in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]


def test_a_run_logs_what_the_batches_and_the_evaluations_say(lines, tmp_path):
    steps = [line for line in lines if line["step"]]
    assert [line["step"] for line in steps] == [2, 4]
    for line in steps:
        assert 0 < line["acceptance"] <= 1
        assert 0 <= line["held_share"] <= 1
        assert line["chain_age"] >= 0
        assert -1 <= line["negative_cosine"] <= 1
        assert -1 <= line["positive_cosine"] <= 1
        assert math.isfinite(line["batch_loss"])
        assert line["collapsed_loss"] == pytest.approx(math.log(46))
        assert line["collapse"] in (0, 1)
        assert -1 <= line["pairwise_cosine"] <= 1
        assert line["grad_norm"] > 0
        assert line["examples"] == 8 * line["step"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    for name in ("loss", "collapse", "pairwise_cosine", "retrieval_accuracy"):
        assert summary[name] == steps[-1][name]


def test_its_report_shows_the_figures(lines, invoke, tmp_path):
    page = (tmp_path / "out" / "report.html").read_text()
    for name in ("collapse", "acceptance", "pairwise cosine", "held share"):
        assert name in page


def test_evaluations_are_at_the_inverse_temperature_of_the_loss(lines, invoke, tmp_path):
    (tmp_path / "other.yaml").write_text(
        json.dumps({**RUN, "oracle": {**RUN["oracle"], "loss": {"name": "emc2", "beta": 50}}})
    )
    status, err = invoke("run", "other.yaml", "--out", "other")
    assert status == 0, err
    first = json.loads((tmp_path / "other" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == lines[0]["step"] == 0
    assert first["loss"] != lines[0]["loss"]
    assert first["pairwise_cosine"] == lines[0]["pairwise_cosine"]  # the same parameters


def test_config_yaml_of_a_run_makes_the_run_again(lines, invoke, tmp_path):
    status, err = invoke("run", "out/config.yaml", "--out", "again")
    assert status == 0, err
    found = [
        json.loads((tmp_path / f / "summary.json").read_text())["parameters_sha256"]
        for f in ("out", "again")
    ]
    assert found[0] == found[1]


def test_the_schema_knows_the_oracle_its_losses_and_the_task():
    text = json.dumps(json_schema())
    for word in ("contrastive", "burn_in_until", "isogclr", "negcache", "first_visit", "queue"):
        assert word in text
