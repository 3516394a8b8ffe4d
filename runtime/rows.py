"""Flat rows: a module's parameters as one contiguous row, and arithmetic on blocks of rows.

Every state array of an algorithm is (local, d), one row per rank hosted by this process. What is
written with plain torch must be elementwise and singly rounded (+, -, *, /, sqrt) or come from
here, so that the bits of a row do not depend on how many rows stand together.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.runtime import native
from gossamer.runtime.native import ALIGNMENT, row_dot

__all__ = [
    "RowLayout",
    "Slice",
    "aligned",
    "combine",
    "empty_rows",
    "row_dot",
    "row_norm",
    "rows_overlap",
]

Coefficient = float | Tensor

_MAPPED_BYTES = 32 << 20
"""Above this glibc's malloc maps fresh pages each time, too; below, it has some to use again."""


def aligned(count: int, dtype: torch.dtype) -> int:
    """Return ``count`` elements rounded up to a multiple of 64 bytes."""
    per = ALIGNMENT // dtype.itemsize
    return -(-count // per) * per


def empty_rows(local: int, d: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Return zeros (local, d) whose rows each start at a multiple of 64 bytes."""
    stride = aligned(d, dtype)
    size = local * stride * dtype.itemsize
    if size > _MAPPED_BYTES and torch.device(device).type == "cpu":
        # torch.zeros writes them: a module that moves into a row would be there twice.
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(pages, dtype=torch.uint8).view(dtype).view(local, stride)[:, :d]
    return torch.zeros(local, stride, dtype=dtype, device=device)[:, :d]


def combine(terms: Sequence[tuple[Coefficient, Tensor]], out: Tensor | None = None) -> Tensor:
    """Return ``sum_k c_k * v_k`` over rows, in one pass, added in the order given.

    Args:
        terms: pairs (c, v): v is (local, d); c a number, or one number per row as (local, 1).
        out: where to write, may be one of the v; a new tensor when None.

    Returns:
        ``out``, (local, d).
    """
    rows = [v for _, v in terms]
    local, d = rows[0].shape
    if out is None:
        out = empty_rows(local, d, rows[0].dtype, rows[0].device)
    if any(isinstance(c, Tensor) for c, _ in terms):
        weights = np.empty((local, len(terms)))
        for k, (c, _) in enumerate(terms):
            weights[:, k] = c.reshape(-1).double().cpu().numpy() if isinstance(c, Tensor) else c
        return native.combine(rows, weights.reshape(-1), out)
    return native.combine(rows, np.array([c for c, _ in terms], np.float64), out)


def rows_overlap(a: Tensor, b: Tensor) -> bool:
    """Say whether two blocks of rows share memory, the room between their rows included."""
    begin_a, begin_b = a.data_ptr(), b.data_ptr()
    return begin_a < begin_b + _extent(b) and begin_b < begin_a + _extent(a)


def _extent(rows: Tensor) -> int:
    """Return the bytes from the first element to the end of the last."""
    return ((len(rows) - 1) * rows.stride(0) + rows.shape[1]) * rows.itemsize


def row_norm(x: Tensor) -> Tensor:
    """Return the Euclidean norm of each row of (local, d) as (local, 1) float64.

    Accumulated in float64, so that it neither overflows nor underflows for float32 rows.
    """
    return row_dot(x, x).sqrt_()


@dataclass(frozen=True)
class Slice:
    """Where one parameter lies in the row.

    Attributes:
        name: its first name in ``named_parameters()``.
        tensor: its place among the trainable tensors; the random kernels count by it.
        begin: first element in the row, a multiple of 64 bytes.
        shape: the parameter's shape.
    """

    name: str
    tensor: int
    begin: int
    shape: torch.Size

    @property
    def end(self) -> int:
        """One past the last element."""
        return self.begin + self.shape.numel()


class RowLayout:
    """The map from a module's trainable parameters to slices of one row.

    Tied parameters appear once; frozen ones (``requires_grad=False``) are left where they are.

    Attributes:
        slices: one per parameter, in the order of ``named_parameters()``.
        d: length of a row, padding included (every slice starts at a multiple of 64 bytes);
            padding is zero and stays zero under linear operations.
        size: number of parameters, padding excluded.
        dtype: of every parameter.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype | None = None) -> None:
        """Lay out ``module``; with ``dtype`` only the parameters of that dtype.

        Raises:
            ValueError: nothing to train, or the parameters have several dtypes and none was named.
        """
        chosen = [
            (name, p)
            for name, p in module.named_parameters()
            if p.requires_grad and (dtype is None or p.dtype == dtype)
        ]
        if not chosen:
            raise ValueError("module: no trainable parameter; unfreeze some (requires_grad=True)")
        dtypes = sorted({str(p.dtype) for _, p in chosen})
        if len(dtypes) > 1:
            raise ValueError(f"module: parameters have dtypes {dtypes}; use one row per dtype")
        self.dtype = chosen[0][1].dtype
        self.slices: list[Slice] = []
        begin = 0
        for tensor, (name, p) in enumerate(chosen):
            self.slices.append(Slice(name, tensor, begin, p.shape))
            begin += aligned(p.numel(), self.dtype)
        self.d = begin
        self.size = sum(s.shape.numel() for s in self.slices)

    def views(self, row: Tensor) -> Iterator[Tensor]:
        """Yield the parameters as views of ``row`` (d,), in the order of ``slices``."""
        for s in self.slices:
            yield row[s.begin : s.end].view(s.shape)

    def gather(self, module: nn.Module, row: Tensor) -> Tensor:
        """Copy the module's parameters into ``row`` (d,) and return it; padding becomes zero."""
        row.zero_()
        for view, p in zip(self.views(row), self.parameters(module), strict=True):
            view.copy_(p.detach())
        return row

    def adopt(self, module: nn.Module, row: Tensor) -> Tensor:
        """Move the module's parameters into ``row`` (d,), of which they are views from now on.

        Their own memory is given back one by one: a large module need not fit in twice.
        """
        done = 0
        for s, p in zip(self.slices, self.parameters(module), strict=True):
            row[done : s.begin].zero_()
            done = s.end
            view = row[s.begin : s.end].view(s.shape)
            p.data = view.copy_(p.detach())
        row[done:].zero_()
        return row

    def bind(self, module: nn.Module, row: Tensor, grad: Tensor | None = None) -> None:
        """Make the module's parameters views of ``row``, and their gradients of ``grad``."""
        grads = self.views(grad) if grad is not None else iter([None] * len(self.slices))
        for view, g, p in zip(self.views(row), grads, self.parameters(module), strict=True):
            p.data = view
            p.grad = g

    def parameters(self, module: nn.Module) -> list[nn.Parameter]:
        """Return the module's parameters in the order of ``slices``."""
        by_name = dict(module.named_parameters())
        return [by_name[s.name] for s in self.slices]

    def values(self, row: Tensor) -> Tensor:
        """Return the parameters of ``row`` (d,) without padding, (size,)."""
        return torch.cat([row[s.begin : s.end] for s in self.slices])

    def digest(self, row: Tensor) -> bytes:
        """Return the SHA-256 of the parameters of ``row`` (d,), padding skipped."""
        state = hashlib.sha256()
        for s in self.slices:
            values = row[s.begin : s.end].detach().cpu().contiguous()
            state.update(values.view(torch.uint8).numpy().data)
        return state.digest()
