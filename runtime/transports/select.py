"""Which transport: by name, or from how the program was started."""

from __future__ import annotations

import logging
import os
import re
import subprocess
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from gossamer.runtime.errors import ConfigError, nearest
from gossamer.runtime.transports.base import Transport

if TYPE_CHECKING:
    from gossamer.runtime.collectives import RankGroup

__all__ = [
    "TRANSPORTS",
    "Launcher",
    "detect_launcher",
    "join_torch",
    "open_transport",
    "process_index",
    "transport_name",
    "world_size",
]

TRANSPORTS = ("auto", "stacked", "native", "mpi", "gloo", "nccl", "hybrid")

log = logging.getLogger("gossamer")

Launcher = Literal["torchrun", "mpi", "slurm", "none"]


class _Variables(NamedTuple):
    """The names under which a launcher tells a process its place, the first one set counts."""

    rank: tuple[str, ...]
    size: tuple[str, ...]
    local_rank: tuple[str, ...]


# SLURM_STEP_NUM_TASKS is srun's; SLURM_PROCID and SLURM_NTASKS are set in a batch script too.
_VARIABLES: dict[Launcher, _Variables] = {
    "torchrun": _Variables(("RANK",), ("WORLD_SIZE",), ("LOCAL_RANK",)),
    "mpi": _Variables(
        ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK"),
        ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE", "MPI_LOCALNRANKS"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"),
    ),
    "slurm": _Variables(("SLURM_PROCID",), ("SLURM_STEP_NUM_TASKS",), ("SLURM_LOCALID",)),
    "none": _Variables((), (), ()),
}


def detect_launcher(environment: Mapping[str, str] = os.environ) -> Launcher:
    """Say what started this process, from the variables it left.

    ``torchrun`` (or anything that sets RANK and WORLD_SIZE) wins over mpirun over srun, which may
    set the PMI variables of an MPI too, over an ``mpi`` that is known by those alone: a torchrun
    inside a SLURM step is torchrun's. A batch script outside of srun was launched by nothing.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return "torchrun"
    if "OMPI_COMM_WORLD_SIZE" in environment:
        return "mpi"
    if _number("slurm", "size", environment, 1) > 1:
        return "slurm"
    if any(name in environment for name in _VARIABLES["mpi"].size):
        return "mpi"
    return "none"


def world_size(environment: Mapping[str, str] = os.environ) -> int:
    """Return how many processes the launcher started, as far as its variables say; 1 for none."""
    return _number(detect_launcher(environment), "size", environment, 1)


def process_index(environment: Mapping[str, str] = os.environ) -> int:
    """Return which process this is, as far as the launcher's variables say; 0 for none."""
    return _number(detect_launcher(environment), "rank", environment, 0)


def _number(
    launcher: Launcher,
    what: Literal["rank", "size", "local_rank"],
    environment: Mapping[str, str],
    default: int,
) -> int:
    for name in getattr(_VARIABLES[launcher], what):
        if name in environment:
            try:
                return int(environment[name])
            except ValueError:
                raise ConfigError(
                    f"transport: {name} must be a whole number, got '{environment[name]}'; start "
                    "with torchrun, mpirun or srun, or unset it"
                ) from None
    return default


def open_transport(name: str = "auto", *, timeout_s: float = 300.0) -> Transport:
    """Open the transport ``name``; ``auto`` follows the launcher.

    Nothing launched: ``stacked``. Several hosts with GPUs, one per process: ``nccl`` alone, between
    hosts and inside them, as ``hybrid`` is of the CPU's memory. Else the processes meet over
    ``mpi`` (mpirun) or ``gloo`` (torchrun, srun) and go on with ``native`` where all are on one
    host, with ``hybrid`` over the one they met with where some share a host, and with that one
    alone where none do.

    ``native`` keeps rows on GPUs where every process sees one (several may share it) and can read
    its peers' memory there. Where some cannot, ``nccl`` takes its place if there is a GPU per
    process, else rows stay on the CPU; process 0 logs why.

    Raises:
        ConfigError: unknown name, or one that does not fit how the program was started.
        CommError: the processes did not meet.
    """
    name, launcher = transport_name(name), detect_launcher()
    if name == "stacked":
        from gossamer.runtime.transports.stacked import StackedTransport

        return StackedTransport()
    if name not in ("auto", "native", "hybrid"):
        return _open(name, launcher, timeout_s)
    meeting = _open("mpi" if launcher == "mpi" else "gloo", launcher, timeout_s)
    return _share_memory(name, meeting, timeout_s)


def join_torch(device: torch.device, timeout_s: float) -> Transport:
    """Open a transport of the processes of torch.distributed's default group, which is there.

    Args:
        device: where rows are; on the CPU ``auto`` of ``open_transport`` follows.
        timeout_s: bound of every wait.
    """
    from gossamer.runtime.transports.torch_distributed import GlooTransport, NcclTransport

    if device.type == "cuda":
        return NcclTransport(timeout_s)
    return _share_memory("auto", GlooTransport(timeout_s), timeout_s)


def _share_memory(name: str, meeting: Transport, timeout_s: float) -> Transport:
    """Return what ``auto`` means for processes that have met; refuse another ``name``."""
    from gossamer.runtime.collectives import RankGroup
    from gossamer.runtime.transports.hybrid import HybridTransport
    from gossamer.runtime.transports.native import NativeTransport, hosts_of, meet_on_host

    group = RankGroup(meeting.processes, meeting, timeout_s=timeout_s)
    hosts = hosts_of(group)
    fitting = "hybrid"
    if len(hosts) == 1:
        fitting = "native"
    elif len(hosts) == meeting.processes:
        fitting = meeting.name
    if name not in ("auto", fitting):
        meeting.close()
        where = "one host" if len(hosts) == 1 else f"{len(hosts)} hosts"
        rule = {"native": "one host", "hybrid": "several hosts, some with several processes"}[name]
        raise ConfigError(
            f"transport: {name} is for {rule}, the {meeting.processes} processes are on {where}; "
            f"use transport: {fitting}, or auto"
        )
    if fitting == meeting.name:
        return meeting
    members = next(host for host in hosts if meeting.process in host)
    if fitting == "native" and (on_gpus := _on_gpus(group, meeting, timeout_s)) is not None:
        return on_gpus
    inside = NativeTransport(meet_on_host(group, members), meeting.abort)
    if fitting == "hybrid":
        return HybridTransport(meeting, inside, hosts)
    meeting.close()
    return inside


def _on_gpus(group: RankGroup, meeting: Transport, timeout_s: float) -> Transport | None:
    """Return the transport between the GPUs of one host; None where rows stay on the CPU.

    Every process calls it, and all find the same.
    """
    from gossamer.runtime.device_memory import DeviceMemory
    from gossamer.runtime.transports.native import NativeTransport, meet_on_device
    from gossamer.runtime.transports.torch_distributed import NcclTransport, TorchTransport

    gpus = torch.cuda.device_count()
    fewest = int(group.all_reduce(torch.tensor([[gpus]]), "min", count=False))
    if fewest == 0:
        return None
    device = torch.device("cuda", meeting.process % gpus)
    memory, failure = meet_on_device(
        group, range(meeting.processes), lambda shared: DeviceMemory.on_cuda(shared, device)
    )
    if memory is not None:
        meeting.close()
        return NativeTransport(memory, meeting.abort)
    one_each = fewest >= meeting.processes and isinstance(meeting, TorchTransport)
    if meeting.process == 0:
        log.warning("transport: %s; %s", failure, "nccl instead" if one_each else "rows on the CPU")
    if one_each and isinstance(meeting, TorchTransport):
        return NcclTransport(timeout_s, meeting)
    return None


def _open(name: str, launcher: Launcher, timeout_s: float) -> Transport:
    if name == "mpi":
        from gossamer.runtime.transports.mpi import MPITransport

        transport = MPITransport()
        if transport.processes < world_size():
            raise ConfigError(
                f"transport: mpi sees {transport.processes} of the {world_size()} processes: "
                "mpirun and mpi4py's MPI library are not of one kind; start with the mpirun of "
                "that library, or set MPI4PY_MPIABI and LD_LIBRARY_PATH"
            )
        return transport
    from gossamer.runtime.transports.torch_distributed import GlooTransport, NcclTransport

    _set_torch_variables(launcher)
    return (NcclTransport if name == "nccl" else GlooTransport)(timeout_s)


def transport_name(name: str) -> str:
    """Return what ``name`` means here, opening nothing.

    Returns:
        A transport's name, or ``auto`` where the processes have to meet before one is chosen.

    Raises:
        ConfigError: unknown name, or one that does not fit how the program was started; every
            process finds the same.
    """
    launcher = detect_launcher()
    if name not in TRANSPORTS:
        raise ConfigError(f"transport: unknown transport '{name}'{nearest(name, TRANSPORTS)}")
    if name == "auto":
        if launcher == "none":
            return "stacked"
        return "nccl" if launcher != "mpi" and _hosts_with_gpus() else "auto"
    if name == "stacked" and world_size() > 1:
        raise ConfigError(
            f"transport: stacked runs in one process, but {launcher} started {world_size()}; "
            "use transport: auto"
        )
    if name == "mpi" and launcher == "torchrun" and world_size() > 1:
        raise ConfigError(
            f"transport: mpi cannot join the {world_size()} processes of torchrun; use "
            "transport: auto, or start with mpirun"
        )
    if name == "nccl" and not torch.cuda.is_available():
        raise ConfigError("transport: nccl needs a GPU per process, none here; use gloo")
    if name in ("native", "hybrid", "gloo", "nccl") and launcher == "none":
        raise ConfigError(
            f"transport: {name} needs several processes; start with torchrun or mpirun, or let "
            "'gossamer run --processes N' start them; one process is transport: stacked"
        )
    if name in ("gloo", "nccl") and launcher == "mpi":
        for variable in ("MASTER_ADDR", "MASTER_PORT"):
            if variable not in os.environ:
                raise ConfigError(
                    f"transport: {name} under mpirun needs {variable} in the environment: export "
                    "MASTER_ADDR (the first node's name) and MASTER_PORT (a free port), or use "
                    "transport: mpi"
                )
    return name


def _hosts_with_gpus() -> bool:
    """Say whether there are several nodes, and every process of this one has its own GPU."""
    gpus = torch.cuda.device_count()
    on_slurm = re.findall(r"(?:^|,)(\d+)", os.environ.get("SLURM_TASKS_PER_NODE", ""))  # "4(x2),3"
    most = max(map(int, on_slurm), default=world_size())
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or most)
    if here >= world_size():
        return False
    if 0 < gpus < here:
        log.warning("transport: %d GPUs for %d processes here: rows on the CPU", gpus, here)
    return gpus >= here


def _set_torch_variables(launcher: Launcher) -> None:
    """Give torch.distributed the variables it reads, from the launcher's own."""
    if launcher not in ("mpi", "slurm"):
        return
    names = _VARIABLES[launcher].rank
    if not any(name in os.environ for name in names):
        raise ConfigError(f"transport: none of {list(names)} is set; which process is this?")
    if launcher == "slurm":
        if "MASTER_ADDR" not in os.environ:
            os.environ["MASTER_ADDR"] = _first_slurm_host()
        if "MASTER_PORT" not in os.environ:
            # One port per job, the same on every node without asking anyone.
            job = os.environ.get("SLURM_JOB_ID", "")
            if not job.isdigit():
                raise _no_meeting_place("SLURM_JOB_ID is not set")
            os.environ["MASTER_PORT"] = str(20000 + int(job) % 20000)
    os.environ.update(
        RANK=str(process_index()),
        LOCAL_RANK=str(_number(launcher, "local_rank", os.environ, 0)),
        WORLD_SIZE=str(world_size()),  # last: from here on the launcher looks like torchrun
    )


def _first_slurm_host() -> str:
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    nodes = next((os.environ[name] for name in names if name in os.environ), None)
    if nodes is None:
        raise _no_meeting_place("SLURM_JOB_NODELIST is not set")
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=True)
        return shown.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise _no_meeting_place(f"'scontrol show hostnames' failed: {error}") from error


def _no_meeting_place(reason: str) -> ConfigError:
    return ConfigError(
        f"transport: the processes of srun do not know where to meet ({reason}); export "
        "MASTER_ADDR (the first node's name) and MASTER_PORT (a free port)"
    )
