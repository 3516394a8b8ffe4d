"""The C++ of shared memory under the compiler's sanitizers: random work, many processes, kills.

``GOSSAMER_LONG_TESTS=1`` does fifty times as much.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TIMES = 50 if os.environ.get("GOSSAMER_LONG_TESTS") else 1
SANITIZERS = {"thread": "thread", "address": "address,undefined"}
OPTIONS = {
    "TSAN_OPTIONS": "halt_on_error=1 exitcode=66",
    "ASAN_OPTIONS": "exitcode=66",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


@pytest.fixture(scope="module")
def programs():
    """Build for both sanitizers at once; return where the programs are."""
    if not shutil.which("cmake"):
        pytest.skip("cmake is needed to build the C++ tests")
    folders = {name: ROOT / "build" / f"csrc-{name}" for name in SANITIZERS}
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    for step in ("configure", "build"):
        running = []
        for name, flags in SANITIZERS.items():
            configure = ["-S", str(ROOT / "tests" / "csrc"), "-B", str(folders[name]), *generator]
            arguments = {
                "configure": [*configure, f"-DSANITIZE={flags}"],
                "build": ["--build", str(folders[name])],
            }
            running.append(
                subprocess.Popen(
                    ["cmake", *arguments[step]],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        for process in running:
            output, _ = process.communicate(timeout=800)
            assert process.returncode == 0, output[-4000:]
    return folders


def run(program, *arguments, prefix=()):
    """Run to the end; whatever a sanitizer or the program reports is a failure."""
    done = subprocess.run(
        [*prefix, program, *map(str, arguments)],
        env=os.environ | OPTIONS,
        capture_output=True,
        text=True,
        timeout=280 * TIMES,
    )
    assert done.returncode == 0, f"{arguments}: status {done.returncode}\n{done.stderr[-6000:]}"
    assert "warning" not in done.stderr.lower(), done.stderr
    return done.stdout


def plain_addresses():
    """Return the prefix that starts a program without random addresses, which confuse gcc 12's."""
    prefix = ["setarch", "-R"]
    if shutil.which("setarch") and subprocess.run([*prefix, "true"], check=False).returncode == 0:
        return prefix
    return []


@pytest.mark.slow
@pytest.mark.timeout(900 * TIMES)
@pytest.mark.parametrize("seed", range(TIMES))
def test_threads_as_ranks_have_no_race_and_the_serial_bits(programs, seed):
    program = programs["thread"] / "protocol_threads"
    assert run(program, seed, 50, prefix=plain_addresses()) == "350 rounds\n"


@pytest.mark.slow
@pytest.mark.timeout(900 * TIMES)
@pytest.mark.parametrize("seed", range(TIMES))
def test_processes_have_the_serial_bits_and_leave_nothing(programs, seed):
    program = programs["address"] / "protocol_processes"
    assert run(program, "run", seed, 100) == "700 rounds\n"


@pytest.mark.slow
@pytest.mark.timeout(900 * TIMES)
@pytest.mark.parametrize("seed", range(TIMES))
def test_a_process_killed_at_any_instant_stops_the_others_and_spoils_nothing(programs, seed):
    program = programs["address"] / "protocol_processes"
    assert run(program, "kill", seed, 20) == "20 kills\n"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_an_operation_that_throws_ends_its_group(programs, sanitizer):
    program = programs[sanitizer] / "protocol_failures"
    assert run(program, prefix=plain_addresses()) == "done\n"
