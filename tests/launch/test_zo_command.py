"""gossamer zo: a run is written as its numbers, checked, and made again to the bit."""

import hashlib
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gossamer.launch.cli import main
from gossamer.launch.record_log import NAME, pack, sealed, unpack
from gossamer.launch.start import start_run
from gossamer.launch.status import exit_status

RUN = {
    "task": {"name": "wine", "model": "mlp", "hidden": [4]},
    "oracle": {"name": "zeroth-order", "batch_size": 8, "directions": "own", "queries": 2},
    "optimizer": {"name": "adam", "lr": 0.01, "schedule": "cosine"},
    "algorithm": {"name": "flood"},
    "ranks": 5,
    "steps": 9,
    "evaluate_examples": 8,
}
DELAY = 1  # of flood on a ring of 5
CASES = {
    "flood, adam": {},
    "all-reduce, sgd": {
        "algorithm": {"name": "all-reduce"},
        "oracle": {"name": "zeroth-order", "batch_size": 8, "distribution": "sphere"},
        "optimizer": {"name": "sgd", "lr": 0.05, "schedule": "sqrt_n_over_t", "warmup": 2},
    },
    "all-reduce, decay and a mask": {
        "algorithm": {"name": "all-reduce"},
        "oracle": RUN["oracle"] | {"sparsity": 0.5, "mask_interval": 2},
        "optimizer": {"name": "momentum", "lr": 0.05, "weight_decay": 0.1},
    },
}


def start(folder, changes=None, resume=None, settings=()):
    """Run, or resume, in this process; return the exit status."""
    options = {"ranks": None, "transport": None, "processes": None}
    file = None
    if resume is None:
        file = folder.parent / f"{folder.name}.yaml"
        file.write_text(json.dumps(RUN | (changes or {})))
    out = folder if resume is None else None
    return exit_status(lambda: start_run(file, list(settings), options, out, resume))


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def flooded(tmp_path_factory):
    """The folder of a run by flood, with checkpoints."""
    folder = tmp_path_factory.mktemp("flooded") / "out"
    assert start(folder, {"checkpoint_every": 2, "keep_checkpoints": 9}) == 0
    return folder


@pytest.fixture
def zo(monkeypatch, capsys):
    """Run `gossamer zo ARGV`; return its status and all that it wrote."""

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["gossamer", "zo", *map(str, argv)])
        with pytest.raises(SystemExit) as done:
            main()
        written = capsys.readouterr()
        return done.value.code, written.out + written.err

    return call


@pytest.fixture
def exported(flooded, tmp_path, zo):
    """A fresh export of that run, and a function that changes header and records inside it."""
    file = tmp_path / "run.zo"
    assert zo("export", flooded, file)[0] == 0

    def change(how):
        header, records = unpack(file.read_bytes()[:-32], file)
        records = records.copy()
        records = how(header, records)
        file.write_bytes(sealed(pack(header, records)))
        return file

    return file, change


# --- replay -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_replay_makes_the_parameters_of_the_run_to_the_bit(case, tmp_path, zo):
    run = tmp_path / "out"
    assert start(run, CASES[case]) == 0
    assert zo("export", run, tmp_path / "run.zo")[0] == 0
    status, told = zo("replay", tmp_path / "run.zo", "--out", tmp_path / "model")
    assert status == 0
    assert f"parameters_sha256 {summary(run)['parameters_sha256']}\n" in told
    model = load_file(tmp_path / "model" / "model.safetensors")
    assert (tmp_path / "model" / "config.yaml").read_text() == (run / "config.yaml").read_text()
    written = load_file(run / "checkpoints" / "step-000000009" / "mean.safetensors")
    assert model.keys() == written.keys()
    for name in model:  # the mean of equal rows, to rounding
        torch.testing.assert_close(model[name], written[name], rtol=1e-6, atol=1e-7)


def test_the_log_holds_16_bytes_for_each_number_that_was_applied(flooded):
    header, records = unpack((flooded / NAME).read_bytes(), flooded)
    assert records["step"].tolist() == [s for s in range(9 - DELAY) for _ in range(10)]
    assert records["probe"].tolist() == list(range(10)) * (9 - DELAY)
    size = (flooded / NAME).stat().st_size
    assert size == len(pack(header, records[:0])) + 16 * 10 * (9 - DELAY)
    assert header["recipe"]["distribution"] == "normal"
    assert header["tensors"][0] == ["1.weight", [4, 13]]


@pytest.mark.parametrize("kept", [2, 6])
def test_a_run_that_was_killed_and_resumed_replays_as_an_undisturbed_one(kept, flooded, tmp_path):
    run = tmp_path / "out"
    shutil.copytree(flooded, run)
    (run / "summary.json").unlink()
    for step in range(kept + 1, 10):
        shutil.rmtree(run / "checkpoints" / f"step-{step:09d}", ignore_errors=True)
    content = (run / NAME).read_bytes()
    (run / NAME).write_bytes(content[:-7])  # the kill came in the middle of a record
    assert start(run, resume=run) == 0
    assert summary(run)["parameters_sha256"] == summary(flooded)["parameters_sha256"]
    assert (run / NAME).read_bytes() == content


def test_a_run_that_goes_on_otherwise_has_no_log_and_says_so(flooded, tmp_path, capsys):
    run = tmp_path / "out"
    shutil.copytree(flooded, run)
    assert start(run, resume=run, settings=["steps=11", "optimizer.lr=0.02"]) == 0
    told = capsys.readouterr().err
    assert f"{NAME} is not written: the run goes on with another optimizer, steps" in told
    assert not (run / NAME).exists()
    assert (run / f"{NAME}.until-9").exists()


def test_flood_goes_on_over_its_own_graph_alone(flooded, tmp_path, capsys):
    run = tmp_path / "out"
    shutil.copytree(flooded, run)
    assert start(run, resume=run, settings=["steps=11", "topology={name: star}"]) == 2
    assert "flood needs the same graph from its first step on" in capsys.readouterr().err


def test_another_number_of_ranks_goes_on_from_the_mean_without_a_log(
    flooded, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert start(tmp_path / "out", resume=flooded, settings=["steps=12", "ranks=4"]) == 0
    assert "the run goes on with another ranks" in capsys.readouterr().err
    run = tmp_path / "runs" / "resumed-001"
    assert summary(run)["steps"] == 12
    assert not (run / NAME).exists()


def test_a_constant_rate_allows_more_steps(tmp_path, zo):
    run = tmp_path / "out"
    assert start(run, {"optimizer": {"name": "sgd", "lr": 0.05}, "steps": 4}) == 0
    assert start(run, resume=run, settings=["steps=6"]) == 0
    assert zo("export", run, tmp_path / "run.zo")[0] == 0
    assert zo("replay", tmp_path / "run.zo")[0] == 0


def test_another_number_gives_other_parameters_and_status_1(exported, zo):
    def nudge(header, records):
        records["coefficient"][3] *= 1 + 1e-3
        return records

    status, told = zo("replay", exported[1](nudge))
    assert status == 1
    assert "not the run's" in told


def test_another_base_model_is_refused(exported, zo):
    def reseed(header, records):
        header["configuration"]["seed"] = 1
        return records

    status, told = zo("replay", exported[1](reseed))
    assert status == 2
    assert "builds another model here than the run began with" in told


# --- verify -----------------------------------------------------------------------------------


def test_a_whole_file_is_told_about(exported, flooded, zo):
    status, told = zo("verify", exported[0])
    assert status == 0
    assert "80 records of 8 steps (9 run, on 5 ranks), 1280 bytes" in told
    assert summary(flooded)["parameters_sha256"][:12] in told


@pytest.mark.parametrize("place", [0, 9, 300, -1500, -40, -1])
def test_a_changed_byte_is_found(place, exported, zo):
    content = bytearray(exported[0].read_bytes())
    content[place] ^= 1
    exported[0].write_bytes(content)
    status, told = zo("verify", exported[0])
    assert status == 2
    assert "SHA-256 is not the one" in told


@pytest.mark.parametrize("size", [0, 5, 32, 100])
def test_a_cut_file_is_found(size, exported, zo):
    exported[0].write_bytes(exported[0].read_bytes()[:size])
    assert zo("verify", exported[0])[0] == 2


@pytest.mark.parametrize("size", [0, 3, 8, 40])
def test_a_file_without_a_header_is_refused_however_it_is_sealed(size, tmp_path, zo):
    file = tmp_path / "run.zo"
    file.write_bytes(sealed((1 << 40).to_bytes(8, "little")[:size].ljust(size, b"{")))
    status, told = zo("verify", file)
    assert status == 2
    assert "Traceback" not in told


def without(name):
    def how(header, records):
        del header[name]
        return records

    return how


def infinite(header, records):
    records["coefficient"][7] = np.inf
    return records


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (lambda h, r: np.concatenate([r[10:20], r[:10], r[20:]]), "step 0 stand after step 1"),
        (lambda h, r: np.delete(r, 4), "step 0 has probes 0, 1, 2, 3, 5"),
        (lambda h, r: np.concatenate([r, r[-10:]]), "has probes"),
        (infinite, "step 0 has a coefficient that is not finite"),
        (without("optimizer"), "lacks 'optimizer'"),
        (without("recipe"), "lacks 'recipe'"),
        (lambda h, r: h["recipe"].pop("seed") and r, "lacks 'seed'"),
    ],
)
def test_records_out_of_order_or_incomplete_are_found(how, words, exported, zo):
    status, told = zo("verify", exported[1](how))
    assert status == 2
    assert words in told


# --- export -----------------------------------------------------------------------------------


def test_the_hashes_of_an_export_are_those_of_its_bytes_and_of_the_run(exported, flooded):
    content = exported[0].read_bytes()
    assert content[-32:] == hashlib.sha256(content[:-32]).digest()
    header, _ = unpack(content[:-32], exported[0])
    assert header["outcome"]["parameters_sha256"] == summary(flooded)["parameters_sha256"]


def test_a_run_without_numbers_has_no_log_to_export(tmp_path, zo):
    run = tmp_path / "out"
    assert start(run, {"algorithm": {"name": "dsgd"}, "steps": 2}) == 0
    assert not (run / NAME).exists()
    status, told = zo("export", run, tmp_path / "run.zo")
    assert status == 2
    assert "all-reduce or flood write one" in told


def test_a_run_that_has_not_ended_is_not_exported(flooded, tmp_path, zo):
    run = tmp_path / "out"
    shutil.copytree(flooded, run)
    (run / "summary.json").unlink()
    status, told = zo("export", run, tmp_path / "run.zo")
    assert status == 2
    assert "has not ended" in told
