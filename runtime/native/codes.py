"""Adam on moments that are kept as 8-bit codes: the kernel behind argument checks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.runtime.native.compiled import _C, DTYPES, num_threads

__all__ = ["CODED_BLOCK", "Codebook", "CodedMoment", "coded_adam"]

CODED_BLOCK = _C.CODED_BLOCK
"""Elements that share a scale."""


class Codebook(NamedTuple):
    """What codes mean, and how the nearest to a number from -1 to 1 is found.

    Attributes:
        values: (256,) float32, ascending.
        bounds: (256,) float32, halfway from each value to the next; infinity at last.
        cells: (65536,) uint8, by the upper 16 bits of a float32 how many bounds are below all
            floats that begin so; one more may be among them.
    """

    values: Tensor
    bounds: Tensor
    cells: Tensor


class CodedMoment(NamedTuple):
    """A vector as codes: an element is ``book.values[code]`` times the scale of its block.

    Attributes:
        codes: (count,) uint8.
        scales: (ceil(count / CODED_BLOCK),) float32.
        book: what the codes mean.
    """

    codes: Tensor
    scales: Tensor
    book: Codebook


def _checked(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the address of a contiguous tensor on the CPU."""
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_cpu:
        raise ValueError(
            f"coded_adam: {name} must be {shape} {dtype} on the CPU, got {tuple(tensor.shape)} "
            f"{tensor.dtype} on {tensor.device}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"coded_adam: {name} must be contiguous, got strides {tensor.stride()}")
    return tensor.data_ptr()


def _moment(name: str, moment: CodedMoment, count: int) -> tuple[int, int, int, int, int]:
    book, blocks = moment.book, -(-count // CODED_BLOCK)
    return (
        _checked(f"{name}.codes", moment.codes, (count,), torch.uint8),
        _checked(f"{name}.scales", moment.scales, (blocks,), torch.float32),
        _checked(f"{name}.book.values", book.values, (256,), torch.float32),
        _checked(f"{name}.book.bounds", book.bounds, (256,), torch.float32),
        _checked(f"{name}.book.cells", book.cells, (2**16,), torch.uint8),
    )


def coded_adam(
    m: CodedMoment,
    v: CodedMoment,
    grad: Tensor,
    out: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    t: int,
) -> Tensor:
    """Move Adam's moments and write m^ / (sqrt(v^) + eps), in one pass over all of them.

    m and v, of float32, are decoded, moved, used and encoded again with the nearest codes, block by
    block. The bits do not depend on the number of threads, nor on the instruction set.

    Args:
        m: first moment, (count,); moved.
        v: second moment, likewise.
        grad: (count,) contiguous, of any dtype that rows may have, on the CPU.
        out: like ``grad``, maybe ``grad`` itself.
        beta1: share of the old first moment that stays.
        beta2: share of the old second moment that stays.
        eps: added to the root of the second moment.
        t: how many gradients went in with this one.

    Returns:
        ``out``.

    Raises:
        ValueError: shapes, dtypes, devices or memory layouts do not fit.
    """
    count = grad.numel()
    if grad.dtype not in DTYPES:
        raise ValueError(f"coded_adam: dtype {grad.dtype} is not one of {list(DTYPES)}")
    _C.coded_adam(
        _checked("grad", grad, (count,), grad.dtype),
        _checked("out", out, (count,), grad.dtype),
        count,
        DTYPES[grad.dtype],
        _moment("m", m, count),
        _moment("v", v, count),
        (beta1, 1.0 - beta1, beta2, 1.0 - beta2, 1 / (1.0 - beta1**t), 1 / (1.0 - beta2**t), eps),
        num_threads(),
    )
    return out
