"""Same seed, same bits: every synchronous algorithm, every transport, every split of 8 ranks."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gossamer.algorithms.registry import REGISTRY, find

RANKS, STEPS = 8, 4
OWN_DIRECTIONS = {"name": "zeroth-order", "directions": "own", "batch_size": 5}


def every_algorithm() -> dict[str, dict]:
    """One run per registered algorithm, on a graph that its condition on W admits."""
    runs = {}
    for name in REGISTRY["algorithm"]:
        fields = find("algorithm", name).model_fields
        section = {"name": name}
        if "local_steps" in fields:
            section["local_steps"] = 2
        runs[name] = {"algorithm": section}
        if "row" not in find("algorithm", name).takes:
            runs[name]["oracle"] = OWN_DIRECTIONS
        if fields["optimizer"].is_required():
            runs[name]["optimizer"] = {"name": "sgd", "lr": 0.1}
        if name in ("sgp", "push-diging"):
            runs[name]["topology"] = {"name": "directed_ring"}
    schedule = {"algorithm": {"name": "d-nasa"}, "topology": {"name": "one_peer_exponential"}}
    return {**runs, "d-nasa-on-a-schedule": schedule, **private_runs(), **adam_runs()}


def adam_runs() -> dict[str, dict]:
    """Moments of low rank, whose basis rank 0 sends or each rank has its own, and of 8 bits."""
    galore = {"name": "galore", "lr": 0.01, "rank": 5, "refresh": 2, "targets": ["weight"]}
    adam8bit = {"name": "adam8bit", "lr": 0.01}
    task = {"hidden": [64, 12]}
    return {
        f"{optimizer['name']}-{algorithm}": {
            "task": task,
            "optimizer": optimizer,
            "algorithm": {"name": algorithm},
        }
        for optimizer in (galore, adam8bit)
        for algorithm in ("all-reduce", "dsgd")
    }


def private_runs() -> dict[str, dict]:
    """Noise of the mean behind a filter, of every rank's own, correlated, shared by neighbors."""
    dp = {"name": "dp", "noise_multiplier": 1.0, "noise_seed": 3, "accountant": "rdp"}
    backprop = {"name": "backprop", "batch_size": 5}
    pairwise = {"noise_mode": "pairwise", "pairwise_multiplier": 20.0}
    root = {"name": "sqrt-toeplitz", "bands": 3}
    return {
        "private-all-reduce": {
            "oracle": [backprop, dp, {"name": "doppler"}],
            "algorithm": {"name": "all-reduce"},
            "optimizer": {"name": "adam-bc", "lr": 0.01},
        },
        "private-dsgd": {
            "oracle": [backprop, dp, {"name": "disk"}],
            "algorithm": {"name": "dsgd"},
            "optimizer": {"name": "sgd", "lr": 0.1},
        },
        "private-correlated": {
            "oracle": [backprop, dp | {"correlation": {"name": "banded", "bands": 3}}],
            "algorithm": {"name": "all-reduce"},
            "optimizer": {"name": "adam-bc", "lr": 0.01},
        },
        "private-pairwise": {
            "oracle": [backprop, dp | pairwise],
            "algorithm": {"name": "d-nasa"},
        },
        "private-pairwise-correlated": {
            "oracle": [backprop, dp | pairwise | {"correlation": root}],
            "algorithm": {"name": "gradient-tracking"},
            "optimizer": {"name": "sgd", "lr": 0.1},
            "topology": {"name": "star"},
        },
    }


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Path:
    """All algorithms in one file, so that processes start once per transport."""
    path = tmp_path_factory.mktemp("bits") / "all.yaml"
    values = {
        "task": {"name": "digits", "model": "mlp", "hidden": [7], "heterogeneity": "sorted"},
        "oracle": {"name": "backprop", "batch_size": 5},
        "topology": {"name": "ring"},
        "ranks": RANKS,
        "steps": STEPS,
        "timeout_s": 60,
        "evaluate_examples": 20,
        "compare": every_algorithm(),
    }
    path.write_text(yaml.safe_dump(values))
    return path


def digests(folder: Path) -> dict[str, tuple[str, int]]:
    """Hash of the final rows and bytes sent, per run."""
    found = {}
    for path in sorted(folder.glob("*/summary.json")):
        summary = json.loads(path.read_text())
        found[path.parent.name] = (summary["parameters_sha256"], summary["bytes_sent"])
    return found


def run(command: list[str], environment: dict[str, str]) -> None:
    """Run to the end; on failure show both streams."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def stacked(experiment) -> dict[str, tuple[str, int]]:
    """What one process that hosts all ranks computes."""
    out = experiment.parent / "stacked"
    run([sys.executable, "-m", "gossamer", "run", str(experiment), "--out", str(out)], None)
    found = digests(out)
    assert set(found) == set(every_algorithm())
    return found


def torchrun(processes: int) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return [*command, "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "-m", "gossamer", "run"]


def mpirun(processes: int) -> list[str]:
    program = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or "mpirun"
    return [program, "-n", str(processes), sys.executable, "-m", "gossamer", "run"]


def gossamer(processes: int) -> list[str]:
    return [sys.executable, "-m", "gossamer", "run", "--processes", str(processes)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "processes", "asked", "transport"),
    [
        pytest.param(torchrun, 1, "native", "native", marks=pytest.mark.long),
        (torchrun, 2, "auto", "native"),
        (gossamer, 4, "auto", "native"),
        (mpirun, 8, "auto", "native"),
        (gossamer, 3, "gloo", "gloo"),
        (mpirun, 3, "mpi", "mpi"),
    ],
)
def test_every_transport_gives_the_stacked_bits(
    launcher, processes, asked, transport, experiment, stacked, launch_environment, tmp_path
):
    command = [*launcher(processes), str(experiment), "--transport", asked]
    run([*command, "--out", str(tmp_path / "out")], launch_environment)
    assert digests(tmp_path / "out") == stacked
    used = json.loads((tmp_path / "out" / "dsgd" / "summary.json").read_text())
    assert (used["transport"], used["processes"]) == (transport, processes)


def test_another_seed_gives_other_bits(experiment, stacked, launch_environment, tmp_path):
    command = [sys.executable, "-m", "gossamer", "run", str(experiment), "-s", "seed=1"]
    command += ["-s", "compare={dsgd: {algorithm: {name: dsgd}, optimizer: {name: sgd, lr: 0.1}}}"]
    run([*command, "--out", str(tmp_path / "out")], launch_environment)
    assert digests(tmp_path / "out")["dsgd"] != stacked["dsgd"]


@pytest.mark.slow
def test_mpich_gives_the_stacked_bits(experiment, stacked, launch_environment, tmp_path):
    prefix = tmp_path / "mpich"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--prefix", str(prefix), "mpich"]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("no package index to install MPICH from")
    environment = {k: v for k, v in launch_environment.items() if not k.startswith("OMPI")}
    environment |= {"MPI4PY_MPIABI": "mpich", "LD_LIBRARY_PATH": str(prefix / "lib")}
    command = [str(prefix / "bin" / "mpiexec"), "-n", "2", sys.executable, "-m", "gossamer", "run"]
    command += ["--transport", "mpi"]
    run([*command, str(experiment), "--out", str(tmp_path / "out")], environment)
    assert digests(tmp_path / "out") == stacked
