"""What an augmentation is, and what two have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from gossamer.algorithms.contrastive.draws import Draws
from gossamer.runtime.component import Component

__all__ = ["Recipe"]


class Recipe(Component, ABC):
    """Makes views of images; both are float32 with values in 0..1, or near.

    Shapes: B images, C channels, H x W pixels.
    """

    def view_size(self, height: int, width: int) -> tuple[int, int]:
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
