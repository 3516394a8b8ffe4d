"""Contrastive runs go on after a kill as if nothing had happened: chains, means, queues, caches."""

import json
import shutil

import pytest
import torch

from gossamer.algorithms.contrastive.emc2 import EMC2
from gossamer.launch.start import start_run
from gossamer.launch.status import exit_status
from gossamer.runtime.checkpoint import Checkpoint

RUN = {
    "task": {
        "name": "contrastive",
        "examples": 24,
        "encoder": {"name": "mlp", "hidden": [16], "dim": 8},
        "probe_examples": 12,
        "probes": [],
    },
    "optimizer": {"name": "adam", "lr": 0.01},
    "algorithm": {"name": "all-reduce"},
    "ranks": 2,
    "steps": 8,
    "log_every": 2,
    "checkpoint_every": 3,
    "keep_checkpoints": 10,
    "timeout_s": 60,
}
CHAINS = {"name": "emc2", "beta": 100, "score": "fresh", "burn_in": 0.0}
LOSSES = {
    "fresh": CHAINS,
    "stale": {**CHAINS, "score": "stale"},
    "sogclr": "sogclr",
    "isogclr": "isogclr",
    "moco": {"name": "moco", "queue": 40},
    "negcache": {"name": "negcache", "refresh": 0.1},
}


def go(folder=None, resume=None, file=None, settings=(), **options):
    options = {"ranks": None, "transport": None, "processes": None} | options
    assert (
        exit_status(lambda: start_run(file, ["steps=8", *settings], options, folder, resume)) == 0
    )


def run(folder, loss, shards=4, **changes):
    oracle = {"name": "contrastive", "batch_size": 4, "shards": shards, "loss": loss}
    values = {**RUN, "oracle": oracle, **changes}
    (folder / "run.yaml").write_text(json.dumps(values))
    go(folder / "out", file=folder / "run.yaml")
    return folder / "out"


def cut(folder):
    """Leave the run's folder as a kill after step 4 does."""
    (folder / "summary.json").unlink()
    for step in (6, 8):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:09d}")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:17])


def outcome(folder, ranks=2):
    summary = json.loads((folder / "summary.json").read_text())
    figures = ("parameters_sha256", "loss", "pairwise_cosine", "bytes_sent")
    rows = Checkpoint.open(folder / "checkpoints" / "step-000000008").rows(range(ranks))
    kept = {name: rows[name] for name in rows if name.startswith("oracle/loss.")}
    return [summary[figure] for figure in figures], kept


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_resumed_run_ends_as_the_undisturbed_one(loss, tmp_path):
    folder = run(tmp_path, loss)
    figures, kept = outcome(folder)
    assert kept
    cut(folder)
    go(resume=folder)
    again, kept_again = outcome(folder)
    assert again == figures
    assert kept.keys() == kept_again.keys()
    for name, table in kept.items():
        assert torch.equal(table, kept_again[name]), name


def test_empty_chains_would_make_another_run(tmp_path, monkeypatch):
    folder = run(tmp_path, CHAINS)
    figures, _ = outcome(folder)
    cut(folder)
    monkeypatch.setattr(EMC2, "load_state_dict", lambda self, state: None)
    go(resume=folder)
    assert outcome(folder)[0] != figures


@pytest.mark.slow
def test_a_run_of_one_process_is_resumed_by_two(tmp_path):
    folder = run(tmp_path, CHAINS)
    expected = outcome(folder)[0]
    cut(folder)
    go(resume=folder, processes=2, transport="gloo")
    assert outcome(folder)[0] == expected


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (CHAINS, "and so do the chains of examples"),
        ("sogclr", "and so do the running means of examples"),
        ({"name": "moco", "queue": 40}, "and so do the key encoders and their queues"),
        ("simclr", "starts afresh\n"),
    ],
)
def test_another_number_of_ranks_says_what_is_lost(loss, words, tmp_path, capfd):
    folder = run(tmp_path, loss, shards=None)
    capfd.readouterr()
    settings = ["oracle.batch_size=2"]
    go(tmp_path / "four", folder / "checkpoints" / "step-000000003", settings=settings, ranks=4)
    err = capfd.readouterr().err
    assert "resuming 4 ranks from the mean of 2" in err
    assert words in err


@pytest.mark.parametrize(
    ("loss", "mode", "ranks"),
    [
        ("fresh", "infinite", 4),
        ("stale", "finite", 1),
        ("isogclr", "infinite", 1),
        ("negcache", "finite", 4),
    ],
)
def test_shards_carry_what_is_remembered_to_another_number_of_ranks(
    loss, mode, ranks, tmp_path, capfd
):
    changes = {
        "task": {**RUN["task"], "views": {"mode": mode}, "dtype": "float64"},
        "optimizer": {"name": "sgd", "lr": 0.05},
    }
    folder = run(tmp_path, LOSSES[loss], **changes)
    figures, kept = outcome(folder)
    settings = [f"oracle.batch_size={8 // ranks}"]
    first = folder / "checkpoints" / "step-000000003"
    go(tmp_path / "other", first, settings=settings, ranks=ranks)
    assert "of examples, which go on" in capfd.readouterr().err
    again, kept_again = outcome(tmp_path / "other", ranks)
    assert again[1:3] == pytest.approx(figures[1:3], rel=1e-7)
    for name, table in kept.items():  # the shards of all ranks, one after the other
        torch.testing.assert_close(
            table.flatten(), kept_again[name].flatten(), rtol=1e-5, atol=1e-6
        )
