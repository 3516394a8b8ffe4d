"""Random numbers of augmentations: each image has its own, whichever others stand beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.runtime.random import Random

__all__ = ["Draws"]


@dataclass(frozen=True)
class Draws:
    """The numbers of some images at one visit, counted by (step, id, draw).

    Attributes:
        random: the source.
        name: of the streams.
        ids: of the images.
        step: of the visit.
        draw: of the visit within the step.
    """

    random: Random
    name: str
    ids: Sequence[int]
    step: int = 0
    draw: int = 0

    def uniforms(self, count: int) -> Tensor:
        """Return float32 (images, count) in (0, 1), on the CPU."""
        stream = self.random.stream(f"{self.name}/uniform", self.ids, self.step, self.draw)
        return stream.uniform_(torch.empty(len(self.ids), count))

    def normals(self, count: int) -> Tensor:
        """Return float32 (images, count), on the CPU."""
        stream = self.random.stream(f"{self.name}/normal", self.ids, self.step, self.draw)
        return stream.normal_(torch.empty(len(self.ids), count))
