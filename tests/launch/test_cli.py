"""The door itself: what it costs to open, and what it says about itself."""

import subprocess
import sys

import pytest

import gossamer
from gossamer.launch.config_file import apply_overrides
from gossamer.runtime.errors import ConfigError


def _output(*code: str) -> str:
    return subprocess.run(
        [sys.executable, *code], capture_output=True, text=True, check=True, timeout=120
    ).stdout


def test_the_help_does_not_wait_for_torch():
    script = "import sys, gossamer.launch.cli; print('torch' in sys.modules)"
    assert _output("-c", script).strip() == "False"


def test_the_version_is_that_of_the_package():
    assert _output("-m", "gossamer", "--version").strip() == f"gossamer {gossamer.__version__}"


def test_an_entry_of_a_list_is_overridden_by_its_name():
    values = {"oracle": ["backprop", {"name": "dp", "epsilon": 4}]}
    changed = apply_overrides(values, ["oracle.dp.epsilon=2", "oracle.backprop.batch_size=8"])
    assert changed["oracle"] == [
        {"name": "backprop", "batch_size": 8},
        {"name": "dp", "epsilon": 2},
    ]
    with pytest.raises(
        ConfigError, match=r"-s oracle\.dq\.epsilon: no entry 'dq'; known: backprop, dp"
    ):
        apply_overrides(values, ["oracle.dq.epsilon=2"])
