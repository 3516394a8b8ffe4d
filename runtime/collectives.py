"""Global operations over ranks, for blocks of rows as for processes.

All are made of the transport's one primitive. Sums add in ascending rank, whatever the split of
ranks over processes: each process sums a slice of the elements over all ranks, then the slices are
gathered. The bytes counted are those of that algorithm between ranks: 2 (n-1)/n of the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from time import perf_counter
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gossamer.runtime.hosted_ranks import HostedRanks
from gossamer.runtime.native import DTYPES, Terms, weighted_sum

__all__ = ["RankGroup", "Reduction", "sum_rows"]

Reduction = Literal["sum", "mean", "min", "max"]

_SUMS = ("sum", "mean")

_DIRECT_BYTES = 64 << 10
"""A second exchange costs about as much as receiving this many bytes."""


class RankGroup(HostedRanks):
    """Collectives over the ranks of a run."""

    def all_reduce(
        self, x: Tensor, op: Reduction = "sum", *, out: Tensor | None = None, count: bool = True
    ) -> Tensor:
        """Reduce over all ranks, in ascending rank.

        Args:
            x: (local, m), rows contiguous; kept.
            op: ``sum``, ``mean`` (the sum, then divided by n), ``min`` or ``max``.
            out: (1, m), where to write; a new tensor when None. Fresh memory costs more than the
                sum when rows are large.
            count: whether the bytes are the algorithm's (False for metrics and checks).

        Returns:
            ``out``, (1, m), the same on every process; broadcasts against rows.

        Raises:
            ValueError: ``x`` is not a row per hosted rank on the device of the transport, or
                ``out`` has another shape or dtype, or is not contiguous; nothing was sent.
        """
        calls = self._calls
        if (
            calls is not None
            and out is not None
            and count
            and not self.traffic.tracing
            and op in _SUMS
        ):
            if self._last is not None:
                self._settle()
            status = calls.all_reduce(x, out, op == "mean", self.timeout_s)
            if status == 0:
                return out
            if status > 0:
                self._check(status, "all_reduce")
        m = self._width("all_reduce", x)
        _check_out("all_reduce", out, (1, m), x)
        self._count(2 * m * x.itemsize * (self.n - 1) // self.n, 2, count)
        if out is None:
            out = torch.empty(1, m, dtype=x.dtype, device=x.device)
        if op in ("min", "max"):
            rows = self._gather_rows(x, f"all_reduce({op})")
            return (torch.amin if op == "min" else torch.amax)(rows, 0, keepdim=True, out=out)
        if self._shared is not None and x.dtype in DTYPES:
            self._settle()
            divisor = float(self.n) if op == "mean" else 1.0
            begin = perf_counter()
            status = self._shared.sum(x, out, self._counts, divisor, self.timeout_s)
            self._finish(status, "all_reduce", begin)
            return out
        if self._gathers_whole(m * x.element_size()):
            blocks = self._scratch_blocks(x.contiguous())
            self._spread(dict(enumerate(blocks)), f"all_reduce({op})")
            sum_rows(blocks, out)
        else:
            self._sum_by_slices(x, out)
        return out.div_(self.n) if op == "mean" else out

    def all_gather(self, x: Tensor, *, out: Tensor | None = None, count: bool = True) -> Tensor:
        """Return every rank's row in rank order.

        Args:
            x: (local, m), any dtype; kept.
            out: (n, m), contiguous, where to write; a new tensor when None.
            count: whether the bytes are the algorithm's.

        Returns:
            ``out``.

        Raises:
            ValueError: ``x`` is not a row per hosted rank on the device of the transport, or
                ``out`` has another shape or dtype, or is not contiguous; nothing was sent.
        """
        calls = self._calls
        if calls is not None and out is not None and count and not self.traffic.tracing:
            if self._last is not None:
                self._settle()
            status = calls.all_gather(x, out, self.timeout_s)
            if status == 0:
                return out
            if status > 0:
                self._check(status, "all_gather")
        m = self._width("all_gather", x)
        _check_out("all_gather", out, (self.n, m), x)
        self._count((self.n - 1) * m * x.itemsize, self.n - 1, count)
        return self._gather_rows(x, "all_gather", out)

    def broadcast(
        self, x: Tensor, root: int = 0, *, out: Tensor | None = None, count: bool = True
    ) -> Tensor:
        """Return rank ``root``'s row on every process.

        Args:
            x: (local, m), any dtype; kept, unless it is also ``out``.
            root: the rank whose row it is.
            out: (1, m), contiguous, where to write; a new tensor when None. A process of one rank
                may pass ``x``: its row is replaced, and the root copies nothing.
            count: whether the bytes are the algorithm's.

        Returns:
            ``out``.

        Raises:
            ValueError: ``x`` is not a row per hosted rank on the device of the transport, or
                ``out`` has another shape or dtype, or is not contiguous; nothing was sent.
        """
        calls = self._calls
        if calls is not None and out is not None and count and not self.traffic.tracing:
            if self._last is not None:
                self._settle()
            status = calls.broadcast(x, root, out, self.timeout_s)
            if status == 0:
                return out
            if status > 0:
                self._check(status, "broadcast")
        m = self._width("broadcast", x)
        _check_out("broadcast", out, (1, m), x)
        if not 0 <= root < self.n:
            raise ValueError(f"broadcast: root must be a rank, 0..{self.n - 1}, got {root}")
        owner = self.placement.owner_of(root)
        if root in self.ranks and count:
            only = self._only(root - self.ranks.start)
            self.traffic.count(only, self.n - 1, m * x.itemsize * (self.n - 1))
        if out is None:
            out = torch.empty(1, m, dtype=x.dtype, device=x.device)
        where = f"broadcast from rank {root}"
        here = self.transport.process == owner
        if self._host_memory is not None:
            row = None
            if here:  # indexing costs as much as the rest of a small call
                row = (x if self.local == 1 else x[root - self.ranks.start]).contiguous()
            self._settle()
            begin = perf_counter()
            status = self._host_memory.broadcast(row, out, owner, self.timeout_s)
            self._finish(status, where, begin)
            return out
        if here:
            row = x[root - self.ranks.start].contiguous()
            self._spread({owner: row}, where)
            if out.data_ptr() != row.data_ptr():
                out[0].copy_(row)
        else:
            self._spread({owner: out[0]}, where)
        return out

    def all_to_all(self, x: Tensor, *, count: bool = True) -> Tensor:
        """Return y with ``y[i, j] = x[j, i]``: every rank's part; (local, n, m) both."""
        return self._all_to_all(x, "all_to_all", count)

    def _all_to_all(self, x: Tensor, operation: str, count: bool) -> Tensor:
        if x.dim() != 3 or x.shape[:2] != (self.local, self.n) or x.is_cpu != self._is_cpu:
            raise ValueError(
                f"all_to_all: x must be ({self.local}, {self.n}, m) on {self.device}, got "
                f"{tuple(x.shape)} on {x.device}"
            )
        local, n, m = x.shape
        self._count((n - 1) * m * x.element_size(), n - 1, count)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        sends, receives, parts = [], [], []
        for p in range(self.transport.processes):
            ranks = self.placement.ranks(p)
            columns = slice(ranks.start, ranks.stop)
            block = x[:, columns].transpose(0, 1).contiguous()  # [their rank, my rank]
            if p == self.transport.process:
                out[:, columns] = block
                continue
            part = torch.empty(local, len(ranks), m, dtype=x.dtype, device=x.device)
            sends.append((p, block))
            receives.append((p, part))
            parts.append((columns, part))
        # A peer's block arrives as [my rank, its rank].
        self._exchange(sends, receives, operation)
        for columns, part in parts:
            out[:, columns] = part
        return out

    def all_to_all_ragged(
        self, messages: Sequence[Sequence[Tensor]], *, count: bool = True
    ) -> list[list[Tensor]]:
        """Return what every rank sent to each hosted one: a message per pair, of any length.

        The lengths travel first: 8 bytes more per message, which are counted. What a rank sends to
        itself costs nothing.

        Args:
            messages: ``messages[i][j]`` goes from hosted rank i (a row) to rank j: (m_ij,)
                contiguous, of one dtype on every rank; m_ij may be 0. Kept.
            count: whether the bytes are the algorithm's.

        Returns:
            ``received[i][j]``, (m_ji,), what rank j sent to hosted rank i.

        Raises:
            ValueError: there is not one message per hosted rank and rank, or one of another dtype,
                shape or device; nothing was sent.
        """
        shape = [len(row) for row in messages]
        if shape != [self.n] * self.local:
            raise ValueError(
                f"all_to_all_ragged: needs a message to each of {self.n} ranks from each of "
                f"{self.local} hosted ones, got {shape}"
            )
        self._check_messages("all_to_all_ragged", [m for row in messages for m in row])
        lengths = torch.tensor([[len(message) for message in row] for row in messages])
        if count:
            others = torch.ones_like(lengths)
            others[range(self.local), list(self.ranks)] = 0
            sizes = others * (8 + lengths * messages[0][0].itemsize)
            self.traffic.messages_sent[:] += self.n - 1
            self.traffic.bytes_sent[:] += sizes.sum(dim=1).numpy()
        announced = lengths[..., None].to(self.device)
        coming = self._all_to_all(announced, "all_to_all_ragged", False)[..., 0].tolist()
        sends, receives, parts = [], [], []
        for p in range(self.transport.processes):
            theirs = self.placement.ranks(p)
            # A peer's block arrives as [my rank, its rank], as mine goes as [its rank, my rank].
            block = torch.cat([row[j] for j in theirs for row in messages])
            if p != self.transport.process:
                sends.append((p, block))
                block = block.new_empty(sum(sum(row[theirs.start : theirs.stop]) for row in coming))
                receives.append((p, block))
            parts.append((theirs, block))
        self._exchange(
            [(p, block) for p, block in sends if len(block)],
            [(p, block) for p, block in receives if len(block)],
            "all_to_all_ragged",
        )
        received: list[list[Tensor]] = [[] for _ in messages]
        for theirs, block in parts:
            arrived = block.split([row[j] for row in coming for j in theirs])
            for i, row in enumerate(received):
                row += arrived[i * len(theirs) : (i + 1) * len(theirs)]
        return received

    def reduce_scatter(self, x: Tensor, *, count: bool = True) -> Tensor:
        """Sum over ranks and keep one's own part: (local, n * m) -> (local, m).

        Rank i gets ``sum_j x[j, i * m:(i + 1) * m]``, added in ascending j.
        """
        local = len(x)
        if self._width("reduce_scatter", x) % self.n:
            raise ValueError(
                f"reduce_scatter: a row must have a multiple of n = {self.n} elements, got "
                f"{x.shape[1]}"
            )
        received = self._all_to_all(x.reshape(local, self.n, -1), "reduce_scatter", count)
        return torch.cat([sum_rows([part]) for part in received])

    def barrier(self) -> None:
        """Return when every process has come here."""
        self._gather_rows(torch.zeros(self.local, 1, device=self.device), "barrier")

    def agree(self, flag: bool) -> bool:
        """Return whether ``flag`` holds on every process: decide together, then act."""
        row = torch.full((self.local, 1), float(flag), device=self.device)
        return bool(self.all_reduce(row, "min", count=False).item())

    def same(self, value: int) -> bool:
        """Return whether every process passed the same integer (63 bits at most)."""
        row = torch.full((self.local, 1), value, dtype=torch.int64, device=self.device)
        rows = self._gather_rows(row, "agreement check")
        return bool((rows == rows[0]).all().item())

    def _gathers_whole(self, row_bytes: int) -> bool:
        """Say whether all rows, gathered and summed by everyone, cost less than two exchanges."""
        processes = self.transport.processes
        rows = -(-self.n // processes)  # the most a process hosts: every process decides alike
        whole = (processes - 1) * rows * row_bytes
        slices = (processes - 1) * (rows + 1) * row_bytes // processes
        return whole <= slices + _DIRECT_BYTES

    def _sum_by_slices(self, x: Tensor, out: Tensor) -> None:
        m, processes, me = x.shape[1], self.transport.processes, self.transport.process
        slices = [slice(m * p // processes, m * (p + 1) // processes) for p in range(processes)]
        mine = out[:, slices[me]]
        rows = self._swap(
            lambda p: x[:, slices[p]].contiguous(), x[:, slices[me]], "all_reduce (slices)"
        )
        sum_rows(rows, mine)
        self._spread({p: out[0, slices[p]] for p in range(processes)}, "all_reduce (gather)")


def _check_out(operation: str, out: Tensor | None, shape: tuple[int, int], x: Tensor) -> None:
    if out is None:
        return
    if out.shape != shape or out.dtype != x.dtype or not out.is_contiguous():
        raise ValueError(
            f"{operation}: out must be {shape} {x.dtype}, contiguous, got {tuple(out.shape)} "
            f"{out.dtype} with strides {out.stride()}"
        )


def sum_rows(blocks: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """Return the sum over the rows of ``blocks`` as (1, m), added from the first to the last."""
    first = blocks[0]
    if out is None:
        out = torch.empty(1, first.shape[1], dtype=first.dtype, device=first.device)
    if not first.dtype.is_floating_point:  # exact in any order
        return torch.sum(torch.cat(list(blocks)), dim=0, keepdim=True, out=out)
    return weighted_sum(blocks, _ones(sum(block.shape[0] for block in blocks)), out)


@lru_cache(maxsize=16)
def _ones(n: int) -> Terms:
    return Terms(np.array([0, n], np.int64), np.arange(n, dtype=np.int64), np.ones(n))
