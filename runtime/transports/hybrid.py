"""``hybrid``: several hosts with several processes each.

Inside a host bytes move through shared memory, between hosts over ``mpi`` or ``gloo``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from gossamer.runtime.shared_memory import SharedMemory
from gossamer.runtime.transports.base import Pending, Transfers, Transport
from gossamer.runtime.transports.mpi import MPITransport

__all__ = ["HybridTransport"]


class _Both:
    def __init__(self, outer: Pending, inner: Pending) -> None:
        self._outer, self._inner = outer, inner

    def wait(self, timeout_s: float) -> None:
        # The slower first: meanwhile the other processes of the host put down what they send.
        deadline = time.monotonic() + timeout_s
        self._outer.wait(timeout_s)
        self._inner.wait(max(deadline - time.monotonic(), 0.001))


class HybridTransport:
    """All processes of the run, of which those of a host share memory.

    Attributes:
        hosts: the processes of each host, ascending; hosts by their first process.
        inside: the transport among the processes of this host; its process p is
            ``hosts[this one][p]``.
        between: the transport among all processes, used between hosts.
    """

    name = "hybrid"
    shared: SharedMemory | None = None  # not of all processes

    def __init__(
        self, between: Transport, inside: Transport, hosts: Sequence[Sequence[int]]
    ) -> None:
        """Join both transports; closes them with itself."""
        self.process, self.processes = between.process, between.processes
        self.device = between.device
        self.hosts = [list(host) for host in hosts]
        self.inside, self.between = inside, between
        members = next(host for host in self.hosts if self.process in host)
        self._place = {process: place for place, process in enumerate(members)}
        if isinstance(between, MPITransport):
            between.progress_in_background()

    def exchange(self, sends: Transfers, receives: Transfers, operation: str) -> Pending:
        """Start all transfers, each on the way to its peer."""
        near_sends, far_sends = self._split(sends)
        near_receives, far_receives = self._split(receives)
        if not near_sends and not near_receives:
            return self.between.exchange(far_sends, far_receives, operation)
        if not far_sends and not far_receives:
            return self.inside.exchange(near_sends, near_receives, operation)
        outer = self.between.exchange(far_sends, far_receives, operation)  # first: it takes longer
        return _Both(outer, self.inside.exchange(near_sends, near_receives, operation))

    def _split(self, transfers: Transfers) -> tuple[Transfers, Transfers]:
        """Return those with peers on this host, by their place there, and the others."""
        near = [(self._place[peer], t) for peer, t in transfers if peer in self._place]
        return near, [(peer, t) for peer, t in transfers if peer not in self._place]

    def close(self) -> None:
        """Leave both; may be called twice."""
        self.inside.close()
        self.between.close()

    def abort(self, status: int) -> None:
        """End every process of the run."""
        self.between.abort(status)
