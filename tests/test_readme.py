"""The README says what the code does today: its programs run, its table is the code's."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gossamer.launch.algorithm_table import algorithm_table, markdown

README = (Path(__file__).parents[1] / "README.md").read_text()


def block(language: str, name: str) -> str:
    """The fenced block whose first line is a comment with this file's name."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    (found,) = [b for b in blocks if b.startswith(f"# {name}")]
    return found


def test_the_algorithm_table_is_the_codes_own():
    table = re.search(r"<!-- algorithms -->\n(.*)\n<!-- /algorithms -->", README, flags=re.DOTALL)
    assert table, "the table is gone"
    assert table.group(1) == markdown(algorithm_table()), "paste what 'gossamer algorithms' prints"


def test_the_algorithm_of_the_readme_runs_on_its_yaml(tmp_path):
    (tmp_path / "ring.yaml").write_text(block("yaml", "ring.yaml"))
    (tmp_path / "mine.py").write_text(block("python", "mine.py"))
    command = [sys.executable, "-m", "gossamer", "run", "ring.yaml", "-s", "steps=60"]
    own = ["-s", 'algorithm={name: "mine:AveragedGossip", lr: 0.3}', "--out", "out"]
    done = subprocess.run([*command, *own], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["accuracy"] > 0.5  # chance is 0.1


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_the_training_loop_of_the_readme_runs(launcher, tmp_path, launch_environment):
    (tmp_path / "train.py").write_text(block("python", "train.py"))
    if launcher == "mpirun":
        mpirun = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or "mpirun"
        command = [mpirun, "-n", "4", sys.executable, "train.py"]
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "train.py"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=200, env=launch_environment
    )
    assert done.returncode == 0, done.stderr
    printed = re.findall(r"rank (\d): loss ([\d.]+), consensus ([\d.e+-]+)", done.stdout)
    assert sorted(rank for rank, _, _ in printed) == ["0", "1", "2", "3"]
    assert len({consensus for _, _, consensus in printed}) == 1
    assert all(float(loss) < 4 for _, loss, _ in printed)  # about 4 without training


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["gossip"]])
def test_the_ddp_script_of_the_readme_runs(arguments, tmp_path, launch_environment):
    (tmp_path / "ddp.py").write_text(block("python", "ddp.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "ddp.py", *arguments]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=200, env=launch_environment
    )
    assert done.returncode == 0, done.stderr
    losses = dict(re.findall(r"rank (\d): loss ([\d.]+)", done.stdout))
    assert sorted(losses) == ["0", "1", "2", "3"]
    assert all(float(loss) < 1 for loss in losses.values())  # about 3 without training
