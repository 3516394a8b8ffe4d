"""Encoders: a backbone whose output is the representation, and a projector to the embedding."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from gossamer.runtime.component import Component

__all__ = ["MLP", "Encoder", "EncoderModule"]

Count = Annotated[int, Field(ge=1, strict=True)]


class EncoderModule(nn.Module):
    """projector(backbone(inputs)); the embedding is this, divided by its length."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def represent(self, *inputs: Tensor) -> Tensor:
        """Return the representation (B, width)."""
        found: Tensor = self.backbone(*inputs)
        return found

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the embedding's direction (B, dim)."""
        found: Tensor = self.projector(self.backbone(*inputs))
        return found


class Encoder(Component, ABC):
    """An encoder of images."""

    @abstractmethod
    def build(self, channels: int, height: int, width: int) -> EncoderModule:
        """Return the module for images (B, channels, height, width), drawn from torch's generator.

        Raises:
            ConfigError: a package is missing, or the images do not fit.
        """


class MLP(Encoder):
    """A perceptron with ReLU; its last hidden layer is the representation."""

    name: Literal["mlp"] = "mlp"
    hidden: Annotated[tuple[Count, ...], Field(min_length=1)] = (128, 128)
    """Widths of the hidden layers."""
    dim: Count = 32
    """Elements of an embedding."""

    def build(self, channels: int, height: int, width: int) -> EncoderModule:
        """Return it; every size of image fits."""
        layers: list[nn.Module] = [nn.Flatten()]
        for i, o in itertools.pairwise([channels * height * width, *self.hidden]):
            layers += [nn.Linear(i, o), nn.ReLU()]
        return EncoderModule(nn.Sequential(*layers), nn.Linear(self.hidden[-1], self.dim))
