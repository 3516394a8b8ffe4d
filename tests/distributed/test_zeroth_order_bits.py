"""Numbers in place of gradients: the same parameters and the same log on every transport."""

import json

import pytest
import yaml
from test_same_bits import gossamer, mpirun, run, torchrun

RUNS = {
    "shared": {"algorithm": {"name": "all-reduce"}},
    "own": {"algorithm": {"name": "all-reduce"}, "oracle": {"directions": "own", "queries": 2}},
    "flood": {"algorithm": {"name": "flood"}, "oracle": {"directions": "own"}},
    "numbers-averaged": {
        "algorithm": {"name": "coefficient-gossip", "tolerance": 0.3},
        "oracle": {"directions": "own"},
        "optimizer": {"name": "sgd", "lr": 0.05},
    },
}
SENT = {"shared": 4 * 3 * 8, "own": 4 * 3 * 2 * 8}  # a step of 4 ranks, in bytes


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """All runs in one file, so that processes start once per transport."""
    path = tmp_path_factory.mktemp("numbers") / "all.yaml"
    values = {
        "task": {"name": "digits", "model": "mlp", "hidden": [7], "heterogeneity": "sorted"},
        "oracle": {"name": "zeroth-order", "batch_size": 5},
        "optimizer": {"name": "adam", "lr": 0.01},
        "topology": {"name": "ring"},
        "ranks": 4,
        "steps": 5,
        "timeout_s": 60,
        "evaluate_examples": 5,
        "compare": RUNS,
    }
    path.write_text(yaml.safe_dump(values))
    return path


def outcome(folder):
    """Hash of the final rows, bytes sent and the records applied, per run."""
    found = {}
    for name in RUNS:
        summary = json.loads((folder / name / "summary.json").read_text())
        found[name] = summary["parameters_sha256"], summary["bytes_sent"]
        log = folder / name / "records.zo"
        assert log.exists() == (name != "numbers-averaged")
        if log.exists():
            content = log.read_bytes()
            found[name] += (content[8 + int.from_bytes(content[:8], "little") :],)
    return found


@pytest.fixture(scope="module")
def stacked(experiment, tmp_path_factory):
    """What one process that hosts all ranks computes."""
    out = tmp_path_factory.mktemp("stacked") / "out"
    run([*gossamer(1), str(experiment), "--out", str(out)], None)
    return outcome(out)


def test_all_reduce_sends_8_bytes_for_each_number_to_each_rank(stacked):
    for name, per_step in SENT.items():
        assert stacked[name][1] == 5 * per_step


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "processes", "transport"),
    [
        pytest.param(gossamer, 2, "native", marks=pytest.mark.long),
        pytest.param(torchrun, 2, "gloo", marks=pytest.mark.long),
        (mpirun, 4, "mpi"),
    ],
)
def test_every_transport_gives_the_stacked_bits_and_records(
    launcher, processes, transport, experiment, stacked, launch_environment, tmp_path
):
    command = [*launcher(processes), str(experiment), "--transport", transport]
    run([*command, "--out", str(tmp_path / "out")], launch_environment)
    assert outcome(tmp_path / "out") == stacked
    used = json.loads((tmp_path / "out" / "flood" / "summary.json").read_text())
    assert (used["transport"], used["processes"]) == (transport, processes)
