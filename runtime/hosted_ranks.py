"""The ranks of a run, of which this process hosts a block, and how blocks of rows travel.

What the collectives are made of, which are made of the transport's one primitive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.runtime.native import Calls
from gossamer.runtime.placement import Placement
from gossamer.runtime.relay import relay_steps
from gossamer.runtime.shared_memory import counts_of
from gossamer.runtime.traffic import Traffic
from gossamer.runtime.transports.base import Transport
from gossamer.runtime.transports.hybrid import HybridTransport
from gossamer.runtime.work import Pending

__all__ = ["HostedRanks"]


class HostedRanks:
    """The ranks of a run, of which this process hosts a contiguous block.

    Attributes:
        n: number of ranks.
        ranks: those hosted here.
        local: how many those are.
        device: where rows live.
        transport: how bytes move.
        traffic: what was sent and how long it took.
    """

    def __init__(self, n: int, transport: Transport, *, timeout_s: float = 300.0) -> None:
        self.transport = transport
        self.placement = Placement(n, transport.processes)
        self.n = n
        self.ranks = self.placement.ranks(transport.process)
        self.local = len(self.ranks)
        self.device = transport.device
        self._is_cpu = self.device.type == "cpu"
        self.timeout_s = timeout_s
        self.traffic = Traffic(self.local)
        self.step = 0
        self._shared = transport.shared
        self._host_memory = transport.shared if self.device.type == "cpu" else None
        alone = [[p] for p in range(transport.processes)]
        hosts = transport.hosts if isinstance(transport, HybridTransport) else alone
        self._relay = relay_steps(hosts, transport.process)
        self._counts = counts_of(self.placement)
        self._each = np.ones(self.local, np.int64)
        self._only = lru_cache(maxsize=16)(
            lambda row: np.eye(1, self.local, row, dtype=np.int64)[0]
        )
        self._scratch_rows: dict[torch.dtype, Tensor] = {}
        self._calls: Calls | None = None
        if self._host_memory is not None:
            self._calls = self._host_memory.calls(self._counts)
            self.traffic.take = self._calls.take
        self._last: Pending[Any] | None = None

    def _width(self, operation: str, x: Tensor) -> int:
        """Return m of x (local, m), which the kernels believe: it is checked here."""
        if x.dim() != 2 or len(x) != self.local or x.is_cpu != self._is_cpu:
            raise ValueError(
                f"{operation}: x must be ({self.local}, m), one row per hosted rank, on "
                f"{self.device}, got {tuple(x.shape)} on {x.device}"
            )
        return x.shape[1]

    def _check_messages(self, operation: str, messages: Sequence[Tensor]) -> None:
        """Check messages of any length, before the lengths travel."""
        dtypes = {message.dtype for message in messages}
        if len(dtypes) > 1:
            raise ValueError(
                f"{operation}: messages must be of one dtype, got {sorted(map(str, dtypes))}"
            )
        for message in messages:
            if message.dim() != 1 or not message.is_contiguous() or message.is_cpu != self._is_cpu:
                raise ValueError(
                    f"{operation}: messages must be (m,), contiguous, on {self.device}, got "
                    f"{tuple(message.shape)} with strides {message.stride()} on {message.device}"
                )

    def _others(self) -> list[int]:
        """Return the other processes, starting after this one so that not all call on 0 first."""
        me, processes = self.transport.process, self.transport.processes
        return [(me + k) % processes for k in range(1, processes)]

    def _settle(self) -> None:
        """Let an operation in flight finish first; here there is none."""

    def _exchange(
        self,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Tensor]],
        operation: str,
    ) -> None:
        if not sends and not receives:
            return
        with self.traffic.span("wait", operation, self.step):
            where = f"step {self.step}: {operation}"
            self.transport.exchange(sends, receives, where).wait(self.timeout_s)

    def _finish(self, status: int, operation: str, begin: float) -> None:
        """Count the time of a call to shared memory, and raise what its status stands for."""
        self.traffic.spent("communicate", operation, self.step, begin)
        self._check(status, operation)

    def _check(self, status: int, operation: str) -> None:
        if status != 0:
            assert self._shared is not None
            self._shared.check(status, f"step {self.step}: {operation}", self.timeout_s)

    def _count(self, bytes_sent: int, messages: int, count: bool) -> None:
        if count and self.n > 1:
            self.traffic.count(self._each, messages, bytes_sent)

    def _gather_rows(self, x: Tensor, operation: str, out: Tensor | None = None) -> Tensor:
        if self.transport.processes == 1 and out is None:
            return x.clone() if operation == "all_gather" else x
        if out is None:
            out = torch.empty(self.n, x.shape[1], dtype=x.dtype, device=x.device)
        if self._host_memory is not None:
            x = x if x.stride()[1] == 1 else x.contiguous()
            self._settle()
            begin = perf_counter()
            status = self._host_memory.gather(x, out, self._counts, self.timeout_s)
            self._finish(status, operation, begin)
            return out
        x = x.contiguous()
        out[self.ranks.start : self.ranks.stop] = x
        blocks = {self.transport.process: x}
        for p in self._others():
            ranks = self.placement.ranks(p)
            blocks[p] = out[ranks.start : ranks.stop]
        self._spread(blocks, operation)
        return out

    def _spread(self, blocks: Mapping[int, Tensor], operation: str) -> None:
        """Bring blocks to every process; each crosses to another host once.

        Args:
            blocks: contiguous, by the process that has it; filled on the others.
            operation: for messages.
        """
        for sends, receives in self._relay:
            self._exchange(
                [(peer, blocks[p]) for peer, p in sends if p in blocks],
                [(peer, blocks[p]) for peer, p in receives if p in blocks],
                operation,
            )

    def _swap(self, sent: Callable[[int], Tensor], own: Tensor, operation: str) -> list[Tensor]:
        """Send ``sent(p)`` to every other process p; return all rows by process, ``own`` included.

        What was received lies in scratch: it lasts until the next call.
        """
        rows = self._scratch_blocks(own)
        others = self._others()
        sends = [(p, sent(p)) for p in others]
        self._exchange(sends, [(p, rows[p]) for p in others], operation)
        return rows

    def _scratch_blocks(self, own: Tensor) -> list[Tensor]:
        """Return scratch for every process's rows, as wide as ``own``, which is this process's."""
        blocks = [own] * self.transport.processes
        width, at = own.shape[1], 0
        scratch = self._received_rows((self.n - self.local) * width, own)
        for p in self._others():
            rows = len(self.placement.ranks(p))
            blocks[p] = scratch[at : at + rows * width].view(rows, width)
            at += rows * width
        return blocks

    def _received_rows(self, size: int, like: Tensor) -> Tensor:
        """Return ``size`` elements of scratch that is kept: fresh pages cost more than a sum."""
        kept = self._scratch_rows.get(like.dtype)
        if kept is None or len(kept) < size:
            kept = self._scratch_rows[like.dtype] = torch.empty(
                size, dtype=like.dtype, device=like.device
            )
        return kept
