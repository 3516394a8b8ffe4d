"""Resume: exact on any split, from the mean on another n, refused with the reason otherwise."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from gossamer.launch.start import start_run
from gossamer.launch.status import exit_status
from gossamer.runtime.checkpoint import Checkpoint

RUN = {
    "task": {"name": "wine", "model": "mlp", "hidden": [4]},
    "oracle": {"name": "backprop", "batch_size": 8},
    "optimizer": {"name": "momentum", "lr": 0.05},
    "algorithm": {"name": "dsgd"},
    "topology": {"name": "one_peer_exponential"},
    "ranks": 8,
    "steps": 12,
    "log_every": 2,
    "checkpoint_every": 3,
    "keep_checkpoints": 10,
    "timeout_s": 60,
}
TIMES = ("seconds", "seconds_compute", "seconds_communicate", "examples_per_second")


def go(folder, out=None, resume=None, settings=(), file=None, **options):
    """Run or resume; return the exit status."""
    options = {"ranks": None, "transport": None, "processes": None} | options
    return exit_status(lambda: start_run(file, list(settings), options, out, resume))


def outcome(folder):
    summary = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figures = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    return summary["parameters_sha256"], summary["bytes_sent"], figures


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of an undisturbed run of 8 ranks in one process."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "run.yaml").write_text(json.dumps(RUN))
    assert go(folder, folder / "out", file=folder / "run.yaml") == 0
    return folder / "out"


@pytest.fixture
def cut(whole, tmp_path):
    """Return a copy of that run as a kill after step 8 leaves it."""
    folder = tmp_path / "cut"
    shutil.copytree(whole, folder)
    (folder / "summary.json").unlink()
    for step in (9, 12):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:09d}")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:5]) + lines[5][:17])
    return folder


# --- exact ------------------------------------------------------------------------------------


def test_a_resumed_run_ends_as_the_undisturbed_one(whole, cut):
    assert go(cut, resume=cut) == 0
    assert outcome(cut) == outcome(whole)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_a_run_of_one_process_is_resumed_by_several(whole, cut, processes):
    assert go(cut, resume=cut, processes=processes, transport="gloo") == 0
    assert outcome(cut) == outcome(whole)
    assert json.loads((cut / "summary.json").read_text())["processes"] == processes


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_a_run_of_several_processes_is_resumed_by_one(whole, tmp_path, processes):
    file, out = tmp_path / "run.yaml", tmp_path / "out"
    file.write_text(json.dumps(RUN))
    assert go(tmp_path, out, file=file, processes=processes, transport="gloo") == 0
    assert outcome(out) == outcome(whole)
    checkpoint = out / "checkpoints" / "step-000000006"
    assert len(list(checkpoint.glob("rows-*.safetensors"))) == processes
    assert go(tmp_path, resume=checkpoint, processes=1, transport="stacked") == 0
    assert outcome(out) == outcome(whole)


def test_a_resume_goes_on_from_the_checkpoint_that_is_named(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    first = tmp_path / "run" / "checkpoints" / "step-000000003"
    assert go(tmp_path, resume=first) == 0
    assert outcome(tmp_path / "run") == outcome(whole)


@pytest.mark.parametrize("algorithm", ["all-reduce", "dsgd"])
@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "galore", "lr": 0.01, "rank": 4, "refresh": 4, "targets": ["weight"]},
        {"name": "adam8bit", "lr": 0.01},
    ],
    ids=lambda section: section["name"],
)
def test_projected_and_coded_moments_are_resumed_to_the_bit(optimizer, algorithm, tmp_path):
    task = RUN["task"] | {"hidden": [64, 64]}  # 4096 elements: as codes
    changed = {"task": task, "optimizer": optimizer, "algorithm": {"name": algorithm}, "ranks": 2}
    file, out = tmp_path / "run.yaml", tmp_path / "out"
    file.write_text(json.dumps(RUN | changed))
    assert go(tmp_path, out, file=file) == 0
    undisturbed = outcome(out)
    rows = Checkpoint.open(out / "checkpoints" / "step-000000006").rows(range(2))
    if optimizer["name"] == "adam8bit":
        codes = rows["state/optimizer.m.codes"]
        assert (codes.shape, codes.dtype) == ((2, 4096), torch.uint8)
    else:
        assert "state/optimizer.basis" in rows
    assert go(tmp_path, resume=out / "checkpoints" / "step-000000006") == 0  # amid a cycle of P
    assert outcome(out) == undisturbed


@pytest.fixture
def private(tmp_path):
    """Return the folder of a private run that was killed after step 3, and its secret keys."""
    pytest.importorskip("opacus")
    dp = {"name": "dp", "noise_multiplier": 2.0}
    task = {**RUN["task"], "standardize": False}
    optimizer = {"name": "sgd", "lr": 0.05, "schedule": "cosine"}
    changed = {"task": task, "oracle": [RUN["oracle"], dp], "optimizer": optimizer, "steps": 6}
    (tmp_path / "run.yaml").write_text(json.dumps(RUN | changed))
    folder = tmp_path / "out"
    assert go(tmp_path, folder, file=tmp_path / "run.yaml") == 0
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-000000006")
    return folder, _keys(folder, 3)


def _keys(folder, step):
    return Checkpoint.open(folder / "checkpoints" / f"step-{step:09d}").rows(range(8))[
        "oracle/dp.keys"
    ]


def test_a_private_run_goes_on_with_its_noise_where_nothing_changed(private):
    folder, keys = private
    assert go(folder, resume=folder) == 0
    assert torch.equal(_keys(folder, 6), keys)


@pytest.mark.parametrize("setting", ["steps=9", "optimizer.lr=0.1"])
def test_a_private_run_takes_new_noise_where_redone_steps_would_differ(private, setting):
    # Steps 4 to 6 may have been seen; a cosine schedule has other rates for another end.
    folder, keys = private
    assert go(folder, resume=folder, settings=[setting]) == 0
    assert (_keys(folder, 6) != keys).all()


def test_a_resume_into_the_same_folder_by_out_is_no_folder_in_use(whole, cut):
    assert go(cut, out=cut, resume=cut) == 0
    assert outcome(cut) == outcome(whole)


def test_a_resume_into_another_folder_leaves_the_old_one_alone(whole, cut, tmp_path):
    before = sorted(p.relative_to(cut) for p in cut.rglob("*"))
    assert go(cut, out=tmp_path / "new", resume=cut) == 0
    assert sorted(p.relative_to(cut) for p in cut.rglob("*")) == before
    assert outcome(tmp_path / "new")[0] == outcome(whole)[0]


def test_going_back_to_an_older_step_forgets_the_newer_checkpoints(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    first = folder / "checkpoints" / "step-000000003"
    settings = ["optimizer.lr=0.01", "steps=5", "checkpoint_every=0"]
    assert go(folder, resume=first, settings=settings) == 0
    assert Checkpoint.open(folder).meta["step"] == 5
    assert outcome(folder)[0] != outcome(whole)[0]


def test_seconds_go_on_where_they_were(cut):
    path = cut / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()[:5]]
    lines[3]["seconds"] = 1000.0  # step 6, of the checkpoint
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert go(cut, resume=cut) == 0
    seconds = [json.loads(line).get("seconds", 0.0) for line in path.read_text().splitlines()]
    assert all(1000.0 <= s < 1100.0 for s in seconds[3:])


def test_examples_are_counted_on_also_on_another_number_of_ranks(whole, tmp_path):
    line = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["examples"] == 12 * 8 * 8  # steps, ranks and batch size
    first = whole / "checkpoints" / "step-000000003"
    assert go(tmp_path, tmp_path / "out", resume=first, ranks=4, settings=["steps=5"]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["examples"] == 3 * 8 * 8 + 2 * 4 * 8
    assert summary["examples_per_second"] > 0
    assert summary["peak_memory_mib"] > 50  # torch alone takes more


def test_a_run_killed_before_its_first_checkpoint_starts_over(whole, cut, capsys):
    shutil.rmtree(cut / "checkpoints")
    assert go(cut, resume=cut) == 0
    assert "has no checkpoint yet" in capsys.readouterr().err
    assert outcome(cut) == outcome(whole)


def test_a_run_killed_between_its_last_checkpoint_and_its_summary_is_finished(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "summary.json").unlink()
    assert go(folder, resume=folder) == 0
    assert outcome(folder) == outcome(whole)


# --- oracle buffers ---------------------------------------------------------------------------

BATCH_NORM = """
import numpy as np
import torch
from torch import nn

from gossamer.algorithms.problems import Problem


class Data:
    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(64, 5, generator=generator)
        self.y = (self.x.sum(1) > 0).long()

    def __len__(self):
        return 64

    def __getitem__(self, indices):
        return self.x[indices], self.y[indices]


def loss(module, inputs):
    return nn.functional.cross_entropy(module(inputs[0]), inputs[1])


def problem(n, seed):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    return Problem(module, Data(), tuple(np.array_split(np.arange(64), n)), loss)
"""


def test_running_statistics_are_resumed_with_the_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "batch_norm_task.py").write_text(BATCH_NORM)
    task = {"name": "custom", "build": "batch_norm_task:problem"}
    (tmp_path / "run.yaml").write_text(json.dumps(RUN | {"task": task, "ranks": 4}))
    file = tmp_path / "run.yaml"
    assert go(tmp_path, tmp_path / "whole", file=file) == 0
    assert go(tmp_path, tmp_path / "part", file=file, settings=["steps=6"]) == 0
    half = Checkpoint.open(tmp_path / "part").rows(range(4))
    running = half["oracle/buffers.1.running_mean"]
    assert len({tuple(row) for row in running.tolist()}) == 4, "each rank has its own"
    assert go(tmp_path, resume=tmp_path / "part", settings=["steps=12"]) == 0
    ends = [Checkpoint.open(tmp_path / name).rows(range(4)) for name in ("whole", "part")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    sums = [json.loads((tmp_path / n / "summary.json").read_text()) for n in ("whole", "part")]
    assert sums[0]["parameters_sha256"] == sums[1]["parameters_sha256"]


# --- another number of ranks ------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "processes"), [(4, 1), (5, 2), (16, 1)])
def test_another_number_of_ranks_starts_from_the_mean(cut, tmp_path, capfd, ranks, processes):
    out = tmp_path / "new"
    transport = "stacked" if processes == 1 else "gloo"
    settings = ["topology={name: ring}"]
    options = {"ranks": ranks, "processes": processes, "transport": transport}
    # Every step's work is undone by a learning rate too small to move a float32.
    settings += ["optimizer.lr=1e-30", "steps=7"]
    assert go(cut, out, resume=cut, settings=settings, **options) == 0
    err = capfd.readouterr().err
    if processes == 1:  # others' stderr goes where the fork server's went
        assert err.count(f"resuming {ranks} ranks from the mean of 8") == 1
    mean = load_file(cut / "checkpoints" / "step-000000006" / "mean.safetensors")
    new = Checkpoint.open(out)
    assert new.meta["n"] == ranks
    assert new.meta["step"] == 7
    found = new.mean()
    assert found.keys() == mean.keys()
    for name, value in mean.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)
    rows = new.rows(range(ranks))["state/x"]
    # Averages of equal rows differ from them by the rounding of the weights.
    torch.testing.assert_close(rows, rows[:1].expand_as(rows), rtol=1e-6, atol=1e-7)
    first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 7, "the steps go on, in a folder of its own"


# --- refused ----------------------------------------------------------------------------------


@pytest.fixture
def refused(cut, capsys):
    """Check that resuming ``cut`` ends with 2, one message with these words, nothing touched."""

    def check(words, settings=(), resume=None, **options):
        before = {p: p.read_bytes() for p in cut.rglob("*") if p.is_file()}
        assert go(cut, resume=resume or cut, settings=settings, **options) == 2
        err = capsys.readouterr().err
        assert err.startswith("gossamer: error: "), err
        assert err.count("\n") == 1, err
        for word in words:
            assert word in err, f"{word!r} is not in {err!r}"
        assert {p: p.read_bytes() for p in cut.rglob("*") if p.is_file()} == before

    return check


def test_another_model_is_refused(refused):
    words = ["--resume", "another model", "1.weight", "config.yaml"]
    refused(words, ["task.hidden=[5]"])
    refused(words[:2], ["task.model=linear", "task.hidden=[64]"])


def test_another_model_is_refused_from_the_mean_too(refused, tmp_path):
    fixed = "topology={name: ring}"
    refused(["another model"], ["task.hidden=[5]", fixed], ranks=4)
    refused(["another model"], ["task.model=linear", "task.hidden=[64]", fixed], ranks=5)


def test_another_algorithm_is_refused(refused):
    refused(["lacks 'state/row'"], ["algorithm={name: d-nasa}", "optimizer=null"])
    refused(["optimizer", "also holds"], ["optimizer={name: sgd, lr: 0.1}"])


def test_every_changed_field_is_named_in_one_line(cut, tmp_path, capsys):
    changes = ["optimizer.lr=0.01", "algorithm={name: dsgd, order: cta}", "topology={name: ring}"]
    free = ["steps=7", "log_every=1", "checkpoint_every=0"]
    assert go(cut, tmp_path / "new", resume=cut, settings=changes + free) == 0
    lines = [x for x in capsys.readouterr().err.splitlines() if "resuming with another" in x]
    assert len(lines) == 1
    for word in ("optimizer.lr (0.05 -> 0.01)", "algorithm.order (atc -> cta)", "topology.name"):
        assert word in lines[0]
    for word in ("steps", "log_every", "checkpoint_every", "seed"):
        assert word not in lines[0]


def test_nothing_is_said_where_nothing_changed(cut, capsys):
    assert go(cut, resume=cut) == 0
    assert "resuming with" not in capsys.readouterr().err


def test_a_state_that_is_tied_to_its_graph_is_refused_on_another(tmp_path, capsys):
    values = RUN | {"algorithm": {"name": "d2"}, "optimizer": {"name": "sgd", "lr": 0.05}}
    values |= {"topology": {"name": "ring"}, "steps": 3}
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    assert go(tmp_path, tmp_path / "out", file=tmp_path / "run.yaml") == 0
    capsys.readouterr()
    other = ["topology={name: torus}", "steps=4"]
    assert go(tmp_path, tmp_path / "new", resume=tmp_path / "out", settings=other) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    for word in ("topology", "d2", "the same graph", "config.yaml"):
        assert word in err


def test_steps_already_made_are_refused(refused, cut, whole, capsys):
    refused(["steps", "step 6 already", "got 5", "-s steps="], ["steps=5"])
    assert go(whole, resume=whole) == 2
    assert "is at step 12 already, got 12" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["rows-00000.safetensors", "mean.safetensors", "checkpoint.json"])
def test_a_checkpoint_cut_short_is_refused(refused, cut, name):
    path = cut / "checkpoints" / "step-000000006" / name
    path.write_bytes(path.read_bytes()[:-7])
    refused([str(path), "--resume", "step-000000003"])


def test_a_missing_file_of_a_checkpoint_is_refused(refused, cut):
    path = cut / "checkpoints" / "step-000000006" / "rows-00000.safetensors"
    path.unlink()
    refused([str(path), "missing", "step-000000003"])


def test_a_checkpoint_without_its_configuration_asks_for_the_file(refused, cut):
    (cut / "config.yaml").unlink()
    refused(["config.yaml", "gossamer run FILE --resume"])


def test_a_folder_without_checkpoints_is_refused(refused, tmp_path):
    refused(["resume", "no complete checkpoint"], resume=tmp_path)
