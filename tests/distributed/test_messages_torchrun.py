"""Messages of a length of their own and the way back, in processes that torchrun starts."""

import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parents[1] / "messages_worker.py"


@pytest.mark.slow
@pytest.mark.parametrize(("transport", "processes"), [("gloo", 3), ("native", 4)])
def test_processes_of_torchrun_get_what_one_process_gets(transport, processes, launch_environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", str(WORKER)]
    done = subprocess.run(
        [*command, transport],
        env=launch_environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
