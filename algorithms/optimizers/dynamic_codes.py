"""8-bit codes with a scale per block, dense where magnitudes are large (arXiv:2110.02861)."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from gossamer.runtime.native import CODED_BLOCK, Codebook, CodedMoment

__all__ = ["adam_", "codebook", "coded_adam_torch", "decode", "encode_"]


@cache
def codebook(
    signed: bool, device: torch.device | None = None, keeps_positive: bool = False
) -> Codebook:
    """Return the dynamic data type of 8 bits: 256 values from -1 (or 0, unsigned) to 1.

    For k = 0..6 the range from .1 to 1 is cut into n_k = 2^k intervals (2^(k+1), unsigned), whose
    midpoints, times 10^(k - 6), are values, with their negatives if signed; 0 and 1 are the others.

    Args:
        signed: of first moments; second moments have no negatives.
        device: of the tensors; None: the CPU.
        keeps_positive: the code of 0 is for 0 alone, not for what is nearest to it.
    """
    parts = [np.array([0.0, 1.0])]
    for k in range(7):
        edges = np.linspace(0.1, 1.0, (2**k if signed else 2 ** (k + 1)) + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (k - 6)
        parts += [middles, -middles] if signed else [middles]
    values = np.sort(np.concatenate(parts)).astype(np.float32)
    halfway = (values[1:].astype(np.float64) + values[:-1]) / 2
    bounds = np.append(halfway, np.inf).astype(np.float32)
    if keeps_positive:
        bounds[np.flatnonzero(values == 0)] = 0
    # Of the floats with the same upper half of bits, the least: for negative ones the last.
    upper = np.arange(2**16, dtype=np.uint32) << 16
    least = np.where(upper >> 31, upper | 0xFFFF, upper).astype(np.uint32).view(np.float32)
    cells = np.searchsorted(bounds[:-1], least).astype(np.uint8)
    tensors = [torch.from_numpy(array) for array in (values, bounds, cells)]
    return Codebook(*(tensor.to(device or "cpu") for tensor in tensors))


def decode(moment: CodedMoment) -> Tensor:
    """Return the vector that the codes stand for, (count,) float32."""
    count = len(moment.codes)
    scales = moment.scales.repeat_interleave(CODED_BLOCK)[:count]
    return moment.book.values[moment.codes.int()] * scales


def encode_(moment: CodedMoment, values: Tensor) -> CodedMoment:
    """Write ``values`` (count,) float32: each block's largest magnitude, and the nearest codes.

    A block of zeros has scale 0. Of two codes equally near the lower one is taken.
    """
    count, blocks = len(values), len(moment.scales)
    padded = torch.zeros(blocks * CODED_BLOCK, dtype=values.dtype, device=values.device)
    padded[:count] = values
    rows = padded.view(blocks, CODED_BLOCK)
    moment.scales.copy_(rows.abs().amax(dim=1))
    divisors = torch.where(moment.scales == 0, 1.0, moment.scales)
    places = torch.bucketize(rows / divisors[:, None], moment.book.bounds[:-1], out_int32=True)
    moment.codes.copy_(places.flatten()[:count])
    return moment


def coded_adam_torch(
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
    """``runtime.native.coded_adam`` in plain torch, on any device.

    Codes and scales are the same to the bit on the CPU; ``out`` is but for torch's root, whose last
    bit may be off.
    """
    first, second, g = decode(m), decode(v), grad.float()
    out.copy_(adam_(first, second, g, beta1=beta1, beta2=beta2, eps=eps, t=t))
    encode_(m, first)
    encode_(v, second)
    return out


def adam_(
    m: Tensor, v: Tensor, grad: Tensor, *, beta1: float, beta2: float, eps: float, t: int
) -> Tensor:
    """Move float32 moments by the t-th gradient in place; return m^ / (sqrt(v^) + eps)."""
    m.mul_(beta1).add_(grad * (1.0 - beta1))
    v.mul_(beta2).add_((grad * grad).mul_(1.0 - beta2))
    denominator = (v * (1 / (1.0 - beta2**t))).sqrt_().add_(eps)
    return (m * (1 / (1.0 - beta1**t))).div_(denominator)
