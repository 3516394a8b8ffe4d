"""Products with a sparse matrix whose support is fixed: the kernels behind argument checks.

On the CPU by compiled kernels; elsewhere by torch's own operations, one scratch matrix at a time.
"""

# Shapes: N tokens, d outputs, p inputs, nnz elements of the support.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.runtime.native.compiled import _C, DTYPES, num_threads

__all__ = ["Support", "add_sparse_product", "add_sparse_product_back", "sampled_product"]

_Rows = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Support:
    """The places of a sparse matrix's elements, row by row.

    Attributes:
        shape: (d, p).
        indices: int32 (nnz,), i * p + j of each element, rising.
        starts: int32 (d + 1,), where in ``indices`` each row's elements begin.
    """

    shape: tuple[int, int]
    indices: Tensor
    starts: Tensor

    def __post_init__(self) -> None:
        """Check shapes and dtypes; what ``of`` makes is right in its values too."""
        d, p = self.shape
        if self.indices.device != self.starts.device:
            raise ValueError(
                f"Support: indices are on {self.indices.device}, starts on {self.starts.device}"
            )
        if d * p >= 2**31:
            raise ValueError(f"Support.shape: {d} x {p} elements do not fit 31 bits")
        for name, length in (("indices", None), ("starts", d + 1)):
            tensor = getattr(self, name)
            fits = length is None or len(tensor) == length
            if tensor.dtype != torch.int32 or not tensor.is_contiguous() or not fits:
                raise ValueError(
                    f"Support.{name}: must be contiguous int32 ({length or 'nnz'},), got "
                    f"{tuple(tensor.shape)} {tensor.dtype}"
                )

    @classmethod
    def of(cls, shape: tuple[int, int], indices: Tensor) -> Support:
        """Return the support of rising flat indices, any integer dtype (nnz,), in [0, d p)."""
        d, p = shape
        if len(indices) and not (
            bool((indices[1:] > indices[:-1]).all()) and indices[0] >= 0 and indices[-1] < d * p
        ):
            raise ValueError(f"Support.indices: must rise strictly within [0, {d * p})")
        edges = torch.arange(d + 1, device=indices.device) * p
        starts = torch.searchsorted(indices.long(), edges)
        return cls(shape, indices.to(torch.int32), starts.to(torch.int32))

    def __len__(self) -> int:
        return len(self.indices)

    def to(self, device: torch.device | str) -> Support:
        """Return the support on a device."""
        return Support(self.shape, self.indices.to(device), self.starts.to(device))

    def scatter_(self, dense: Tensor, values: Tensor) -> Tensor:
        """Add the values (nnz,) to ``dense`` (d, p), contiguous, in place, and return it.

        Each element has one owner, so that nothing depends on an order.
        """
        dense.view(-1).index_add_(0, self.indices, values)
        return dense

    def gather(self, dense: Tensor) -> Tensor:
        """Return the elements (nnz,) of ``dense`` (d, p), contiguous."""
        return dense.view(-1).index_select(0, self.indices)

    def sparse(self, values: Tensor) -> Tensor:
        """Return the matrix as torch's CSR tensor (d, p)."""
        columns = self.indices % self.shape[1]
        return torch.sparse_csr_tensor(self.starts, columns, values, self.shape)


def add_sparse_product(support: Support, values: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """``y += x S^T`` in place; returns y.

    Sums in float32 (float64 for float64), rounded once where they are added to y. Bits do not
    depend on the number of threads; they do on the instruction set.

    Args:
        support: of S (d, p).
        values: (nnz,), the elements of S.
        x: (N, p), rows contiguous.
        y: (N, d), rows contiguous.

    Raises:
        ValueError: shapes, dtypes, devices or memory layouts do not fit.
    """
    d, p = support.shape
    _check(support, values, ("x", x, p), ("y", y, d))
    if x.is_meta:
        return y
    if not x.is_cpu:
        y += torch.sparse.mm(support.sparse(values), x.t()).t()
    elif len(support) and len(x):
        _C.add_sparse_product(
            _tuple(support), values.data_ptr(), _rows(x), _rows(y), DTYPES[x.dtype], num_threads()
        )
    return y


def add_sparse_product_back(support: Support, values: Tensor, g: Tensor, y: Tensor) -> Tensor:
    """``y += g S`` in place, with g (N, d) and y (N, p); as ``add_sparse_product`` else."""
    d, p = support.shape
    _check(support, values, ("g", g, d), ("y", y, p))
    if g.is_meta:
        return y
    if not g.is_cpu:
        y += torch.sparse.mm(support.sparse(values).transpose(0, 1), g.t()).t()
    elif len(support) and len(g):
        _C.add_sparse_product_back(
            _tuple(support), values.data_ptr(), _rows(g), _rows(y), DTYPES[g.dtype], num_threads()
        )
    return y


def sampled_product(support: Support, g: Tensor, x: Tensor) -> Tensor:
    """Return (g^T x) at the places of the support, (nnz,), on a CPU without the matrix.

    Args:
        support: of places in (d, p).
        g: (N, d), rows contiguous.
        x: (N, p), rows contiguous.

    Raises:
        ValueError: shapes, dtypes, devices or memory layouts do not fit.
    """
    d, p = support.shape
    out = torch.zeros(len(support), dtype=x.dtype, device=x.device)
    _check(support, out, ("g", g, d), ("x", x, p))
    if x.is_meta:
        return out
    if not x.is_cpu:
        return support.gather(g.t() @ x)
    if len(support) and len(x):
        _C.sampled_product(
            _tuple(support), _rows(g), _rows(x), out.data_ptr(), DTYPES[x.dtype], num_threads()
        )
    return out


def _check(support: Support, values: Tensor, *operands: tuple[str, Tensor, int]) -> None:
    tokens = len(operands[0][1])
    if values.shape != (len(support),) or (values.stride() != (1,) and len(support) > 1):
        raise ValueError(f"values: must be contiguous ({len(support)},), got {tuple(values.shape)}")
    for name, operand, width in operands:
        if operand.shape != (tokens, width) or not _has_rows(operand):
            raise ValueError(
                f"{name}: must be ({tokens}, {width}) with contiguous rows, got "
                f"{tuple(operand.shape)} with strides {operand.stride()}"
            )
        if operand.dtype != values.dtype or operand.dtype not in DTYPES:
            raise ValueError(f"{name}: is {operand.dtype}, the values {values.dtype}")
        if operand.device != values.device or operand.device != support.indices.device:
            raise ValueError(
                f"{name}: is on {operand.device}, the values on {values.device}, the support on "
                f"{support.indices.device}"
            )


def _tuple(support: Support) -> tuple[int, int, int, int]:
    return (*support.shape, support.starts.data_ptr(), support.indices.data_ptr())


def _rows(x: Tensor) -> _Rows:
    return x.data_ptr(), len(x), x.stride(0) * x.itemsize


def _has_rows(x: Tensor) -> bool:
    return x.stride(1) == 1 or x.shape[1] == 1 or x.numel() == 0
