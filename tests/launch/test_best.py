"""keep_best: the checkpoint at the best evaluation stays, and the summary says when it was."""

import json
import shutil
from pathlib import Path

import pytest
from test_resume import go

from gossamer.launch.best import Best
from gossamer.runtime import Communicator, StackedTransport
from gossamer.runtime.checkpoint import Checkpoint
from gossamer.topologies import build

# A rate that overshoots: the loss falls, then rises.
RUN = {
    "task": {"name": "wine", "model": "mlp", "hidden": [4]},
    "oracle": {"name": "backprop", "batch_size": 8},
    "optimizer": {"name": "sgd", "lr": 1.5},
    "algorithm": {"name": "dsgd"},
    "ranks": 2,
    "steps": 30,
    "log_every": 1,
    "evaluate_every": 1,
    "checkpoint_every": 5,
    "keep_checkpoints": 10,
}


def run(folder, figure, out="out", **options):
    (folder / "run.yaml").write_text(json.dumps(RUN))
    settings = [f"keep_best={figure}"]
    assert go(folder, folder / out, file=folder / "run.yaml", settings=settings, **options) == 0
    return folder / out


def lines_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("figure", "sign"), [("loss", -1), ("accuracy", 1)])
def test_the_first_of_the_best_evaluations_stays_with_its_figures(tmp_path, figure, sign):
    out = run(tmp_path, figure)
    lines = lines_of(out)
    best = max(lines, key=lambda line: (sign * line[figure], -line["step"]))
    assert 0 < best["step"] < 30
    summary = json.loads((out / "summary.json").read_text())
    assert {"step", figure, "consensus"} <= set(summary["best"]) < set(best)
    assert summary["best"] == {name: best[name] for name in summary["best"]}
    assert [p.name for p in (out / "best").iterdir()] == [f"step-{best['step']:09d}"]
    assert Checkpoint.open(out / "best").meta["step"] == best["step"]


def test_a_run_can_go_on_from_its_best_in_a_folder_of_its_own(tmp_path):
    out = run(tmp_path, "loss")
    step = Checkpoint.open(out / "best").meta["step"]
    assert go(tmp_path, tmp_path / "more", resume=out / "best") == 0
    again = {line["step"]: line["loss"] for line in lines_of(tmp_path / "more")}
    assert min(again) == step + 1
    assert {s: again[s] for s in again} == {
        line["step"]: line["loss"] for line in lines_of(out) if line["step"] > step
    }


def cut_after(out, step):
    """Leave a run as a kill does after the checkpoint of that step."""
    (out / "summary.json").unlink()
    for path in (out / "checkpoints").iterdir():
        if Checkpoint.open(path).meta["step"] > step:
            shutil.rmtree(path)


@pytest.mark.parametrize("step", [5, 25, 30])
def test_a_resumed_run_ends_with_the_same_best(tmp_path, step):
    out = run(tmp_path, "loss")
    expected = json.loads((out / "summary.json").read_text())["best"]
    assert 25 < expected["step"] < 30
    cut_after(out, step)
    assert go(tmp_path, resume=out, settings=["steps=31"]) == 0
    assert json.loads((out / "summary.json").read_text())["best"] == expected


def test_a_best_of_steps_that_are_made_otherwise_does_not_stay(tmp_path):
    out = run(tmp_path, "loss")
    cut_after(out, 5)
    assert go(tmp_path, resume=out, settings=["optimizer.lr=0.001", "steps=10"]) == 0
    best = json.loads((out / "summary.json").read_text())["best"]
    lines = {line["step"]: line["loss"] for line in lines_of(out)}
    after = {step: loss for step, loss in lines.items() if step > 5}
    assert best["loss"] == after[best["step"]] == min(after.values())
    assert [p.name for p in (out / "best").iterdir()] == [f"step-{best['step']:09d}"]


def test_a_start_anew_does_not_remove_the_only_checkpoint_there_is(tmp_path, invoke):
    out = run(tmp_path, "loss")
    cut_after(out, 0)
    status, err = invoke("run", "--resume", out)
    assert status == 2
    assert f"go on from it with --resume {out}/best" in err
    assert Checkpoint.open(out / "best")


def test_a_figure_that_is_not_finite_is_not_the_best():
    saved = []
    comm = Communicator(build("ring", 2), StackedTransport())
    best = Best("accuracy", Path("nowhere"), comm, lambda *facts: saved.append(facts))
    for step, value in enumerate([float("nan"), float("inf"), 0.25, 0.5, float("nan"), 0.5]):
        best.see({"step": step, "accuracy": value})
    assert [facts[2]["record"]["step"] for facts in saved] == [2, 3]


def test_processes_agree_on_the_best(tmp_path):
    one = run(tmp_path, "loss")
    expected = json.loads((one / "summary.json").read_text())["best"]["step"]
    two = run(tmp_path, "loss", "two", processes=2, transport="gloo")
    assert json.loads((two / "summary.json").read_text())["best"]["step"] == expected
    assert len(Checkpoint.open(two / "best").files) == 2


def test_an_unknown_figure_is_refused_with_those_there_are(invoke, tmp_path):
    (tmp_path / "run.yaml").write_text(json.dumps(RUN))
    status, err = invoke("run", "run.yaml", "--out", "out", "-s", "keep_best=acuracy")
    assert status == 2
    assert (
        "keep_best: this run's evaluations have no figure 'acuracy'; did you mean 'accuracy'" in err
    )
