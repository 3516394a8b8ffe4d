"""gossamer export: a run's mean model, for programs that know nothing of us."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_resume import go

from gossamer.launch.export import export_model
from gossamer.runtime import ConfigError

SLTRAIN = {"name": "sltrain", "rank": 2, "density": 0.1}
RELORA = {"name": "relora", "rank": 2, "every": 2}


def run(folder, task, **sections):
    values = {
        "task": task,
        "oracle": {"name": "backprop", "batch_size": 2},
        "optimizer": {"name": "adam", "lr": 0.01},
        "algorithm": {"name": "all-reduce"},
        "ranks": 2,
        "steps": 5,
        "evaluate_examples": 8,
        "log_every": 1,
        "evaluate_every": 5,
        "checkpoint_every": 4,
        **sections,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    assert go(folder, folder / "run", file=folder / "run.yaml") == 0
    return folder / "run", json.loads((folder / "run" / "summary.json").read_text())


def text_task(folder, scheme):
    (folder / "text.txt").write_text("".join(f"{k} is {k}. " for k in range(300)))
    model = {"hidden": 16, "layers": 1, "heads": 2, "ffn": 24}
    data = {"data": str(folder / "text.txt"), "context": 16}
    return {"name": "pretraining", "model": model, "scheme": scheme, **data}


@pytest.mark.parametrize("scheme", [SLTRAIN, RELORA, {"name": "full"}], ids=lambda s: s["name"])
def test_transformers_loads_it_and_finds_the_runs_loss(tmp_path, scheme):
    transformers = pytest.importorskip("transformers")
    task = text_task(tmp_path, scheme)
    algorithm = "dsgd" if scheme is SLTRAIN else "all-reduce"
    out, summary = run(tmp_path, task, algorithm={"name": algorithm})
    told = export_model(out, tmp_path / "plain")
    assert "LlamaForCausalLM" in told
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    from gossamer.algorithms.tasks.pretraining import Pretraining

    problem = Pretraining(**task | {"scheme": "full"}).build(2, 0)
    count = len(problem.test)
    places = torch.arange(8) * count // 8 if count > 8 else torch.arange(count)
    (tokens,) = problem.test[places]
    with torch.no_grad():
        logits = model(input_ids=tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(summary["test_loss"], rel=1e-4)


def test_other_models_are_one_file_of_safetensors(tmp_path):
    task = {"name": "wine", "model": "mlp", "hidden": [4]}
    out, _ = run(tmp_path, task)
    export_model(out, tmp_path / "plain")
    found = load_file(tmp_path / "plain" / "model.safetensors")
    assert {tuple(t.shape) for t in found.values()} == {(4, 13), (4,), (3, 4), (3,)}


def test_a_folder_with_files_is_left_alone(tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is there already; name a new folder"):
        export_model(tmp_path, tmp_path / "plain")


def test_merged_weights_do_not_resume_on_other_ranks(tmp_path, capfd):
    pytest.importorskip("transformers")
    out, _ = run(tmp_path, text_task(tmp_path, RELORA))
    assert go(tmp_path, tmp_path / "more", resume=out, settings=["ranks=4", "steps=8"]) == 2
    assert "resume with ranks: 2" in capfd.readouterr().err
    assert go(tmp_path, tmp_path / "more", resume=out, settings=["steps=8"]) == 0


def test_a_run_with_merges_resumes_to_the_bit(tmp_path):
    pytest.importorskip("transformers")
    task = text_task(tmp_path, RELORA)
    for name, steps in (("whole", 8), ("part", 4)):
        (tmp_path / name).mkdir()
        run(tmp_path / name, task, steps=steps)
    out = tmp_path / "part"
    assert go(out, out / "more", resume=out / "run", settings=["steps=8"]) == 0
    whole, more = (
        json.loads((folder / "summary.json").read_text())
        for folder in (tmp_path / "whole" / "run", out / "more")
    )
    assert more["parameters_sha256"] == whole["parameters_sha256"]
    assert more["test_loss"] == whole["test_loss"]
