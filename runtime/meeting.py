"""How processes meet: who shares a host with whom, and then memory.

What they meet over is given as one function: it takes a text and returns everyone's, by process.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

from torch._C._distributed_c10d import Store

from gossamer.runtime.errors import CommError
from gossamer.runtime.shared_memory import SharedMemory, Ticket

__all__ = ["Gather", "StoreGather", "hosts_of", "meet_on_host"]

Gather = Callable[[str], list[str]]
"""Every process calls it with a text of its own; returns the texts of all, by process."""

_ID_BYTES = 16


class StoreGather:
    """Gathers texts through the store of a torch.distributed group.

    The same store may serve groups one after another: each join of all counts as a new meeting.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        self._store, self._rank, self._size, self._timeout = store, rank, size, timeout
        self._meeting = (store.add("gossamer/joined", 1) - 1) // size
        self._calls = 0

    def __call__(self, text: str) -> list[str]:
        """Return the texts of all.

        Raises:
            CommError: some process did not come in time.
        """
        self._calls += 1
        place = f"gossamer/{self._meeting}/{self._calls}"
        keys = [f"{place}/{rank}" for rank in range(self._size)]
        self._store.set(keys[self._rank], f"={text}")  # never empty: not every store can hold that
        try:
            self._store.wait(keys, self._timeout)
        except RuntimeError as error:  # a DistStoreError
            raise CommError(
                f"start: the {self._size} processes did not all meet within "
                f"{self._timeout.total_seconds():g} s (gossamer: {str(error).splitlines()[0]}); "
                "see whether one of them failed, or set a longer timeout"
            ) from error
        return [self._store.get(key).decode()[1:] for key in keys]


def hosts_of(gather: Gather) -> list[list[int]]:
    """Return the processes by host, each ascending, hosts by their first process.

    A host is a kernel's boot with one set of processes and one network: containers that share
    neither count as hosts of their own.
    """
    spaces = [Path(f"/proc/self/ns/{name}").readlink() for name in ("pid", "net")]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    hosts: dict[str, list[int]] = {}
    for process, key in enumerate(gather(f"{boot} {spaces[0]} {spaces[1]}")):
        hosts.setdefault(key, []).append(process)
    return list(hosts.values())


def meet_on_host(
    gather: Gather,
    process: int,
    members: Sequence[int],
    names: Sequence[int] | None = None,
    room: int | None = None,
) -> SharedMemory:
    """Share memory with ``members``, the processes of this host; every process calls it.

    Args:
        gather: over all processes.
        process: this one's place in ``gather``.
        members: processes of this host, this one among them, ascending.
        names: how messages call the members; as ``members`` when None.
        room: bytes of address space for rows; all the machine's memory when None.

    Raises:
        CommError: on every process, where the memory of any cannot be opened.
    """
    jobs = gather(secrets.token_hex(_ID_BYTES))
    job = bytes.fromhex(jobs[members[0]])
    place = list(members).index(process)
    names = members if names is None else names
    shared = SharedMemory(job, place, len(members), names, room)
    tickets = [
        Ticket(*map(int, text.split())) for text in gather(" ".join(map(str, shared.ticket)))
    ]
    failure = ""
    try:
        shared.attach([tickets[p] for p in members])
    except CommError as error:
        failure = str(error)
    failures = [text for text in gather(failure) if text]
    if failures:
        raise CommError(failures[0])
    return shared
