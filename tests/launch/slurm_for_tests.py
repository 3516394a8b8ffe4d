"""A SLURM of our own for one test: one machine, in a folder, gone afterwards."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
_PATH = os.environ["PATH"] + ":/usr/sbin"
_READY_S = 30.0
_JOB_S = 150.0

_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={daemon_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str:
    """Return why there can be no SLURM here, '' where there can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"no {', '.join(missing)}"
    return "" if os.geteuid() == 0 else "slurmd needs root"


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Run a controller and one node of four cores; give the environment of its commands."""
    environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf")}
    host = socket.gethostname().partition(".")[0]
    ports = {"controller_port": _free_port(), "daemon_port": _free_port()}
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    text = _CONFIGURATION.format(host=host, folder=folder, **ports)
    (folder / "slurm.conf").write_text(text)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    files = {
        "key-file": "key",
        "socket": "socket",
        "pid-file": "pid",
        "log-file": "log",
        "seed-file": "seed",
    }
    munge = [f"--{option}={folder}/munge.{suffix}" for option, suffix in files.items()]
    commands = [
        ["munged", "--foreground", "--force", *munge],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-c"],
    ]
    daemons = []
    log = (folder / "daemons.log").open("w")
    try:
        for command in commands:
            found = shutil.which(command[0], path=_PATH)
            assert found is not None
            daemons.append(
                subprocess.Popen([found, *command[1:]], env=environment, stdout=log, stderr=log)
            )
            if command[0] == "munged":
                _wait(lambda: (folder / "munge.socket").exists(), folder)
        _wait(lambda: _is_idle(environment), folder)
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(timeout=30)
        log.close()


def wait_for_job(number: str, environment: dict[str, str]) -> str:
    """Return the state in which a job has ended."""
    command = ["scontrol", "--oneliner", "show", "job", number]
    deadline = time.monotonic() + _JOB_S
    while time.monotonic() < deadline:
        shown = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, timeout=30
        )
        state = shown.stdout.partition("JobState=")[2].split()[0]
        if state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            return state
        time.sleep(0.5)
    raise TimeoutError(f"job {number} has not ended")


def _is_idle(environment: dict[str, str]) -> bool:
    done = subprocess.run(
        ["scontrol", "show", "node"], env=environment, capture_output=True, text=True, timeout=30
    )
    return "State=IDLE" in done.stdout


def _wait(ready, folder: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while not ready():
        if time.monotonic() > deadline:
            logs = "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("*.log")))
            raise TimeoutError(f"SLURM did not start:\n{logs}")
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
