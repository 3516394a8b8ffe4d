"""Augmentations: how a view is made of an image, from counted numbers of that image alone."""

# Shapes: B images, C channels, H x W pixels.

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from gossamer.algorithms.contrastive.draws import Draws
from gossamer.runtime.component import Component

__all__ = ["Digits", "Recipe"]

Amount = Annotated[float, Field(ge=0)]


class Recipe(Component, ABC):
    """Makes views of images; both are float32 with values in 0..1, or near."""

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the views of such images."""
        return height, width

    def require(self, channels: int, height: int, width: int) -> None:
        """Check that it can make views of such images.

        Raises:
            ConfigError: a package is missing, or the images do not fit.
        """

    @abstractmethod
    def augment(self, images_BCHW: Tensor, draws: Draws) -> Tensor:
        """Return views; each depends on its image and its numbers alone."""

    def plain(self, images_BCHW: Tensor) -> Tensor:
        """Return the images as they are, in the size of views."""
        return images_BCHW


class Digits(Recipe):
    """For small gray images: a shift by whole pixels, a gain, and noise; needs no package."""

    name: Literal["digits"] = "digits"
    shift: int = Field(default=1, ge=0, strict=True)
    """Most pixels of the shift along each axis; what comes in is black."""
    gain: tuple[Amount, Amount] = (0.7, 1.3)
    """Lowest and highest factor on the image."""
    noise: Amount = 0.1
    """Deviation of the normal noise on each pixel."""

    def augment(self, images_BCHW: Tensor, draws: Draws) -> Tensor:
        """Return gain * shifted + noise, not clamped."""
        device, (low, high) = images_BCHW.device, self.gain
        uniforms_B3 = draws.uniforms(3).to(device)
        by_B2 = (uniforms_B3[:, :2] * (2 * self.shift + 1)).long() - self.shift
        gain_B = low + (high - low) * uniforms_B3[:, 2]
        noise = draws.normals(images_BCHW[0].numel()).to(device).view_as(images_BCHW)
        moved = _shifted(images_BCHW, by_B2, self.shift)
        return moved * gain_B[:, None, None, None] + self.noise * noise


def _shifted(images_BCHW: Tensor, by_B2: Tensor, most: int) -> Tensor:
    """Return images moved down and right by so many pixels, black where nothing was."""
    b, c, height, width = images_BCHW.shape
    device = images_BCHW.device
    padded = F.pad(images_BCHW, (most,) * 4)
    rows = torch.arange(height, device=device) + most - by_B2[:, :1]
    columns = torch.arange(width, device=device) + most - by_B2[:, 1:]
    return padded[
        torch.arange(b, device=device)[:, None, None, None],
        torch.arange(c, device=device)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]
