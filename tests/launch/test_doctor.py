"""What ``gossamer doctor`` says of a machine that has all, and of one that lacks something."""

import json
import subprocess

import pytest
from typer.testing import CliRunner

from gossamer.launch import doctor
from gossamer.launch.cli import app
from gossamer.launch.doctor import Finding, examine, is_usable

GOOD = ("abc", "")


@pytest.fixture
def pretend(monkeypatch):
    """Replace the runs by their outcomes: transport -> (hash, problem)."""

    def with_outcomes(**outcomes):
        monkeypatch.setattr(
            doctor, "_train", lambda folder, transport, processes: outcomes.get(transport, GOOD)
        )

    with_outcomes()
    return with_outcomes


def found(name):
    return next(finding for finding in examine() if finding.name == name)


def test_every_problem_has_a_fix(pretend, monkeypatch):
    pretend(
        stacked=("", "broken"),
        native=("", "no memfd"),
        gloo=("", "no route"),
        mpi=("", "no mpirun"),
    )
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("GOSSAMER_DATA", raising=False)
    findings = list(examine())
    assert {f.name for f in findings if not f.ok} >= {
        "transport stacked",
        "transport native",
        "transport gloo",
        "transport mpi",
        "data folder",
    }
    assert [f.name for f in findings if not f.ok and not f.fix] == []
    assert [f.name for f in findings if f.ok and f.fix] == []
    assert not is_usable(findings)


def test_only_one_process_is_required(pretend):
    pretend(native=("", "no memfd"), gloo=("", "no route"), mpi=("", "no mpirun"))
    assert is_usable(list(examine()))


def test_other_bits_are_a_problem(pretend):
    pretend(gloo=("abd", ""))
    assert found("transport gloo") == Finding(
        "transport gloo", False, "the bits differ from stacked", "report this"
    )


@pytest.mark.parametrize(("path", "ok"), [("", True), ("missing", False)])
def test_data_folder_is_looked_at(pretend, monkeypatch, tmp_path, path, ok):
    monkeypatch.setenv("GOSSAMER_DATA", str(tmp_path / path))
    assert found("data folder").ok == ok


def test_a_program_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(doctor, "_TIMEOUT_S", 0.2)
    done = doctor._call(["sleep", "60"])
    assert (done.returncode, done.stderr) == (1, "no answer within 0.2 s")


def test_the_reason_of_a_failed_run_is_its_last_line(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 2, "", "Traceback\n\ngossamer: error: no gloo\n\n")
    monkeypatch.setattr(doctor, "_call", lambda command: failed)
    assert doctor._train(tmp_path, "gloo", 2) == ("", "gossamer: error: no gloo")


@pytest.mark.parametrize(("outcome", "status"), [(GOOD, 0), (("", "broken"), 1)])
def test_status_says_whether_runs_work(pretend, outcome, status):
    pretend(stacked=outcome)
    result = CliRunner().invoke(app, ["doctor", "--json"], standalone_mode=False)
    assert result.return_value == status
    assert json.loads(result.stdout)["usable"] == (status == 0)


@pytest.mark.slow
def test_this_machine_trains_on_every_transport(monkeypatch, launch_environment):
    for name, value in launch_environment.items():
        monkeypatch.setenv(name, value)
    findings = {finding.name: finding for finding in examine()}
    for transport in ("stacked", "native", "gloo", "mpi"):
        assert findings[f"transport {transport}"].ok, findings[f"transport {transport}"]
    assert "threads: multiple" in findings["MPI"].found
