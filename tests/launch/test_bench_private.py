"""gossamer bench private: a private step beside Opacus'."""

import json
import subprocess
import sys

import pytest

from gossamer.launch.bench import private_ways
from gossamer.launch.bench.private import PrivateRequest, _check, aims, parse_models, private
from gossamer.launch.bench.private_ways import WAYS, PrivateModel
from gossamer.runtime import Communicator, ConfigError, StackedTransport
from gossamer.topologies import build

TINY = PrivateModel("transformer", batch_size=3, width=16, layers=1, context=8)


def made_up(model, **changed):
    return [
        {"model": model, "ranks": 1, "way": way, "step_ms": 10.0, "memory_mib": 10.0}
        | changed.get(way.replace(" ", "_"), {})
        for way in WAYS
    ]


def test_aims_are_ratios_with_a_verdict():
    slow = {"step_ms": 20.0, "memory_mib": 15.0}
    found = aims(made_up("transformer", opacus=slow, opacus_ghost={"step_ms": 8.0}))
    assert [(round(aim.figure, 3), aim.is_met) for aim in found] == [
        (0.5, True),
        (0.667, False),
        (1.25, False),
        (1.0, True),
    ]
    assert [aim.bound for aim in aims(made_up("cnn"))] == [1.1]


def test_without_opacus_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(ConfigError, match=r"pip install 'gossamer\[privacy\]'"):
        private(PrivateRequest([1], [TINY], 1, 0), print)


def test_models_that_are_none_are_refused():
    with pytest.raises(ConfigError, match="unknown model 'cnm'; did you mean 'cnn'"):
        parse_models("cnm", 2, 16, 1, 8)
    with pytest.raises(ConfigError, match="--width: 12 must be a multiple of 8"):
        parse_models("cnn", 2, 12, 1, 8)


@pytest.mark.parametrize("name", ["transformer", "cnn"])
@pytest.mark.filterwarnings("ignore:Full backward hook:UserWarning")
def test_the_private_ways_make_the_same_step_and_another_is_noticed(name, monkeypatch):
    pytest.importorskip("opacus")
    model = PrivateModel(name, batch_size=3, width=16, layers=1, context=8)
    comm = Communicator(build("ring", 1), StackedTransport())
    _check(model, comm)
    options = private_ways._dp_options
    doubled = lambda model: {**options(model), "max_grad_norm": 1.0}  # noqa: E731
    monkeypatch.setattr(private_ways, "_dp_options", doubled)
    with pytest.raises(ConfigError, match=r"the steps of dp and opacus are .* apart"):
        _check(model, comm)


@pytest.mark.slow
def test_every_way_is_timed_and_its_memory_measured():
    pytest.importorskip("opacus")
    flags = ["--ranks=2", "--models=transformer", "--batch=2", "--width=16", "--layers=1"]
    flags += ["--context=8", "--iters=2", "--warmup=0", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "gossamer", "bench", "private", *flags],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    document = json.loads(done.stdout)
    assert [row["way"] for row in document["rows"]] == list(WAYS)
    dp = document["rows"][WAYS.index("dp")]["step_ms"]
    for row in document["rows"]:
        assert row["dp_ratio"] == pytest.approx(row["step_ms"] / dp)
        assert row["memory_mib"] >= 0
    assert len(document["aims"]) == 4
