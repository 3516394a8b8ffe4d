"""``native``: processes on one host, through memory that they share.

They meet over another transport (torch.distributed's or MPI, as they were started), which is then
left. The collectives read peers' rows in place: ``gossamer.runtime.shared_memory``.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gossamer.runtime.collectives import RankGroup
from gossamer.runtime.errors import CommError
from gossamer.runtime.native import Exchange
from gossamer.runtime.shared_memory import SharedMemory, Ticket
from gossamer.runtime.transports.base import Pending, Transfers, Transport

__all__ = ["NativeTransport", "hosts_of", "meet_on_host"]

_ID_BYTES = 16


class _Transfer:
    def __init__(
        self, shared: SharedMemory, exchange: Exchange, operation: str, kept: Transfers
    ) -> None:
        self._shared, self._exchange, self._operation = shared, exchange, operation
        self._kept = kept  # the exchange knows their addresses only

    def wait(self, timeout_s: float) -> None:
        self._shared.check(self._exchange.wait(timeout_s), self._operation, timeout_s)


class NativeTransport:
    """All processes of the run, on one host."""

    name = "native"

    def __init__(self, meeting: Transport, timeout_s: float) -> None:
        """Join the others; ``meeting`` is closed.

        Raises:
            CommError: a process's memory cannot be opened.
        """
        self.process, self.processes = meeting.process, meeting.processes
        self.device = torch.device("cpu")
        self._meeting = meeting
        self.shared: SharedMemory | None = meet_on_host(
            RankGroup(self.processes, meeting, timeout_s=timeout_s), list(range(self.processes))
        )
        meeting.close()

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
        """End every process: as the launcher's transport does it."""
        self._meeting.abort(status)


def hosts_of(group: RankGroup) -> list[list[int]]:
    """Return the processes by host, each ascending, hosts by their first process.

    A host is a kernel's boot with one set of processes and one network: containers that share
    neither count as hosts of their own.

    Args:
        group: one rank per process.
    """
    spaces = [Path(f"/proc/self/ns/{name}").readlink() for name in ("pid", "net")]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    mine = f"{boot} {spaces[0]} {spaces[1]}"
    hosts: dict[str, list[int]] = {}
    for process, key in enumerate(_gather_texts(group, mine)):
        hosts.setdefault(key, []).append(process)
    return list(hosts.values())


def meet_on_host(group: RankGroup, members: Sequence[int]) -> SharedMemory:
    """Share memory with ``members``, the processes of this host; every process calls it.

    Args:
        group: all processes of the run, one rank each.
        members: processes of this host, this one among them, ascending.

    Raises:
        CommError: on every process, where the memory of any cannot be opened.
    """
    jobs = _gather_texts(group, secrets.token_hex(_ID_BYTES))
    me = group.transport.process
    job = bytes.fromhex(jobs[members[0]])
    shared = SharedMemory(job, list(members).index(me), len(members), members)
    tickets = [
        Ticket(*map(int, text.split()))
        for text in _gather_texts(group, " ".join(map(str, shared.ticket)))
    ]
    failure = ""
    try:
        shared.attach([tickets[p] for p in members])
    except CommError as error:
        failure = str(error)
    failures = [text for text in _gather_texts(group, failure) if text]
    if failures:
        raise CommError(failures[0])
    return shared


def _gather_texts(group: RankGroup, text: str) -> list[str]:
    data = text.encode()
    lengths = group.all_gather(torch.tensor([[len(data)]]), count=False).flatten().tolist()
    row = torch.zeros(1, max(*lengths, 1), dtype=torch.uint8)
    row[0, : len(data)] = (
        torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else row[0, :0]
    )
    rows: Tensor = group.all_gather(row, count=False)
    return [bytes(r[:n].tolist()).decode() for r, n in zip(rows, lengths, strict=True)]
