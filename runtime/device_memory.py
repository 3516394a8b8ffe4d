"""Rows in GPU memory that all processes of a host reach: the collectives of ``SharedMemory``.

Calls queue work on torch's current stream and return; the host waits only until its peers have
queued their part (csrc/device_collectives.h says how they agree). Failures are those of shared
memory; a failure of the device itself is a CommError, and stops the group.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gossamer.runtime.errors import CommError, CommTimeout
from gossamer.runtime.native import DTYPES, AveragePlan, DeviceGroup
from gossamer.runtime.rows import aligned
from gossamer.runtime.shared_memory import SharedMemory

__all__ = ["DeviceExchange", "DeviceMemory"]


class DeviceExchange:
    """Transfers that are queued, all at once, when somebody waits for them."""

    def __init__(self, run: Callable[[float], int]) -> None:
        self._run, self._status = run, -1

    def wait(self, timeout_s: float) -> int:
        """Queue them; returns a status for ``check``."""
        if self._status < 0:
            self._status = self._run(timeout_s)
        return self._status


class DeviceMemory(SharedMemory):
    """This process's share of a group of processes whose rows are in GPU memory.

    They may share a GPU, or have one each that can read the others' memory.
    """

    def __init__(self, shared: SharedMemory, device: torch.device, group: DeviceGroup) -> None:
        """Take over ``shared``, which is attached and carries the messages between processes.

        Args:
            shared: not used for anything else.
            device: where rows live.
            group: made of the group of ``shared`` for that device.
        """
        self.process, self.processes, self._names = shared.process, shared.processes, shared._names
        self._group = shared._group
        self.device, self._rows = device, group

    @classmethod
    def on_cuda(cls, shared: SharedMemory, device: torch.device) -> DeviceMemory:
        """Put rows on a CUDA device, which becomes the thread's own.

        Raises:
            CommError: the build has no CUDA kernels, or the device gives no memory to share.
        """
        try:
            torch.cuda.set_device(device)
            return cls(shared, device, DeviceGroup.on_cuda(shared._group, device.index))
        except RuntimeError as error:
            raise CommError(f"start: {device}: {error} (native)") from None

    def alloc(self, local: int, d: int, dtype: torch.dtype) -> Tensor:
        """Return zeros (local, d) that the peers read in place; each row on a cache line.

        Raises:
            CommError: the device has no room.
        """
        stride = aligned(d, dtype)
        try:
            bytes_ = self._rows.allocate(local * stride * dtype.itemsize, self._stream())
        except RuntimeError as error:
            raise CommError(f"alloc: {local} rows of {d} {dtype}: {error} (native)") from None
        memory: Tensor = bytes_  # type: ignore[assignment]  # the stub cannot name torch
        return memory.view(dtype).view(local, stride)[:, :d]

    def exchange(  # type: ignore[override]  # of the same use, not compiled
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> DeviceExchange:
        """Prepare transfers with peers of the group; contiguous tensors on the device."""
        sent, received = self._buffers(sends), self._buffers(receives)

        def run(timeout_s: float) -> int:
            return self._queue(self._rows.exchange, sent, received, timeout_s)

        return DeviceExchange(run)

    def average(
        self,
        plan: AveragePlan,
        x: Tensor,
        out: Tensor,
        axpy: tuple[float, Tensor] | None,
        rounds: int,
        timeout_s: float,
    ) -> int:
        """Queue an average over the graph; arguments, status and errors as of ``SharedMemory``."""
        size = x.itemsize
        x_stride, out_stride = self._row_stride("x", x), self._row_stride("out", out)
        a, y_at, y_stride = (0.0, 0, 0) if axpy is None else self._addend(x, *axpy)
        return self._queue(
            self._rows.average,
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
            timeout_s,
        )

    def sum(
        self, x: Tensor, out: Tensor, counts: Sequence[int], divisor: float, timeout_s: float
    ) -> int:
        """Queue the sum of all ranks' rows over ``divisor``; arguments as of ``SharedMemory``."""
        self._row_stride("out", out)
        return self._queue(
            self._rows.sum,
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
        """Queue copies of every rank's row into ``out``, in rank order; returns a status.

        Args:
            x: (local, m), of any dtype.
            out: (n, m), contiguous, of the same dtype.
            counts: rows of each process.
            timeout_s: for each wait.
        """
        blocks, x = out.split(list(counts)), x.contiguous()
        others = [p for p in range(self.processes) if p != self.process]
        exchange = self.exchange([(p, x) for p in others], [(p, blocks[p]) for p in others])
        blocks[self.process].copy_(x)
        return exchange.wait(timeout_s)

    def broadcast(self, x: Tensor | None, out: Tensor, root: int, timeout_s: float) -> int:
        """Queue copies of the row of process ``root`` into ``out``; returns a status.

        Args:
            x: (m,) or (1, m), contiguous, on the root; None on the others.
            out: (1, m), contiguous; may be ``x`` on the root.
            root: the process that has the row.
            timeout_s: for each wait.
        """
        if x is None:
            return self.exchange([], [(root, out)]).wait(timeout_s)
        others = [p for p in range(self.processes) if p != self.process]
        status = self.exchange([(p, x) for p in others], []).wait(timeout_s)
        if out.data_ptr() != x.data_ptr():
            out.copy_(x.view_as(out))
        return status

    def try_out(self, timeout_s: float) -> None:
        """Sum a row over all processes, to see that each can reach the others' memory.

        Raises:
            CommError: one cannot, or the result is wrong.
        """
        row = torch.full((1, 1024), float(self.process + 1), device=self.device)
        total = torch.empty_like(row)
        status = self.sum(row, total, [1] * self.processes, 1.0, timeout_s)
        self.check(status, "start", timeout_s)
        if self.device.type == "cuda":
            queued, deadline = torch.cuda.Event(), time.monotonic() + timeout_s
            queued.record()
            while not queued.query():
                if time.monotonic() > deadline:
                    raise CommTimeout(f"start: {self.device} did not hear from its peers (native)")
        if not bool((total == self.processes * (self.processes + 1) / 2).all()):
            raise CommError(f"start: {self.device} read wrong values from its peers (native)")

    def owns(self, x: Tensor) -> bool:
        """Say whether the peers can read ``x`` in place."""
        return bool(self._rows.owns(x.data_ptr(), x.nbytes))

    def close(self) -> None:
        """Wait until the peers have read what lies here, then tell them that this process leaves.

        Tensors from ``alloc`` stay valid.
        """
        self._rows.close()

    def _stream(self) -> int:
        if self.device.type != "cuda":
            return 0
        return torch.cuda.current_stream(self.device).cuda_stream

    def _queue(self, operation: Callable[..., int], *arguments: object) -> int:
        try:
            return operation(*arguments, self._stream())
        except RuntimeError as error:
            raise CommError(f"{self.device}: {error} (native)") from None
