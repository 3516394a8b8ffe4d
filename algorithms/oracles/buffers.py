"""A module's buffers (running statistics), one set per hosted rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["BufferRows"]


class BufferRows:
    """The buffers of ``local`` ranks, bound to the one module in turn.

    A buffer that the module updates in place (BatchNorm's statistics) then belongs to the rank
    that is bound. They are not averaged: decentralized theory speaks of parameters.
    """

    def __init__(self, module: nn.Module, local: int) -> None:
        self._module = module
        self._rows = {
            name: torch.stack([buffer.detach().clone() for _ in range(local)])
            for name, buffer in module.named_buffers()
        }

    def bind(self, row: int) -> None:
        """Make the module's buffers those of hosted rank ``row``."""
        if self._rows:
            for name, buffer in self._module.named_buffers():
                buffer.data = self._rows[name][row]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the buffers, each (local, ...)."""
        return {f"buffers.{name}": rows for name, rows in self._rows.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy buffers back in place."""
        for name, rows in self._rows.items():
            rows.copy_(state[f"buffers.{name}"])
