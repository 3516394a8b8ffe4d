"""Numbers as bytes, for messages that are shorter than the rows behind them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["from_bytes", "pack_bits", "to_bytes", "unpack_bits"]


def to_bytes(values: Tensor) -> Tensor:
    """Return the memory of (r, m) values as (r, bytes) uint8."""
    return values.contiguous().view(torch.uint8)


def from_bytes(message: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what ``to_bytes`` packed, (r, m), from any columns of a longer message."""
    # A slice of a message need not be aligned; its copy is.
    return message.clone(memory_format=torch.contiguous_format).view(dtype)


def pack_bits(codes: Tensor, width: int) -> Tensor:
    """Return integers (r, m) below 2^width as (r, ceil(m width / 8)) uint8, low bits first."""
    rows, m = codes.shape
    bits = torch.zeros(rows, -(-m * width // 8) * 8, dtype=torch.uint8, device=codes.device)
    for b in range(width):
        bits[:, b : m * width : width] = (codes >> b) & 1
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (bits.view(rows, bits.shape[1] // 8, 8) * powers).sum(dim=2, dtype=torch.uint8)


def unpack_bits(message: Tensor, m: int, width: int) -> Tensor:
    """Return the m integers of each row that ``pack_bits`` packed, int32."""
    shifts = torch.arange(8, dtype=torch.uint8, device=message.device)
    bits = ((message[:, :, None] >> shifts) & 1).flatten(1)
    codes = torch.zeros(len(message), m, dtype=torch.int32, device=message.device)
    for b in range(width):
        codes += bits[:, b : m * width : width].int() << b
    return codes
