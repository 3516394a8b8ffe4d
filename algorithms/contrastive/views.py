"""Two views of an example: augmentations of an image, fresh or fixed, or the sides of a pair."""

# Shapes: N examples, B images, C channels, H x W pixels.

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from gossamer.algorithms.contrastive.contrast import unit
from gossamer.algorithms.contrastive.draws import Draws
from gossamer.algorithms.contrastive.encoders import Projected
from gossamer.algorithms.contrastive.recipe import Recipe
from gossamer.algorithms.contrastive.text_encoders import PairModule
from gossamer.algorithms.problems import Dataset
from gossamer.runtime.random import Random

__all__ = ["ImageViews", "PairViews"]

_KEPT_BYTES = 256 << 20
"""Fixed views are kept where they take no more; else they are made anew at each visit."""
_CHUNK = 512


@dataclass
class ImageViews:
    """Views of the images of a dataset (a ``Contrast``).

    Attributes:
        mode: ``infinite`` or ``finite``.
        recipe: how a view is made.
        dataset: the images, uint8 or floating (N, C, H, W), in 0..255 or 0..1.
        random: what fixed views, and those of evaluations, are counted by.
        dtype: of the views.
    """

    mode: Literal["infinite", "finite"]
    recipe: Recipe
    dataset: Dataset
    random: Random
    dtype: torch.dtype = torch.float32
    _kept: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def view(
        self,
        inputs: tuple[Tensor, ...],
        ids: Tensor,
        view: int,
        random: Random,
        step: int,
        draw: int,
    ) -> tuple[Tensor, ...]:
        """Return augmentations (B, C, h, w): of this visit, or the fixed ones."""
        if self.mode == "finite":
            return (self._fixed(inputs[0], ids, view),)
        return (self._augmented(inputs[0], ids, random, f"view-{view}", step, draw),)

    def held(self, inputs: tuple[Tensor, ...], ids: Tensor, view: int) -> tuple[Tensor, ...]:
        """Return the images without augmentation, or the fixed views."""
        return (self._fixed(inputs[0], ids, view),) if self.mode == "finite" else self.plain(inputs)

    def evaluated(self, inputs: tuple[Tensor, ...], ids: Tensor, view: int) -> tuple[Tensor, ...]:
        """Return the fixed views, or augmentations that only evaluations see."""
        if self.mode == "finite":
            return (self._fixed(inputs[0], ids, view),)
        return (self._augmented(inputs[0], ids, self.random, f"evaluated-{view}"),)

    def plain(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the images without augmentation, in the size of views."""
        return (self.recipe.plain(_in_unit(inputs[0])).to(self.dtype),)

    def embed(self, module: nn.Module, inputs: tuple[Tensor, ...], view: int) -> Tensor:
        """Return the encoder's rows (B, dim), each of length 1."""
        return unit(module(*inputs))

    def represent(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return what the encoder's last layers see (B, width), to be probed."""
        assert isinstance(module, Projected)
        return module.represent(*inputs)

    def _augmented(
        self, images: Tensor, ids: Tensor, random: Random, name: str, step: int = 0, draw: int = 0
    ) -> Tensor:
        draws = Draws(random, f"contrastive/{name}", ids.tolist(), step, draw)
        return self.recipe.augment(_in_unit(images), draws).to(self.dtype)

    def _fixed(self, images: Tensor, ids: Tensor, view: int) -> Tensor:
        shape = (*images.shape[1:-2], *self.recipe.view_size(*images.shape[-2:]))
        pixels = len(self.dataset) * torch.Size(shape).numel()
        if 2 * pixels * self.dtype.itemsize > _KEPT_BYTES:
            return self._augmented(images, ids, self.random, f"fixed-{view}")
        if view not in self._kept:
            kept = torch.empty(len(self.dataset), *shape, dtype=self.dtype)
            for places in torch.arange(len(self.dataset)).split(_CHUNK):
                found = self.dataset[places][0]
                kept[places] = self._augmented(found, places, self.random, f"fixed-{view}")
            self._kept[view] = kept
        return self._kept[view][ids.cpu()].to(images.device)


@dataclass(frozen=True)
class PairViews:
    """The sides of pairs (a ``Contrast``): view 0 is the image, view 1 the caption's tokens.

    Attributes:
        dtype: of the images.
    """

    dtype: torch.dtype = torch.float32

    @property
    def mode(self) -> Literal["pairs"]:
        """Sides of pairs."""
        return "pairs"

    def view(
        self,
        inputs: tuple[Tensor, ...],
        ids: Tensor,
        view: int,
        random: Random,
        step: int,
        draw: int,
    ) -> tuple[Tensor, ...]:
        """Return the images (B, C, H, W), or the tokens (B, T)."""
        return self.evaluated(inputs, ids, view)

    def held(self, inputs: tuple[Tensor, ...], ids: Tensor, view: int) -> tuple[Tensor, ...]:
        """Return the images, or the tokens."""
        return self.evaluated(inputs, ids, view)

    def evaluated(self, inputs: tuple[Tensor, ...], ids: Tensor, view: int) -> tuple[Tensor, ...]:
        """Return the images, or the tokens."""
        return (inputs[1],) if view else self.plain(inputs)

    def plain(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the images."""
        return (_in_unit(inputs[0]).to(self.dtype),)

    def embed(self, module: nn.Module, inputs: tuple[Tensor, ...], view: int) -> Tensor:
        """Return the rows (B, dim) of a side's encoder, each of length 1."""
        return unit(self._of(module).side(view)(*inputs))

    def represent(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return the images' representation (B, width)."""
        return self._of(module).image.represent(*inputs)

    def _of(self, module: nn.Module) -> PairModule:
        assert isinstance(module, PairModule)
        return module


def _in_unit(images: Tensor) -> Tensor:
    """Return images as float32 in 0..1."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()
