"""ReLoRA's merges (arXiv:2307.05695): B A goes into the frozen weights, and both begin anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gossamer.algorithms.low_rank.layer import RestartedLinear
from gossamer.runtime.random import Random
from gossamer.runtime.rows import Slice

__all__ = ["Restarts"]


@dataclass(frozen=True)
class Restarts:
    """When layers merge, and what of the optimizer's state becomes zero then.

    Attributes:
        every: steps between two merges.
        reset: entries at random, or those of least magnitude.
        share: how many of them.
        seed: of the run.
    """

    every: int
    reset: Literal["random", "magnitude"]
    share: float
    seed: int

    def merge_(self, module: nn.Module, step: int) -> Sequence[str]:
        """Merge all layers as they are bound; return the names of the parameters that begin anew.

        Args:
            module: its outputs stay the same, but for rounding.
            step: the number of steps made.
        """
        names = []
        layers = [(n, m) for n, m in module.named_modules() if isinstance(m, RestartedLinear)]
        for number, (name, layer) in enumerate(layers):
            layer.merge_(self.seed, number, step)
            names += [f"{name}.A", f"{name}.B"]
        return names

    def prune_(self, state: Tensor, where: Slice, step: int) -> None:
        """Set a share of a parameter's state to zero, the same entries in every row.

        Args:
            state: (local, d), rows of an optimizer's state.
            where: the parameter.
            step: the number of steps made, which the random entries are counted by.
        """
        part = state[:, where.begin : where.end]
        count = int(self.share * part.shape[1])
        if self.reset == "magnitude":
            keep = part.shape[1] - count
            kept = part.abs().topk(keep, dim=1).indices
            values = part.gather(1, kept)
            part.zero_().scatter_(1, kept, values)
            return
        drawn = torch.empty(1, part.shape[1])
        Random(self.seed).stream("relora/reset", [where.tensor], step).uniform_(drawn)
        part[:, drawn[0].argsort(stable=True)[:count].to(part.device)] = 0
