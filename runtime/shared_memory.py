"""Rows in memory that all processes of a host share: collectives without copies.

The compiled group does the work (csrc/group.h says how); here its arguments are checked and its
failures become errors.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.runtime import native
from gossamer.runtime.errors import CommError, CommTimeout, PeerLost
from gossamer.runtime.exchange import ExchangePlan
from gossamer.runtime.native import DTYPES, AveragePlan, Calls, Exchange, Group
from gossamer.runtime.placement import Placement
from gossamer.runtime.rows import aligned

__all__ = ["SharedMemory", "Ticket", "counts_of"]


_ADDRESS_SPACE = 16 << 40
"""For the segments of a group: an eighth of what a process has."""


class Ticket(NamedTuple):
    """Where a process keeps its shared memory: a file descriptor of a process."""

    pid: int
    fd: int
    bytes: int


class SharedMemory:
    """This process's share of a group of processes on one host.

    Attributes:
        process: this process, 0..processes-1.
        processes: how many there are.
        device: where rows live.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        job: bytes,
        process: int,
        processes: int,
        names: Sequence[int],
        room: int | None = None,
    ) -> None:
        """Reserve address space; nothing is shared before ``attach``.

        Args:
            job: 16 bytes that no other job has.
            process: this one's place in the group.
            processes: how many there are.
            names: how messages call the processes of the group (their place in the whole run).
            room: bytes of address space for rows and large messages; None: as much as there is
                memory, so far as all segments fit beside each other.
        """
        self.process, self.processes, self._names = process, processes, tuple(names)
        cores = len(os.sched_getaffinity(0))
        self._room = _room(processes) if room is None else room
        self._group: Group = Group.create(job, process, processes, self._room, cores)

    @property
    def ticket(self) -> Ticket:
        """What the other processes need to attach."""
        return Ticket(*self._group.ticket)

    def attach(self, tickets: Sequence[Ticket]) -> None:
        """Open every process's memory.

        Raises:
            CommError: one is gone, belongs to another user or to another job.
        """
        try:
            self._group.attach(list(tickets))
        except RuntimeError as error:
            raise CommError(f"start: {error} (native)") from None

    def alloc(self, local: int, d: int, dtype: torch.dtype) -> Tensor:
        """Return zeros (local, d) that the peers read in place; each row on a cache line.

        Raises:
            CommError: the address space is used up.
        """
        stride = aligned(d, dtype)
        try:
            memory = self._group.allocate(local * stride * dtype.itemsize)
        except MemoryError:
            raise CommError(
                f"alloc: no room for {local} rows of {d} {dtype} in shared memory (native); "
                f"{self._room >> 20} MiB were reserved"
            ) from None
        return torch.from_numpy(memory).view(dtype).view(local, stride)[:, :d]

    def exchange(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Exchange:
        """Start transfers with peers of the group; contiguous CPU tensors."""
        return Exchange(self._group, self._buffers(sends), self._buffers(receives))

    def prepare(self, plan: ExchangePlan) -> AveragePlan:
        """Compile a round, once."""
        return AveragePlan.create(
            [peer for peer, _ in plan.sends],
            list(plan.staged),
            plan.most_staged,
            [
                (peer, list(rows), list(staged))
                for (peer, _), rows, staged in zip(
                    plan.receives, plan.peer_rows, plan.peer_staged, strict=True
                )
            ],
            plan.terms.indptr,
            plan.terms.columns,
            plan.terms.weights,
            plan.degree,
        )

    def average(
        self,
        plan: AveragePlan,
        x: Tensor,
        out: Tensor,
        axpy: tuple[float, Tensor] | None,
        rounds: int,
        timeout_s: float,
    ) -> int:
        """Average over the graph; returns a status for ``check``.

        Args:
            plan: of the round.
            x: (local, d), rows contiguous.
            out: like ``x``; may be ``x``.
            axpy: ``(a, y)``, added in the last round.
            rounds: how often the round is applied.
            timeout_s: for each wait.

        Raises:
            ValueError: a dtype or layout that the kernels do not take; nothing was sent.
        """
        size = x.itemsize
        x_stride, out_stride = self._row_stride("x", x), self._row_stride("out", out)
        a, y_at, y_stride = (0.0, 0, 0) if axpy is None else self._addend(x, *axpy)
        return self._group.average(
            plan,
            x.data_ptr(),
            x_stride * size,
            out.data_ptr(),
            out_stride * size,
            y_at,
            y_stride,
            a,
            x.shape[1],
            DTYPES[x.dtype],
            rounds,
            native.num_threads(),
            timeout_s,
        )

    def sum(
        self, x: Tensor, out: Tensor, counts: Sequence[int], divisor: float, timeout_s: float
    ) -> int:
        """Write the sum of all ranks' rows over ``divisor`` into ``out``; returns a status.

        Args:
            x: (local, d), rows contiguous, floating point.
            out: (1, d).
            counts: rows of each process.
            divisor: 1 for the sum, n for the mean.
            timeout_s: for each wait.
        """
        return self._group.sum(
            x.data_ptr(),
            self._row_stride("x", x) * x.itemsize,
            counts,
            out.data_ptr(),
            x.shape[1],
            DTYPES[x.dtype],
            divisor,
            timeout_s,
        )

    def gather(self, x: Tensor, out: Tensor, counts: Sequence[int], timeout_s: float) -> int:
        """Copy every rank's row into ``out``, in rank order; returns a status.

        Args:
            x: (local, m), rows contiguous, on the CPU, of any dtype.
            out: (n, m), contiguous, of the same dtype.
            counts: rows of each process.
            timeout_s: for each wait.
        """
        size = x.itemsize
        return self._group.gather(
            x.data_ptr(),
            x.stride()[0] * size,
            counts,
            out.data_ptr(),
            x.shape[1] * size,
            timeout_s,
        )

    def broadcast(self, x: Tensor | None, out: Tensor, root: int, timeout_s: float) -> int:
        """Copy the row of process ``root`` into ``out``; returns a status.

        Args:
            x: (m,), contiguous, on the root; None on the others.
            out: (1, m), contiguous; may be ``x`` on the root.
            root: the process that has the row.
            timeout_s: for each wait.
        """
        at = 0 if x is None else x.data_ptr()
        return self._group.broadcast(at, root, out.data_ptr(), out.nbytes, timeout_s)

    def calls(self, counts: Sequence[int]) -> Calls:
        """Return the collectives for a communicator with so many rows in each process.

        They take tensors and count for themselves; -1 where a call is not theirs to make.
        """
        return Calls(self._group, list(counts))

    def check(self, status: int, operation: str, timeout_s: float) -> None:
        """Raise what a status other than 0 stands for.

        Raises:
            CommTimeout: a peer did not answer in time; names peer and operation.
            PeerLost: a peer's process is gone, or has stopped; names peer and operation.
            CommError: a peer is in another operation.
        """
        if status == 0:
            return
        outcome, peer = status % 8, self._names[status // 8]
        if outcome == 1:
            raise CommTimeout(
                f"{operation}: no answer from process {peer} within {timeout_s:g} s (native)"
            )
        if outcome == 5:
            raise CommError(
                f"{operation}: process {peer} sent another operation's message, or one of another "
                "size (native); every process must make the same calls with the same shapes"
            )
        if outcome == 6:
            raise CommError(
                f"{operation}: the {self._room >> 20} MiB reserved for shared memory are "
                "used up (native)"
            )
        reason = {
            2: "is gone",
            3: "has left the run",
            4: "stopped after a failure of its own",
            7: "stopped in the middle; rows averaged in place are partly averaged: take them from "
            "a checkpoint",
        }[outcome]
        raise PeerLost(f"{operation}: process {peer} {reason} (native)")

    def owns(self, x: Tensor) -> bool:
        """Say whether the peers can read ``x`` in place."""
        return bool(self._group.owns(x.data_ptr(), x.nbytes))

    def close(self) -> None:
        """Tell the peers that this process leaves; tensors from ``alloc`` stay valid."""
        self._group.close()

    def _addend(self, x: Tensor, a: float, y: Tensor) -> tuple[float, int, int]:
        """Return (a, address, bytes between rows) of an axpy for the kernels, after the checks."""
        if y.shape != x.shape or y.dtype != x.dtype:
            raise ValueError(
                f"neighbor_average: axpy is {tuple(y.shape)} {y.dtype}, "
                f"x {tuple(x.shape)} {x.dtype}"
            )
        return a, y.data_ptr(), self._row_stride("axpy", y) * y.itemsize

    def _row_stride(self, name: str, rows: Tensor) -> int:
        stride, step = rows.stride()
        if (
            (step != 1 and rows.shape[1] > 1)
            or rows.device != self.device
            or rows.dtype not in DTYPES
        ):
            raise ValueError(
                f"{name}: must be contiguous rows on {self.device} of one of {list(DTYPES)}, got "
                f"strides {rows.stride()} {rows.dtype} on {rows.device}"
            )
        return stride

    def _buffers(self, transfers: Sequence[tuple[int, Tensor]]) -> list[tuple[int, int, int]]:
        for _, tensor in transfers:
            if tensor.device != self.device or not tensor.is_contiguous():
                raise ValueError(
                    f"native: needs contiguous tensors on {self.device}, got {tensor.device}"
                )
        return [(peer, tensor.data_ptr(), tensor.nbytes) for peer, tensor in transfers]


def counts_of(placement: Placement) -> list[int]:
    """Return how many rows each process holds."""
    return [len(placement.ranks(p)) for p in range(placement.processes)]


def _room(processes: int) -> int:
    """Return the bytes to reserve for one process's rows: pages cost when they are written.

    Each process maps the segments of all, and may be in several groups.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(memory, _ADDRESS_SPACE // processes)
