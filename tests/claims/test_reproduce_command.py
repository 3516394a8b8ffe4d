"""``gossamer reproduce``: what it prints, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from gossamer.launch.commands.reproduce import reproduce
from gossamer.launch.reproduce import paper
from gossamer.launch.reproduce.claims import Claim, at_least, at_most, between, shown, skipped
from gossamer.launch.reproduce.dnasa import a9a
from gossamer.launch.reproduce.simulation import Laboratory, Simulation, simulate
from gossamer.runtime.errors import ConfigError


def good(lab: Laboratory) -> Iterator[Claim]:
    yield at_least("two is at least one", 2.0, 1.0, lab.seeds)
    yield shown("a figure", 3.0, lab.seeds)
    yield skipped("needs data", ">= 1", "no data")


def bad(lab: Laboratory) -> Iterator[Claim]:
    yield at_most("two is at most one", 2.0, 1.0, lab.seeds)


@pytest.fixture
def two_groups(monkeypatch):
    """A paper called 'test' with a group that passes and one that fails."""
    module = ModuleType("a_paper_of_the_tests")
    module.PAPER = paper.Paper(
        "Test", {"good": good, "bad": bad}, limits=("Nothing else.",), seeds={"good": 5}
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(paper.PAPERS, "test", module.__name__)


def call(only: list[str], as_json: bool = True, seeds: int | None = 3, quick: bool = False) -> int:
    return reproduce("test", seeds=seeds, quick=quick, only=only, jobs=1, as_json=as_json)


def test_json_has_a_verdict_per_claim_and_status_0_when_none_fails(two_groups, capsys):
    assert call(["good"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["paper"] == "test"
    first = report["claims"][0]
    assert (first["figure"], first["threshold"], first["passed"]) == (2.0, ">= 1", True)
    assert first["seeds"] == 3
    assert [claim["verdict"] for claim in report["claims"]] == ["passed", "shown", "skipped"]
    assert report["limits"] == ["Nothing else."]


@pytest.mark.parametrize(
    ("seeds", "quick", "expected"),
    [(None, False, [5, 3]), (2, False, [2, 2]), (2, True, [1, 1])],
)
def test_a_group_gets_the_seeds_that_it_names_unless_told_otherwise(
    two_groups, capsys, seeds, quick, expected
):
    call(["good", "bad"], seeds=seeds, quick=quick)
    claims = json.loads(capsys.readouterr().out)["claims"]
    assert [claims[0]["seeds"], claims[-1]["seeds"]] == expected


@pytest.mark.parametrize("name", ["dp-pretraining", "dppretraining", "DP_Pretraining"])
def test_dashes_and_case_of_a_name_do_not_matter(name):
    assert paper.find_paper(name).title.startswith("DP-CPT")


@pytest.mark.parametrize("name", paper.PAPERS)
def test_seeds_are_given_for_groups_that_exist(name):
    found = paper.find_paper(name)
    assert set(found.seeds) <= set(found.groups)
    assert found.limits


def test_a_failed_claim_ends_with_status_1_and_says_so(two_groups, capsys):
    assert call(["good", "bad"], as_json=False) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert "1 of 2 claims passed" in out
    assert "Nothing else." in out


def test_unknown_names_offer_the_nearest(two_groups):
    with pytest.raises(ConfigError, match="did you mean 'good'"):
        call(["god"])
    command = [sys.executable, "-m", "gossamer", "reproduce", "dnsa"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "did you mean 'dnasa'" in done.stderr


def test_a_figure_that_is_no_number_fails():
    nan = float("nan")
    claims = [at_least("", nan, 0, 1), at_most("", nan, 0, 1), between("", nan, 0, 1, 1)]
    assert [claim.passed for claim in claims] == [False] * 3


def test_a9a_is_skipped_and_says_why_without_its_data(monkeypatch, tmp_path):
    monkeypatch.delenv("GOSSAMER_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    claims = list(a9a(Laboratory()))
    assert len(claims) == 3
    assert all(claim.passed is None and "GOSSAMER_DATA" in claim.note for claim in claims)


def test_processes_beside_each_other_run_what_one_process_runs():
    values = {"task": {"name": "digits", "hidden": [4]}, "algorithm": {"name": "d-nasa"}}
    run = Simulation({**values, "ranks": 4, "steps": 5}, evaluations=2)
    with Laboratory(seeds=2, jobs=2) as lab:
        found = lab.run({"ring": run})["ring"].trajectories
    assert [t.sha256 for t in found] == [simulate(run, seed).sha256 for seed in (0, 1)]
