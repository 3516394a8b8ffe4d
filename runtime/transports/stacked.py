"""``stacked``: all ranks are rows of one process; nothing has to move."""

from __future__ import annotations

import os

import torch

from gossamer.runtime import native
from gossamer.runtime.shared_memory import SharedMemory
from gossamer.runtime.transports.base import Pending, Transfers

__all__ = ["StackedTransport"]


class _Done:
    def wait(self, timeout_s: float) -> None:
        """Nothing was in flight."""


class StackedTransport:
    """One process that hosts every rank."""

    name = "stacked"
    process = 0
    processes = 1
    shared: SharedMemory | None = None

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        # No other process computes, so the kernels may use every core, whatever torch was told.
        if "OMP_NUM_THREADS" not in os.environ:
            native.use_threads(len(os.sched_getaffinity(0)))

    def exchange(self, sends: Transfers, receives: Transfers, operation: str) -> Pending:
        """There is no other process to exchange with."""
        transfers = [*sends, *receives]
        assert not transfers, f"{operation}: one process has no peers"
        return _Done()

    def close(self) -> None:
        """Nothing to leave."""

    def abort(self, status: int) -> None:
        """End this process."""
        os._exit(status)
