"""``native``: processes on one host, through memory that they share.

They meet over another transport (torch.distributed's or MPI, as they were started). The collectives
read peers' rows in place: ``gossamer.runtime.shared_memory``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from gossamer.runtime import meeting
from gossamer.runtime.collectives import RankGroup
from gossamer.runtime.device_memory import DeviceExchange, DeviceMemory
from gossamer.runtime.errors import CommError
from gossamer.runtime.native import Exchange
from gossamer.runtime.shared_memory import SharedMemory
from gossamer.runtime.transports.base import Pending, Transfers

__all__ = ["NativeTransport", "hosts_of", "meet_on_device", "meet_on_host"]


_TRY_S = 60.0
"""The first use of a GPU takes seconds."""


class _Transfer:
    def __init__(
        self,
        shared: SharedMemory,
        exchange: Exchange | DeviceExchange,
        operation: str,
        kept: Transfers,
    ) -> None:
        self._shared, self._exchange, self._operation = shared, exchange, operation
        self._kept = kept  # the exchange knows their addresses only

    def wait(self, timeout_s: float) -> None:
        self._shared.check(self._exchange.wait(timeout_s), self._operation, timeout_s)


class NativeTransport:
    """Processes of one host: all of the run, or those that share a host of several."""

    name = "native"

    def __init__(self, shared: SharedMemory, abort: Callable[[int], None]) -> None:
        """Move bytes through ``shared``, whose processes are this transport's.

        Args:
            shared: memory that all its processes have attached.
            abort: how to end every process of the run, as the launcher's transport does it.
        """
        self.process, self.processes = shared.process, shared.processes
        self.device = shared.device
        self.shared: SharedMemory | None = shared
        self._abort = abort

    def exchange(self, sends: Transfers, receives: Transfers, operation: str) -> Pending:
        """Send what has room at once; the rest moves on in ``wait``."""
        assert self.shared is not None
        exchange = self.shared.exchange(sends, receives)
        return _Transfer(self.shared, exchange, operation, (*sends, *receives))

    def close(self) -> None:
        """Leave; may be called twice."""
        assert self.shared is not None
        self.shared.close()

    def abort(self, status: int) -> None:
        """End every process of the run."""
        self._abort(status)


def hosts_of(group: RankGroup) -> list[list[int]]:
    """Return the processes by host, each ascending, hosts by their first process.

    Args:
        group: one rank per process.
    """
    return meeting.hosts_of(partial(_gather_texts, group))


def meet_on_host(group: RankGroup, members: Sequence[int]) -> SharedMemory:
    """Share memory with ``members``, the processes of this host; every process calls it.

    Args:
        group: all processes of the run, one rank each.
        members: processes of this host, this one among them, ascending.

    Raises:
        CommError: on every process, where the memory of any cannot be opened.
    """
    process = group.transport.process
    return meeting.meet_on_host(partial(_gather_texts, group), process, members)


def meet_on_device(
    group: RankGroup, members: Sequence[int], open_memory: Callable[[SharedMemory], DeviceMemory]
) -> tuple[DeviceMemory | None, str]:
    """Share GPU memory with ``members``; every process calls it, and all find the same.

    Args:
        group: all processes of the run, one rank each.
        members: processes of this host, this one among them, ascending.
        open_memory: puts rows on this process's device.

    Returns:
        The memory and '', or None and what stood in the way.
    """
    shared = meet_on_host(group, members)
    memory, failure = None, ""
    try:
        memory = open_memory(shared)
    except CommError as error:
        failure = str(error)
    failure = _first_failure(group, failure)
    if memory is not None and not failure:  # everyone has some
        try:
            memory.try_out(_TRY_S)
        except CommError as error:
            failure = str(error)
        failure = _first_failure(group, failure)
    if not failure:
        return memory, ""
    (memory or shared).close()
    return None, failure


def _first_failure(group: RankGroup, failure: str) -> str:
    return next((text for text in _gather_texts(group, failure) if text), "")


def _gather_texts(group: RankGroup, text: str) -> list[str]:
    data = text.encode()
    lengths = group.all_gather(torch.tensor([[len(data)]]), count=False).flatten().tolist()
    row = torch.zeros(1, max(*lengths, 1), dtype=torch.uint8)
    row[0, : len(data)] = (
        torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else row[0, :0]
    )
    rows: Tensor = group.all_gather(row, count=False)
    return [bytes(r[:n].tolist()).decode() for r, n in zip(rows, lengths, strict=True)]
