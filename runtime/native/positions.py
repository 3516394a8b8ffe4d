"""Sums over the positions of single examples: the kernels behind argument checks."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.runtime.native.compiled import _C, num_threads

__all__ = ["gram_roundings", "normal_sums", "outer_squares", "position_sums", "takes_positions"]

_Positions = tuple[int, int, int, int, int, int]


def takes_positions(*tensors: Tensor) -> bool:
    """Say whether the functions here take the tensors: float32 on the CPU, elements side by side.

    They are (m, t, width): m examples of t positions.
    """
    return all(
        t.is_cpu and t.dtype == torch.float32 and (t.stride(2) == 1 or t.shape[2] == 1)
        for t in tensors
    )


def _positions(name: str, values: Tensor) -> _Positions:
    """Return (address, examples, positions, width, bytes between examples, between positions)."""
    if values.dim() != 3 or not takes_positions(values):
        raise ValueError(
            f"{name}: must be (m, t, width) float32 on the CPU, the elements of a position side by "
            f"side, got {tuple(values.shape)} {values.dtype} on {values.device} with strides "
            f"{values.stride()}"
        )
    examples, positions, width = values.shape
    per_example, per_position = (4 * stride for stride in values.stride()[:2])
    return values.data_ptr(), examples, positions, width, per_example, per_position


def outer_squares(a: Tensor, e: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Return |sum_t e_t a_t^T|^2 and sum_t |a_t| |e_t| of each example, by Gram matrices.

    The square is sum_st <a_s, a_t> <e_s, e_t>. A product in an inner product of k elements is
    rounded to float32 ``gram_roundings(k)`` times at most, in all sums; everything else is
    float64. An example's bits depend on that example alone, and on the instruction set.

    Args:
        a: (m, t, p) float32 on the CPU, the elements of a position side by side.
        e: (m, t, q), likewise.
        floor: |a_t| and |e_t| count as this much at least.

    Returns:
        (m,) float64, twice.

    Raises:
        ValueError: shapes, dtypes, devices or memory layouts do not fit.
    """
    left, right = _positions("outer_squares: a", a), _positions("outer_squares: e", e)
    if a.shape[:2] != e.shape[:2]:
        raise ValueError(f"outer_squares: a is {tuple(a.shape)}, e {tuple(e.shape)}")
    out = torch.empty(len(a), 2, dtype=torch.float64)
    _C.outer_squares(left, right, floor, out.data_ptr(), num_threads())
    return out[:, 0], out[:, 1]


def gram_roundings(width: int) -> int:
    """Return how often at most ``outer_squares`` rounds a product of elements of ``width``."""
    return _C.gram_roundings(width)


def position_sums(e: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum_t e_t and sum_t |e_t| of each example, reading it once.

    Positions are added in order, in float32; of lengths only the sum is float64.

    Args:
        e: (m, t, width) float32 on the CPU, the elements of a position side by side.

    Returns:
        (m, width) float32 and (m,) float64.

    Raises:
        ValueError: the dtype, device or memory layout does not fit.
    """
    of = _positions("position_sums: e", e)
    sums, masses = torch.empty(len(e), e.shape[2]), torch.empty(len(e), dtype=torch.float64)
    _C.position_sums(of, sums.data_ptr(), masses.data_ptr(), num_threads())
    return sums, masses


def normal_sums(
    a: Tensor, e: Tensor, *, eps: float, centred: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return ``position_sums`` of e_t n_t, elementwise, and of e_t, reading each once.

    n_t = (a_t - mean) / sqrt(variance + eps), over the elements of a position: the gradients of
    the scale and the shift of torch's LayerNorm, or of RMSNorm where the mean counts as 0.

    Args:
        a: (m, t, width) float32 on the CPU, the elements of a position side by side: what went in.
        e: likewise, the gradient of what came out.
        eps: added to the variance.
        centred: take the mean off.

    Returns:
        The sums (m, width) float32 and masses (m,) float64 of the scale, and of the shift.

    Raises:
        ValueError: shapes, dtypes, devices or memory layouts do not fit.
    """
    left, right = _positions("normal_sums: a", a), _positions("normal_sums: e", e)
    if a.shape != e.shape:
        raise ValueError(f"normal_sums: a is {tuple(a.shape)}, e {tuple(e.shape)}")
    scale, shift = torch.empty(2, len(e), e.shape[2])
    masses = torch.empty(2, len(e), dtype=torch.float64)
    _C.normal_sums(
        left,
        right,
        eps,
        centred,
        scale.data_ptr(),
        shift.data_ptr(),
        masses[0].data_ptr(),
        masses[1].data_ptr(),
        num_threads(),
    )
    return (scale, masses[0]), (shift, masses[1])
