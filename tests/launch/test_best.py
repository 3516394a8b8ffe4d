"""keep_best: the checkpoint at the best evaluation stays, and the summary says when it was."""

import json
import shutil

import pytest
from test_resume import go

from gossamer.runtime.checkpoint import Checkpoint

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
    assert summary["best"] == best
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


def test_a_resumed_run_remembers_the_best_and_one_that_starts_anew_forgets_it(tmp_path):
    out = run(tmp_path, "loss")
    expected = json.loads((out / "summary.json").read_text())["best"]
    for path in (out / "checkpoints").iterdir():
        if Checkpoint.open(path).meta["step"] > 25:
            shutil.rmtree(path)
    assert go(tmp_path, resume=out) == 0
    assert json.loads((out / "summary.json").read_text())["best"] == expected
    shutil.rmtree(out / "checkpoints")
    (out / "summary.json").unlink()  # as a kill before the first checkpoint leaves it
    record = out / "best" / f"step-{expected['step']:09d}" / "checkpoint.json"
    record.write_text(record.read_text().replace('"loss": 0', '"loss": -7'))
    assert go(tmp_path, resume=out) == 0
    again = json.loads((out / "summary.json").read_text())["best"]
    assert (again["step"], again["loss"]) == (expected["step"], expected["loss"])


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
    assert "keep_best: this run has no figure 'acuracy'; did you mean 'accuracy'" in err
