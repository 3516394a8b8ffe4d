"""The contract of a transport: one primitive, a batch of sends and receives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from gossamer.runtime.shared_memory import SharedMemory

__all__ = ["Pending", "Transport"]

Transfers = Sequence[tuple[int, Tensor]]
"""(peer process, contiguous tensor): messages to or from that peer, in issue order."""


class Pending(Protocol):
    """A batch in flight."""

    def wait(self, timeout_s: float) -> None:
        """Return when every buffer may be reused.

        Raises:
            CommTimeout: a peer did not answer in time; names peers and operation.
            PeerLost: a peer's process is gone; names peer and operation.
        """
        ...


class Transport(Protocol):
    """Moves bytes between the processes of one run. Every collective is made of ``exchange``.

    Attributes:
        name: as in YAML.
        process: this process, 0..processes-1.
        processes: how many there are.
        device: where buffers must live.
        shared: memory that all processes of the run reach, where there is such; collectives then
            read peers' rows in place.
    """

    name: str
    process: int
    processes: int
    device: torch.device
    shared: SharedMemory | None

    def exchange(self, sends: Transfers, receives: Transfers, operation: str) -> Pending:
        """Start all transfers together; messages between one pair match in issue order.

        Both sides call it with matching lists. ``operation`` is for error messages.
        """
        ...

    def close(self) -> None:
        """Leave the group; may be called twice."""
        ...

    def abort(self, status: int) -> None:
        """End every process of the run as soon as possible, this one included."""
        ...
