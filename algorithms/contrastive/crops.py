"""Random crops that are resized: each image has a rectangle of its own."""

# Shapes: B images, C channels, H x W pixels, h x w those of the result.

from __future__ import annotations

import math

import torch
from torch import Tensor

from gossamer.algorithms.tasks.hub import load_package

__all__ = ["NUMBERS", "resized_crops", "sample_boxes"]

_TRIES = 10
NUMBERS = 2 * _TRIES + 2
"""Uniform numbers that a rectangle takes."""


def sample_boxes(
    uniforms_BK: Tensor,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Tensor:
    """Return a rectangle per image, int64 (B, 4): top, left, height, width.

    As torchvision's RandomResizedCrop: of ten draws of an area and a ratio the first one that fits,
    anywhere; where none does, the largest central rectangle whose ratio is allowed.

    Args:
        uniforms_BK: (B, NUMBERS) in (0, 1).
        height: of the images; so is ``width``.
        width: of the images.
        scale: least and greatest share of the image's area, uniform between.
        ratio: least and greatest width over height, uniform between in the logarithm.
    """
    uniforms_BK = uniforms_BK.double()  # so that no device rounds a side otherwise
    first, second = uniforms_BK[:, : 2 * _TRIES].chunk(2, dim=1)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * first)
    low, high = (math.log(r) for r in ratio)
    shape = (low + (high - low) * second).exp()
    sides = torch.stack([(area / shape).sqrt().round(), (area * shape).sqrt().round()], dim=2)
    limits = torch.tensor([height, width], dtype=torch.float64)
    fits = ((sides > 0) & (sides <= limits)).all(dim=2)
    chosen = fits.to(torch.uint8).argmax(dim=1)
    free = limits - sides[torch.arange(len(sides)), chosen]
    corner = (uniforms_BK[:, -2:] * (free + 1)).floor()
    boxes = torch.cat([corner, limits - free], dim=1).long()
    boxes[~fits.any(dim=1)] = torch.tensor(_central(height, width, ratio))
    return boxes


def resized_crops(
    images_BCHW: Tensor, boxes_B4: Tensor, size: tuple[int, int], mirrored_B: Tensor
) -> Tensor:
    """Return (B, C, h, w): each image's rectangle, interpolated linearly, mirrored where told.

    Nothing outside of a rectangle is seen. There is no filter against aliasing: a rectangle much
    larger than the result is sampled.

    Args:
        images_BCHW: floating.
        boxes_B4: as ``sample_boxes`` returns them, on the CPU.
        size: (h, w).
        mirrored_B: bool, on the CPU.
    """
    device = images_BCHW.device
    top, left, tall, wide = boxes_B4.float().to(device)[:, :, None].unbind(dim=1)
    rows = _places(size[0], tall, device) + top
    columns = _places(size[1], wide, device) + left
    columns = torch.where(mirrored_B.to(device)[:, None], columns.flip(1), columns)
    remap = load_package("kornia.geometry.transform", "contrastive").remap
    shape = (len(boxes_B4), *size)
    result: Tensor = remap(
        images_BCHW,
        columns[:, None, :].expand(shape),
        rows[:, :, None].expand(shape),
        padding_mode="border",
        align_corners=True,  # with it alone pixel k is read at k
    )
    return result


def _places(count: int, length_B1: Tensor, device: torch.device) -> Tensor:
    """Return where ``count`` pixels' centres lie among so many others, (B, count)."""
    centres = torch.arange(count, device=device) + 0.5
    return (centres * (length_B1 / count) - 0.5).clamp_min(0).minimum(length_B1 - 1)


def _central(height: int, width: int, ratio: tuple[float, float]) -> list[int]:
    tall, wide = height, width
    if width / height < ratio[0]:
        tall = round(width / ratio[0])
    elif width / height > ratio[1]:
        wide = round(height * ratio[1])
    return [(height - tall) // 2, (width - wide) // 2, tall, wide]
