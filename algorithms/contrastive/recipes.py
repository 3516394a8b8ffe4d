"""Augmentations: how a view is made of an image, from counted numbers of that image alone."""

# Shapes: B images, C channels, H x W pixels.

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field
from torch import Tensor

from gossamer.algorithms.contrastive.crops import NUMBERS, resized_crops, sample_boxes
from gossamer.algorithms.contrastive.draws import Draws
from gossamer.algorithms.contrastive.recipe import Recipe
from gossamer.algorithms.tasks.hub import load_package
from gossamer.runtime.component import named
from gossamer.runtime.errors import ConfigError

__all__ = ["STL10", "Digits", "ImageNet100", "RecipeField", "SimCLR"]

Amount = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Strengths = Annotated[
    tuple[Amount, Amount, Amount, Annotated[float, Field(ge=0, le=0.5)]],
    Field(
        description="Strength of brightness, contrast, saturation (factors from 1 - s, or 0, to "
        "1 + s) and hue (a turn by -s to s of the circle), in an order drawn for each image, as "
        "torchvision's ColorJitter. Images of one channel have no saturation and no hue."
    ),
]


def _ascending(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError("must be the least and the greatest value")
    return ends


Between = Annotated[tuple[Positive, Positive], AfterValidator(_ascending)]


class Digits(Recipe):
    """For small gray images: a shift by whole pixels, a gain, and noise; needs no package."""

    name: Literal["digits"] = "digits"
    shift: int = Field(default=1, ge=0, strict=True)
    """Most pixels of the shift along each axis; what comes in is black."""
    gain: Annotated[tuple[Amount, Amount], AfterValidator(_ascending)] = (0.7, 1.3)
    """Lowest and highest factor on the image."""
    noise: Amount = 0.1
    """Deviation of the normal noise on each pixel."""

    def augment(self, images_BCHW: Tensor, draws: Draws) -> Tensor:
        """Return gain * shifted + noise, not clamped."""
        device, (low, high) = images_BCHW.device, self.gain
        uniforms_B3 = draws.uniforms(3).to(device)
        by_B2 = (uniforms_B3[:, :2] * (2 * self.shift + 1)).long() - self.shift
        gain_B = low + (high - low) * uniforms_B3[:, 2]
        noise = draws.normals(images_BCHW.shape[1:].numel()).to(device).view_as(images_BCHW)
        moved = _shifted(images_BCHW, by_B2, self.shift)
        return moved * gain_B[:, None, None, None] + self.noise * noise


class _Photographs(Recipe):
    """A crop that is resized, a mirror, colors, gray, and a blur, each by chance."""

    size: int = Field(default=0, ge=0, strict=True)
    """Pixels of a view's sides; 0: the image's own."""
    scale: Annotated[tuple[Share, Share], AfterValidator(_ascending)] = (0.08, 1.0)
    """Least and greatest share of the image's area that a crop keeps."""
    ratio: Between = (3 / 4, 4 / 3)
    """Least and greatest width over height of a crop."""
    mirror: Share = 0.5
    """Probability of exchanging left and right."""
    jitter: Strengths
    jitter_probability: Share = 0.8
    """Of changing colors at all."""
    gray: Share = 0.2
    """Probability of making it gray."""
    blur: Between = (0.1, 2.0)
    """Least and greatest deviation of the Gaussian blur, in pixels."""
    blur_probability: Share = 1.0
    """Of blurring it."""

    def view_size(self, height: int, width: int) -> tuple[int, int]:
        """Return (size, size), or the images' own."""
        return (self.size, self.size) if self.size else (height, width)

    def require(self, channels: int, height: int, width: int) -> None:
        """Check for the package, and for color or gray images."""
        load_package("kornia", "contrastive")
        if channels not in (1, 3):
            raise ConfigError(
                f"task.views.recipe: takes images of 1 or 3 channels, got {channels}; convert them"
            )

    def augment(self, images_BCHW: Tensor, draws: Draws) -> Tensor:
        """Return views of the size ``view_size``, in 0..1."""
        parts = [NUMBERS, 1, 1, 4, 4, 1, 1, 1]
        numbers = draws.uniforms(sum(parts)).split(parts, dim=1)
        crop, mirror, jittered, amounts, order, gray, blurred, deviation = numbers
        height, width = images_BCHW.shape[-2:]
        boxes = sample_boxes(crop, height, width, self.scale, self.ratio)
        size = self.view_size(height, width)
        views = resized_crops(images_BCHW, boxes, size, mirror[:, 0] < self.mirror)
        self._jitter_(views, jittered[:, 0] < self.jitter_probability, amounts, order)
        if views.shape[1] == 3:
            _change_(views, gray[:, 0] < self.gray, _gray)
        deviation = self.blur[0] + (self.blur[1] - self.blur[0]) * deviation
        _change_(views, blurred[:, 0] < self.blur_probability, self._blurred, deviation)
        return views

    def plain(self, images_BCHW: Tensor) -> Tensor:
        """Return the images resized, with a filter against aliasing."""
        size = self.view_size(*images_BCHW.shape[-2:])
        if images_BCHW.shape[-2:] == size:
            return images_BCHW
        return F.interpolate(images_BCHW, size, mode="bilinear", antialias=True)

    def _jitter_(
        self, views: Tensor, jittered_B: Tensor, numbers_B4: Tensor, order: Tensor
    ) -> None:
        """Change colors in place; of each image the change that ``order`` ranks k-th comes k-th."""
        enhance = load_package("kornia.enhance", "contrastive")
        strength = torch.tensor(self.jitter)
        low = (1 - strength).clamp_min(0)
        factors_B4 = low + (1 + strength - low) * numbers_B4
        factors_B4[:, 3] = (2 * numbers_B4[:, 3] - 1) * strength[3] * (2 * math.pi)  # an angle
        changes = [
            enhance.adjust_brightness_accumulative,
            enhance.adjust_contrast_with_mean_subtraction,
            enhance.adjust_saturation_with_gray_subtraction,
            enhance.adjust_hue,
        ]
        colors = changes if views.shape[1] == 3 else changes[:2]
        ranked_B4 = order.argsort(dim=1)
        for turn in range(4):
            for k, change in enumerate(colors):
                if self.jitter[k] > 0:
                    now_B = jittered_B & (ranked_B4[:, turn] == k)
                    _change_(views, now_B, change, factors_B4[:, k])

    def _blurred(self, views: Tensor, deviation_B1: Tensor) -> Tensor:
        """Return them blurred, by a kernel of three deviations where the image is as wide."""
        kernel = load_package("kornia.filters", "contrastive").get_gaussian_kernel1d
        reach = min(math.ceil(3 * self.blur[1]), min(views.shape[-2:]) - 1)
        weights_BK = kernel(2 * reach + 1, deviation_B1)
        # Term by term: the bits of a convolution depend on how many images it takes at once.
        for dim, pad in ((3, (reach, reach, 0, 0)), (2, (0, 0, reach, reach))):
            padded, views = F.pad(views, pad, mode="reflect"), torch.zeros_like(views)
            for k in range(2 * reach + 1):
                weight = weights_BK[:, k, None, None, None]
                views.addcmul_(padded.narrow(dim, k, views.shape[dim]), weight)
        return views


class SimCLR(_Photographs):
    """That of SimCLR (arXiv:2002.05709)."""

    name: Literal["simclr"] = "simclr"
    jitter: Strengths = (0.8, 0.8, 0.8, 0.2)
    blur_probability: Share = 0.5
    """Of blurring it."""


class STL10(_Photographs):
    """That of arXiv:2404.10575 for STL-10."""

    name: Literal["stl10"] = "stl10"
    size: int = Field(default=96, ge=0, strict=True)
    """Pixels of a view's sides; 0: the image's own."""
    jitter: Strengths = (0.8, 0.8, 0.8, 0.2)


class ImageNet100(_Photographs):
    """That of arXiv:2404.10575 for 100 classes of ImageNet."""

    name: Literal["imagenet100"] = "imagenet100"
    size: int = Field(default=224, ge=0, strict=True)
    """Pixels of a view's sides; 0: the image's own."""
    jitter: Strengths = (0.4, 0.4, 0.2, 0.1)


_RECIPES: dict[str, type[Recipe]] = {
    "digits": Digits,
    "simclr": SimCLR,
    "stl10": STL10,
    "imagenet100": ImageNet100,
}

RecipeField = Annotated[
    Digits | SimCLR | STL10 | ImageNet100,
    named(_RECIPES, "task.views.recipe"),
]
"""A recipe: its name, or a section with a name and fields."""


def _change_(
    views: Tensor, chosen_B: Tensor, change: Callable[..., Tensor], amount_B: Tensor | None = None
) -> None:
    """Replace some views by what ``change`` makes of them.

    Args:
        views: (B, C, H, W).
        chosen_B: bool, on the CPU: which.
        change: takes those, and their amounts where there are some.
        amount_B: (B, ...), on the CPU.
    """
    places = chosen_B.nonzero()[:, 0]
    if len(places):
        there = places.to(views.device)
        amounts = () if amount_B is None else (amount_B[places].to(views.device),)
        views[there] = change(views[there], *amounts)


def _gray(views: Tensor) -> Tensor:
    gray: Tensor = load_package("kornia.color", "contrastive").rgb_to_grayscale(views)
    return gray.expand_as(views)


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
