"""What the tests of wrong runs share."""

import json
import sys

import pytest
from refusals import assert_one_message

from gossamer.launch.cli import main


@pytest.fixture
def invoke(tmp_path, monkeypatch, capsys):
    """Run `gossamer ARGV` in an empty folder; return its status and what it wrote to stderr."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "GOSSAMER_DATA"):
        monkeypatch.delenv(name, raising=False)
    # Users' modules are imported from the current folder; each test has another.
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["gossamer", *map(str, argv)])
        with pytest.raises(SystemExit) as done:
            main()
        return done.value.code, capsys.readouterr().err

    yield call
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def refused(invoke, tmp_path):
    """Check that a run is refused with one message holding all of the given words."""

    def check(values, words, *argv):
        text = values if isinstance(values, str) else json.dumps(values)
        (tmp_path / "run.yaml").write_text(text)
        status, err = invoke("run", "run.yaml", "--out", "out", *argv)
        assert_one_message(status, err, words)
        assert not (tmp_path / "out" / "metrics.jsonl").exists(), "training began"
        return err

    return check
