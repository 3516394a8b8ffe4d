"""The collectives of torch.distributed over shared memory, on flat contiguous CPU tensors.

Sums and means of floating-point tensors are the compiled kernels': terms in ascending rank, the
same bits on every rank and as on every transport. Other reductions combine in the same order.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gossamer.runtime.collectives import sum_rows
from gossamer.runtime.native import DTYPES
from gossamer.runtime.shared_memory import SharedMemory

__all__ = ["Collectives"]

_DIRECT_BYTES = 64 << 10
"""Up to here every rank gathers all tensors whole: a second exchange costs more."""

_WHOLE_BYTES = 1 << 20
"""Up to here a row is staged once for all peers; larger ones go in pieces, as they are private."""

_Op: Any = dist.ReduceOp.RedOpType  # its members have no types
_OPERATORS: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    _Op.SUM: torch.add,
    _Op.AVG: torch.add,
    _Op.PREMUL_SUM: torch.add,
    _Op.PRODUCT: torch.mul,
    _Op.MIN: torch.minimum,
    _Op.MAX: torch.maximum,
    _Op.BAND: operator.and_,
    _Op.BOR: operator.or_,
    _Op.BXOR: operator.xor,
}
_SUMS = (_Op.SUM, _Op.AVG, _Op.PREMUL_SUM)


class Collectives:
    """One process's calls; every process makes the same ones in the same order.

    All raise CommTimeout, PeerLost or CommError, naming peer and operation; the first failure is
    final.
    """

    def __init__(self, shared: SharedMemory) -> None:
        self._shared = shared
        self.rank, self.size = shared.process, shared.processes
        # Starting after this process so that not all call on the first one.
        self._others = [(self.rank + k) % self.size for k in range(1, self.size)]

    def all_reduce(self, x: Tensor, op: Any, operation: str, timeout_s: float) -> None:
        """Reduce ``x`` of all ranks, in place."""
        if op.op == _Op.PREMUL_SUM:
            x.mul_(op.factor)
        if op.op in _SUMS and x.dtype in DTYPES:
            divisor = float(self.size if op.op == _Op.AVG else 1)
            row = x[None]
            status = self._shared.sum(row, row, [1] * self.size, divisor, timeout_s)
            self._shared.check(status, operation, timeout_s)
            return
        if x.nbytes <= _DIRECT_BYTES:
            rows = list(x.new_empty(self.size, len(x)))
            self.all_gather(rows, x, operation, timeout_s)
            self._reduce(rows, op.op, x)
            return
        parts = list(x.tensor_split(self.size))
        self._reduce_scatter(parts[self.rank], parts, op.op, operation, timeout_s)
        self.all_gather(parts, parts[self.rank], operation, timeout_s)

    def reduce(self, x: Tensor, root: int, op: Any, operation: str, timeout_s: float) -> None:
        """Reduce ``x`` of all ranks, in place on rank ``root``."""
        self._check(operation, root)
        if op.op == _Op.PREMUL_SUM:
            x.mul_(op.factor)
        rows = list(x.new_empty(self.size, len(x))) if self.rank == root else []
        self.gather(rows, x, root, operation, timeout_s)
        if self.rank == root:
            self._reduce(rows, op.op, x)

    def reduce_scatter(
        self, out: Tensor, parts: Sequence[Tensor], op: Any, operation: str, timeout_s: float
    ) -> None:
        """Reduce part i of all ranks into ``out`` of rank i; ``out`` may be this rank's part."""
        self._check(operation, 0, out, *parts)
        if op.op == _Op.PREMUL_SUM:
            parts = [part * op.factor for part in parts]
        self._reduce_scatter(out, parts, op.op, operation, timeout_s)

    def _reduce_scatter(
        self, out: Tensor, parts: Sequence[Tensor], kind: Any, operation: str, timeout_s: float
    ) -> None:
        rows = list(out.new_empty(self.size, len(out)))
        rows[self.rank] = parts[self.rank]
        self._exchange(
            [(p, parts[p]) for p in self._others],
            [(p, rows[p]) for p in self._others],
            operation,
            timeout_s,
        )
        self._reduce(rows, kind, out)

    def broadcast(self, x: Tensor, root: int, operation: str, timeout_s: float) -> None:
        """Copy rank ``root``'s ``x`` into everyone's."""
        self._check(operation, root)
        if x.nbytes <= _WHOLE_BYTES:
            own = x if self.rank == root else None
            status = self._shared.broadcast(own, x[None], root, timeout_s)
            self._shared.check(status, operation, timeout_s)
        elif self.rank == root:
            self._exchange([(p, x) for p in self._others], [], operation, timeout_s)
        else:
            self._exchange([], [(root, x)], operation, timeout_s)

    def all_gather(
        self, outs: Sequence[Tensor], x: Tensor, operation: str, timeout_s: float
    ) -> None:
        """Copy rank i's ``x`` into ``outs[i]``; lengths may differ between ranks."""
        self._check(operation, 0, x, *outs)
        self._exchange(
            [(p, x) for p in self._others],
            [(p, outs[p]) for p in self._others],
            operation,
            timeout_s,
        )
        _copy(outs[self.rank], x)

    def all_gather_single(self, out: Tensor, x: Tensor, operation: str, timeout_s: float) -> None:
        """Copy rank i's ``x`` into part i of ``out``; ``x`` may be this rank's part."""
        self._check(operation, 0, x, out)
        if out.numel() != self.size * x.numel():
            raise ValueError(
                f"{operation}: {out.numel()} elements for {self.size} times {x.numel()} (gossamer)"
            )
        rows = out.view(self.size, -1) if len(x) else out.new_empty(self.size, 0)
        if x.nbytes <= _WHOLE_BYTES:
            status = self._shared.gather(x[None], rows, [1] * self.size, timeout_s)
            self._shared.check(status, operation, timeout_s)
        else:
            self.all_gather(list(rows), x, operation, timeout_s)

    def gather(
        self, outs: Sequence[Tensor], x: Tensor, root: int, operation: str, timeout_s: float
    ) -> None:
        """As ``all_gather``, on rank ``root`` alone."""
        self._check(operation, root, x, *outs)
        if self.rank != root:
            self._exchange([(root, x)], [], operation, timeout_s)
            return
        self._exchange([], [(p, outs[p]) for p in self._others], operation, timeout_s)
        _copy(outs[root], x)

    def scatter(
        self, out: Tensor, parts: Sequence[Tensor], root: int, operation: str, timeout_s: float
    ) -> None:
        """Copy rank ``root``'s part i into ``out`` of rank i."""
        self._check(operation, root, out, *parts)
        if self.rank != root:
            self._exchange([], [(root, out)], operation, timeout_s)
            return
        self._exchange([(p, parts[p]) for p in self._others], [], operation, timeout_s)
        _copy(out, parts[root])

    def all_to_all(
        self, outs: Sequence[Tensor], parts: Sequence[Tensor], operation: str, timeout_s: float
    ) -> None:
        """Copy rank i's part j into ``outs[i]`` of rank j; lengths may differ."""
        self._check(operation, 0, *outs, *parts)
        self._exchange(
            [(p, parts[p]) for p in self._others],
            [(p, outs[p]) for p in self._others],
            operation,
            timeout_s,
        )
        _copy(outs[self.rank], parts[self.rank])

    def barrier(self, operation: str, timeout_s: float) -> None:
        """Return when every rank has come here."""
        nothing = torch.empty(0)
        self._exchange(
            [(p, nothing) for p in self._others],
            [(p, nothing) for p in self._others],
            operation,
            timeout_s,
        )

    def close(self) -> None:
        """Leave the group; may be called twice."""
        self._shared.close()

    def _check(self, operation: str, root: int, *tensors: Tensor) -> None:
        """Refuse what the kernels would take for memory that is not there; nothing was sent."""
        if not 0 <= root < self.size:
            raise ValueError(f"{operation}: there is no rank {root} in a group of {self.size}")
        kinds = {(t.dtype, t.device) for t in tensors}
        if len(kinds) > 1:
            found = " and ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
            raise ValueError(
                f"{operation}: inputs and outputs must have one dtype and device, got {found}"
            )

    def _exchange(
        self,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Tensor]],
        operation: str,
        timeout_s: float,
    ) -> None:
        if self.size > 1:
            exchange = self._shared.exchange(sends, receives)
            self._shared.check(exchange.wait(timeout_s), operation, timeout_s)

    def _reduce(self, rows: Sequence[Tensor], kind: Any, out: Tensor) -> None:
        """Combine one tensor of each rank, in ascending rank, into ``out``."""
        if kind in _SUMS and out.dtype in DTYPES:
            sum_rows([row[None] for row in rows], out[None])
            if kind == _Op.AVG:
                out.div_(self.size)
            return
        total = reduce(_OPERATORS[kind], rows)
        _copy(out, total.div(self.size, rounding_mode="trunc") if kind == _Op.AVG else total)


def _copy(out: Tensor, x: Tensor) -> None:
    if out.data_ptr() != x.data_ptr():
        out.copy_(x)
