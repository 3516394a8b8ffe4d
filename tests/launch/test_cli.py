"""The door itself: what it costs to open, and what it says about itself."""

import subprocess
import sys

import gossamer


def _output(*code: str) -> str:
    return subprocess.run(
        [sys.executable, *code], capture_output=True, text=True, check=True, timeout=120
    ).stdout


def test_the_help_does_not_wait_for_torch():
    script = "import sys, gossamer.launch.cli; print('torch' in sys.modules)"
    assert _output("-c", script).strip() == "False"


def test_the_version_is_that_of_the_package():
    assert _output("-m", "gossamer", "--version").strip() == f"gossamer {gossamer.__version__}"
