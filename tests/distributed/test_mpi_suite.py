"""One ordinary test that starts the marked ones under mpirun."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_the_communicator_suite_passes_under_mpirun(processes, launch_environment):
    mpirun = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or "mpirun"
    folder = Path(__file__).parent
    command = [mpirun, "-n", str(processes), sys.executable, "-m", "mpi4py", "-m", "pytest", "-x"]
    command += ["-m", "mpi", "-p", "no:cacheprovider", "-q", str(folder)]
    done = subprocess.run(
        command, env=launch_environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
