"""What a parameterisation of a model is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import nn

from gossamer.runtime.component import Component

__all__ = ["Scheme"]


class Scheme(Component, ABC):
    """A parameterisation of a model."""

    @property
    def extra_tokens(self) -> int:
        """How many more tokens the model sees than it is given."""
        return 0

    def problem_parts(self, model: nn.Module, seed: int) -> dict[str, Any]:
        """Return fields of the Problem that the scheme adds to, by name, after ``apply``."""
        return {}

    @abstractmethod
    def apply(self, model: nn.Module, seed: int) -> nn.Module:
        """Return the model, with `requires_grad` on what is trained.

        Args:
            model: of ``transformers``, for language; changed in place.
            seed: of new parameters.

        Raises:
            ConfigError: the model has not what the scheme needs.
        """
