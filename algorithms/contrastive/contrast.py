"""What contrastive learning asks of a task: views of examples, and an encoder for them.

Words: an example (an image, or a pair of an image and a text) has an id, its place in the training
set; a visit shows two views of it. Of images these are augmentations, fresh ones at each visit or
two that are made once; of pairs, the two sides. A row is one view of one example of a batch; its
positive is the other view of that example.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from gossamer.runtime.random import Random

__all__ = ["Contrast", "ViewMode", "unit"]

ViewMode = Literal["infinite", "finite", "pairs"]
"""``infinite``: two fresh augmentations at each visit; ``finite``: two that never change;
``pairs``: the two sides of a pair, each of which is contrasted with the other side alone."""


class Contrast(Protocol):
    """Views and embeddings of a task's examples."""

    @property
    def mode(self) -> ViewMode:
        """Where the two views of a visit come from."""
        ...

    def view(
        self,
        inputs: tuple[Tensor, ...],
        ids: Tensor,
        view: int,
        random: Random,
        step: int,
        draw: int,
    ) -> tuple[Tensor, ...]:
        """Return what the encoder takes for view 0 or 1 of some examples.

        A function of each example, its id and (for ``infinite`` views) of (step, draw) alone: it
        does not depend on which others stand beside it.

        Args:
            inputs: of the examples, as the dataset gives them, on any device; kept.
            ids: int64 (B,), their places in the training set.
            view: 0 or 1.
            random: the run's source; counted by (step, id, draw).
            step: of the run.
            draw: of the call within the step.
        """
        ...

    def held(self, inputs: tuple[Tensor, ...], ids: Tensor, view: int) -> tuple[Tensor, ...]:
        """Return what the encoder takes for an example that a chain still holds.

        The un-augmented example for ``infinite`` views; view ``view`` itself for the others.
        """
        ...

    def embed(self, module: nn.Module, inputs: tuple[Tensor, ...], view: int) -> Tensor:
        """Return rows (B, dim), float32 or float64, each of length 1.

        Args:
            module: the task's.
            inputs: what ``view`` or ``held`` returned.
            view: whose side of a pair it is; else without effect.
        """
        ...


def unit(rows: Tensor) -> Tensor:
    """Return rows (B, dim), float32 at least, each divided by its length; zeros stay zeros."""
    rows = rows if rows.dtype == torch.float64 else rows.float()
    length: Tensor = rows.norm(dim=1, keepdim=True)
    return rows / length.clamp_min(torch.finfo(rows.dtype).tiny)
