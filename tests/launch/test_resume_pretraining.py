"""Pretraining goes on after a kill as if nothing had happened, streams and packed texts too."""

import json
import shutil

import pytest

from gossamer.launch.start import start_run
from gossamer.launch.status import exit_status

pytest.importorskip("transformers", reason="needs the extra: gossamer[huggingface]")
datasets = pytest.importorskip("datasets", reason="needs the extra: gossamer[huggingface]")

RUN = {
    "task": {
        "name": "pretraining",
        "model": {"hidden": 16, "layers": 1, "heads": 2, "ffn": 24},
        "context": 8,
    },
    "oracle": {"name": "backprop", "batch_size": 3},
    "optimizer": {"name": "adamw", "lr": 0.003},
    "algorithm": {"name": "all-reduce"},
    "ranks": 2,
    "steps": 8,
    "log_every": 2,
    "evaluate_every": 4,
    "checkpoint_every": 3,
    "keep_checkpoints": 10,
    "timeout_s": 60,
}
STREAM = {"dataset": "texts.jsonl", "streaming": True, "validation_documents": 5}
TWO_BATCHES_A_STEP = {"algorithm": {"name": "local-sgd", "local_steps": 2}}


@pytest.fixture(autouse=True)
def _texts(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    texts = [f"{k}: " + "some words " * (k % 4 + 1) for k in range(50)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))


def go(out=None, resume=None, file=None, **options):
    options = {"ranks": None, "transport": None, "processes": None} | options
    assert exit_status(lambda: start_run(file, [], options, out, resume)) == 0


def run(folder, task, changes=(), **options):
    values = {**RUN, **dict(changes), "task": {**RUN["task"], **task}}
    (folder / "run.yaml").write_text(json.dumps(values))
    go(folder / "out", file=folder / "run.yaml", **options)
    return folder / "out"


def cut(folder):
    """Leave the run's folder as a kill after step 4 does."""
    (folder / "summary.json").unlink()
    for step in (6, 8):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:09d}")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:17])


def outcome(folder):
    summary = json.loads((folder / "summary.json").read_text())
    figures = ("parameters_sha256", "loss", "test_loss", "perplexity", "bytes_sent")
    return [summary[figure] for figure in figures]


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ({"data": "texts.jsonl"}, {}),
        ({"data": "texts.jsonl", "documents": "single"}, {}),
        ({**STREAM, "documents": "single"}, {}),
        ({**STREAM, "documents": "single"}, TWO_BATCHES_A_STEP),
        (STREAM, {}),
        ({**STREAM, "dtype": "bfloat16"}, TWO_BATCHES_A_STEP),
    ],
)
def test_a_resumed_run_ends_as_the_undisturbed_one(tmp_path, task, changes):
    folder = run(tmp_path, task, changes)
    whole = outcome(folder)
    cut(folder)
    go(resume=folder)
    assert outcome(folder) == whole


@pytest.mark.slow
@pytest.mark.parametrize("documents", ["single", "packed"])
def test_a_stream_is_shared_alike_by_processes_and_a_resume_goes_on_with_fewer(tmp_path, documents):
    task = {**STREAM, "documents": documents}
    folder = run(tmp_path, task, processes=2, transport="gloo")
    several = outcome(folder)
    cut(folder)
    go(resume=folder, processes=1, transport="stacked")
    assert outcome(folder) == several


@pytest.mark.parametrize(("n", "does"), [(1, "repeats"), (3, "skips")])
def test_a_resume_with_other_ranks_says_what_becomes_of_a_streams_texts(tmp_path, capsys, n, does):
    folder = run(tmp_path, {**STREAM, "documents": "single"})
    cut(folder)
    go(resume=folder, ranks=n)
    assert f"the stream {does} texts" in capsys.readouterr().err


def test_a_resume_with_other_ranks_says_nothing_of_streams_where_there_is_none(tmp_path, capsys):
    folder = run(tmp_path, {"data": "texts.jsonl"})
    cut(folder)
    go(resume=folder, ranks=1)
    assert "from the mean of 2" in (said := capsys.readouterr().err)
    assert "the stream" not in said
