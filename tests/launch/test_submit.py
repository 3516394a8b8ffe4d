"""Batch jobs: the scripts, what refuses to become one, and a real SLURM where there is one."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import slurm_for_tests
import yaml

from gossamer.launch.start import start_run
from gossamer.launch.submit import Job, submit
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.transports.select import (
    detect_launcher,
    open_transport,
    process_index,
    world_size,
)

RUN = {
    "task": {"name": "least-squares", "features": 10},
    "algorithm": {"name": "d-nasa"},
    "topology": {"name": "ring"},
    "ranks": 4,
    "steps": 4,
    "threads": 2,
}
PROGRAMS = {"slurm": "sbatch", "pbs": "qsub", "lsf": "bsub"}


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ring.yaml").write_text(yaml.safe_dump(RUN))
    return Job(Path("ring.yaml"), "slurm", nodes=2, ranks_per_node=2)


def script_of(job, capsys):
    submit(job, dry_run=True)
    return capsys.readouterr().out


def directives(script, mark):
    return {line.removeprefix(mark) for line in script.splitlines() if line.startswith(mark)}


def test_slurm_script_asks_for_what_was_said(job, tmp_path, capsys):
    job = replace(
        job, time="01:30:00", queue="gpu", account="lab", gpus_per_node=2, settings=["seed=3"]
    )
    script = script_of(job, capsys)
    assert directives(script, "#SBATCH --") == {
        "job-name=ring",
        "nodes=2",
        "ntasks-per-node=2",
        "cpus-per-task=2",
        "gpus-per-node=2",
        "time=01:30:00",
        "partition=gpu",
        "account=lab",
        "signal=TERM@60",
        "open-mode=append",
        f'output="{tmp_path}/runs/ring-001/job-%j.log"',
        "requeue",
    }
    assert f"command=(gossamer run {tmp_path}/ring.yaml -s seed=3)\n" in script
    assert script.endswith('srun --kill-on-bad-exit=1 "${command[@]}"\n')


def test_pbs_script_asks_for_what_was_said(job, tmp_path, capsys):
    job = replace(job, scheduler="pbs", time="01:30:00", queue="gpu", account="lab", name="j")
    script = script_of(job, capsys)
    assert directives(script, "#PBS ") == {
        "-N j",
        "-l select=2:ncpus=4:mpiprocs=2",
        "-l place=scatter",
        "-l walltime=01:30:00",
        "-q gpu",
        "-A lab",
        "-r y",
        "-j oe",
        f"-o {tmp_path}/runs/j-001/job.log",
    }
    assert script.endswith('mpiexec -n 4 "${command[@]}"\n')


def test_lsf_script_asks_for_what_was_said(job, tmp_path, capsys):
    job = replace(job, scheduler="lsf", time="01:59:01", queue="gpu", account="lab")
    script = script_of(job, capsys)
    assert directives(script, "#BSUB ") == {
        "-J ring",
        "-n 4",
        '-R "span[ptile=2]"',
        '-R "affinity[core(2)]"',
        "-W 2:00",  # LSF counts minutes
        "-wa TERM",
        "-wt 1",
        "-q gpu",
        "-P lab",
        "-r",
        f'-o "{tmp_path}/runs/ring-001/job-%J.log"',
    }
    assert script.endswith('mpirun -n 4 "${command[@]}"\n')


@pytest.mark.parametrize(("scheduler", "asked"), [("slurm", False), ("pbs", True), ("lsf", True)])
def test_gpus_under_mpirun_mean_nccl(job, capsys, scheduler, asked):
    script = script_of(replace(job, scheduler=scheduler, gpus_per_node=2), capsys)
    assert ("--transport nccl" in script) == asked


def test_dry_run_writes_nothing(job, tmp_path, capsys):
    script_of(job, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["ring.yaml"]


@pytest.mark.parametrize("scheduler", PROGRAMS)
@pytest.mark.parametrize("folder", ["plain", "with space $HOME 'quoted'"])
def test_scripts_are_bash_whatever_the_folder_is_called(job, tmp_path, capsys, scheduler, folder):
    script = script_of(replace(job, scheduler=scheduler, out=tmp_path / folder), capsys)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def fake(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(("scheduler", "program"), PROGRAMS.items())
def test_the_script_is_handed_to_the_scheduler(
    job, tmp_path, capsys, monkeypatch, scheduler, program
):
    fake(tmp_path / "bin", program, 'cat "${1:-/dev/stdin}" > got; echo submitted as 7')
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    submit(replace(job, scheduler=scheduler))
    script = tmp_path / "runs" / "ring-001" / "job.sh"
    assert (tmp_path / "got").read_text() == script.read_text()
    assert os.access(script, os.X_OK)
    assert "submitted as 7" in capsys.readouterr().out


def test_what_the_scheduler_refuses_is_reported(job, tmp_path, monkeypatch):
    fake(tmp_path / "bin", "sbatch", "echo 'invalid partition' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    with pytest.raises(ConfigError, match=r"sbatch refused .*job\.sh: invalid partition"):
        submit(job)


def test_a_script_started_again_goes_on_from_the_checkpoint(job, tmp_path, capsys):
    """A first start writes a folder, one without a checkpoint starts over, one with it resumes."""
    fake(tmp_path / "bin", "srun", 'echo "$@"')
    script = script_of(replace(job, out=tmp_path / "job 1"), capsys)
    run = tmp_path / "job 1" / "ring"

    def start():
        environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
        return subprocess.run(
            ["bash"], input=script, env=environment, capture_output=True, text=True, check=True
        ).stdout

    assert start().endswith(f"ring.yaml --out {run}\n")
    run.mkdir(parents=True)
    (run / "metrics.jsonl").touch()
    assert start().endswith(f"ring.yaml --out {run}\n")
    assert not run.exists()
    (run / "checkpoints" / "step-000000010").mkdir(parents=True)
    (run / "checkpoints" / "step-000000010" / "checkpoint.json").touch()
    assert start().endswith(f"ring.yaml --resume {run}\n")


def test_a_comparison_is_not_started_again_by_the_scheduler(job, tmp_path, capsys):
    several = {**RUN, "compare": {"a": {}, "b": {"seed": 1}}}
    (tmp_path / "ring.yaml").write_text(yaml.safe_dump(several))
    script = script_of(job, capsys)
    assert "no-requeue" in directives(script, "#SBATCH --")
    assert "--resume" not in script
    assert "-rn" in directives(script_of(replace(job, scheduler="lsf"), capsys), "#BSUB ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheduler": "slrm"}, "--scheduler: no 'slrm'; did you mean 'slurm'"),
        ({"nodes": 0}, "--nodes: must be at least 1, got 0"),
        ({"time": "90"}, "--time: write HH:MM:SS, .*got '90'"),
        ({"name": "two words"}, "--name: .*got 'two words'"),
        ({"queue": "a\n#SBATCH --exclusive"}, "--queue: "),
        ({"gpus_per_node": 1}, "--gpus-per-node: 2 processes .*use --ranks-per-node 1"),
        ({"nodes": 3}, "ranks: 4 ranks cannot fill 6 processes"),
        ({"settings": ["steps=0"]}, "steps: must be greater"),
        ({"settings": ["algorithm.cc=1"]}, "algorithm.cc: unknown field"),
        ({"settings": ["transport=stacked"]}, "transport: stacked is one process"),
        ({"settings": ["compare={a: {steps: 0}}"]}, "compare.a: steps"),
        ({"file": Path("none.yaml")}, "file: cannot read none.yaml"),
        ({"out": Path()}, "--out: . is in use"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(job, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        submit(replace(job, **changes))
    assert [path.name for path in tmp_path.iterdir()] == ["ring.yaml"]


def test_a_missing_scheduler_is_named(job, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"slurm needs 'sbatch', .*--dry-run"):
        submit(job)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.skipif(bool(slurm_for_tests.why_not()), reason=slurm_for_tests.why_not())
def test_a_real_slurm_runs_the_job_to_the_bits_of_one_process(job, tmp_path, launch_environment):
    assert start_run(job.file, [], {"transport": "stacked"}, tmp_path / "here", None) == 0
    with slurm_for_tests.slurm(tmp_path / "slurm") as environment:
        command = [sys.executable, "-m", "gossamer", "submit", "ring.yaml", "--scheduler", "slurm"]
        options = ["--nodes", "1", "--ranks-per-node", "4", "-s", "threads=1", "--out", "job"]
        done = subprocess.run(
            [*command, *options],
            env={**launch_environment, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        number = re.search(r"Submitted batch job (\d+)", done.stdout)[1]
        state = slurm_for_tests.wait_for_job(number, environment)
        logs = "\n".join(path.read_text() for path in (tmp_path / "job").glob("*.log"))
        assert state == "COMPLETED", logs
    here, there = (
        json.loads((folder / "summary.json").read_text())
        for folder in (tmp_path / "here", tmp_path / "job" / "ring")
    )
    assert (there["transport"], there["processes"]) == ("native", 4)
    assert there["parameters_sha256"] == here["parameters_sha256"]


# --- whose process is this ----------------------------------------------------------------------

BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}
STEP = BATCH | {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"}


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, ("none", 0, 1)),
        (BATCH, ("none", 0, 1)),
        (STEP, ("slurm", 2, 4)),
        (STEP | {"PMI_SIZE": "4", "PMI_RANK": "2"}, ("slurm", 2, 4)),
        (STEP | {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, ("mpi", 1, 2)),
        (STEP | {"WORLD_SIZE": "8", "RANK": "5"}, ("torchrun", 5, 8)),
        (BATCH | {"PMI_SIZE": "3", "PMI_RANK": "2"}, ("mpi", 2, 3)),
    ],
)
def test_the_launcher_and_the_place_follow_from_the_variables(variables, place):
    found = detect_launcher(variables), process_index(variables), world_size(variables)
    assert found == place


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "SLURM_JOB_NODELIST is not set"),
        ({"SLURM_JOB_NODELIST": "a[1-2]"}, "scontrol"),
        ({"MASTER_ADDR": "here"}, "SLURM_JOB_ID is not set"),
    ],
)
def test_a_step_without_a_meeting_place_asks_for_one(monkeypatch, tmp_path, variables, words):
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "OMPI_", "PMI", "MASTER_")) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(tmp_path))  # no scontrol
    for name, value in STEP.items():
        if name != "SLURM_JOB_ID":
            monkeypatch.setenv(name, value)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"{words}.*MASTER_ADDR .* MASTER_PORT"):
        open_transport("gloo", timeout_s=1)
