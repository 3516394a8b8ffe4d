"""Weights B A + S over real processes: the bits of one process, merges and all."""

import json
import os

import pytest
import yaml
from test_same_bits import gossamer, mpirun, run, torchrun

pytest.importorskip("transformers", reason="needs the extra: gossamer[huggingface]")

SLTRAIN = {"name": "sltrain", "rank": 2, "alpha": 4, "density": 0.1}
RELORA = {"name": "relora", "rank": 2, "every": 2}
ADAM = {"name": "adam", "lr": 0.01}
RUNS = {
    "all-reduce": {"scheme": SLTRAIN, "optimizer": ADAM, "algorithm": {"name": "all-reduce"}},
    "per-layer": {
        "scheme": {"name": "sltrain", "rank": 2, "density": 0.1, "train_scale": True},
        "optimizer": {"name": "adam8bit", "lr": 0.01},
        "algorithm": {"name": "all-reduce", "per_layer": True},
    },
    "merges": {"scheme": RELORA, "optimizer": ADAM, "algorithm": {"name": "all-reduce"}},
    "gossip": {"scheme": SLTRAIN, "algorithm": {"name": "d-nasa"}},
    "frozen": {
        "scheme": {**SLTRAIN, "freeze_a": True},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "algorithm": {"name": "dsgd"},
    },
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sltrain")
    (folder / "text.txt").write_text(
        "".join(f"{k} and {k + 1} are {2 * k + 1}. " for k in range(99))
    )
    task = {
        "name": "pretraining",
        "data": str(folder / "text.txt"),
        "context": 16,
        "model": {"hidden": 16, "layers": 1, "heads": 2, "ffn": 24},
    }
    values = {
        "oracle": {"name": "backprop", "batch_size": 2},
        "ranks": 4,
        "steps": 5,
        "timeout_s": 60,
        "evaluate_examples": 8,
        "compare": {
            name: {"task": {**task, "scheme": own["scheme"]}}
            | {key: value for key, value in own.items() if key != "scheme"}
            for name, own in RUNS.items()
        },
    }
    (folder / "runs.yaml").write_text(yaml.safe_dump(values))
    return folder / "runs.yaml"


def outcome(command, path, out, environment):
    run([*command, str(path), "--out", str(out)], environment)
    found = {p.parent.name: json.loads(p.read_text()) for p in out.glob("*/summary.json")}
    assert set(found) == set(RUNS)
    keys = ("parameters_sha256", "fixed_sha256")
    return {name: [s.get(key) for key in keys] for name, s in found.items()}, found


@pytest.fixture(scope="module")
def alone(path, tmp_path_factory):
    return outcome(gossamer(1), path, tmp_path_factory.mktemp("alone") / "out", dict(os.environ))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "processes", "transport"),
    [(torchrun, 2, "native"), (mpirun, 4, "mpi")],
)
def test_every_transport_gives_the_bits_of_one_process(
    launcher, processes, transport, path, alone, launch_environment, tmp_path
):
    command = [*launcher(processes), "--transport", transport]
    found, summaries = outcome(command, path, tmp_path / "out", launch_environment)
    assert found == alone[0]
    assert all(s["processes"] == processes for s in summaries.values())


def test_runs_of_supports_say_which_and_gossip_says_its_gap(alone):
    found, summaries = alone
    assert found["all-reduce"][1] == found["gossip"][1] is not None
    assert summaries["gossip"]["product_gap"] > 0
    assert "product_gap" not in summaries["all-reduce"]
    assert "product_gap" not in summaries["frozen"]
