"""Encoders of images: a backbone makes the representation, a projector the embedding of it.

No batch normalisation: its statistics would leak over the batch, and differ between ranks.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from gossamer.algorithms.tasks.hub import load_package
from gossamer.runtime.component import Component, named
from gossamer.runtime.errors import ConfigError

__all__ = [
    "MLP",
    "Encoder",
    "EncoderField",
    "Projected",
    "ResNet18",
    "ResNet50",
    "ViT",
    "divisor_of_hidden",
]

Count = Annotated[int, Field(ge=1, strict=True)]
_GROUPS = 32


class Projected(nn.Module):
    """projector(backbone(inputs)); an embedding is this, divided by its length."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def represent(self, *inputs: Tensor) -> Tensor:
        """Return the representation (B, width)."""
        found: Tensor = self.backbone(*inputs)
        return found

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return (B, dim)."""
        found: Tensor = self.projector(self.backbone(*inputs))
        return found


class Encoder(Component, ABC):
    """An encoder of images, with fresh weights."""

    dim: Count
    """Elements of an embedding."""

    @abstractmethod
    def build(self, channels: int, height: int, width: int) -> Projected:
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

    def build(self, channels: int, height: int, width: int) -> Projected:
        """Return it; every size of image fits."""
        layers: list[nn.Module] = [nn.Flatten()]
        for i, o in itertools.pairwise([channels * height * width, *self.hidden]):
            layers += [nn.Linear(i, o), nn.ReLU()]
        return Projected(nn.Sequential(*layers), nn.Linear(self.hidden[-1], self.dim))


class _ResNet(Encoder, ABC):
    norm: Literal["none", "group"] = "none"
    """What stands in the place of batch normalisation: nothing, or GroupNorm of 32 groups."""

    def _model(self, channels: int, layer: str, depths: list[int], widths: list[int]) -> nn.Module:
        """Return the network up to its pooling, (B, channels, H, W) -> (B, widths[-1])."""
        transformers = load_package("transformers")
        config = transformers.ResNetConfig(
            num_channels=channels, layer_type=layer, depths=depths, hidden_sizes=widths
        )
        model: nn.Module = transformers.ResNetModel(config)
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    group = self.norm == "group"
                    other = nn.GroupNorm(_GROUPS, child.num_features) if group else nn.Identity()
                    setattr(parent, name, other)
        return _Pooled(model)


class ResNet18(_ResNet):
    """ResNet-18; the representation is a linear layer's and ReLU's of 512 (arXiv:2404.10575)."""

    name: Literal["resnet18"] = "resnet18"
    dim: Count = 512
    """Elements of an embedding."""

    def build(self, channels: int, height: int, width: int) -> Projected:
        """Return it; every size of image fits."""
        model = self._model(channels, "basic", [2, 2, 2, 2], [64, 128, 256, 512])
        backbone = nn.Sequential(model, nn.Linear(512, 512), nn.ReLU())
        return Projected(backbone, nn.Linear(512, self.dim))


class ResNet50(_ResNet):
    """ResNet-50; the representation is its 2,048 means, the projector a perceptron."""

    name: Literal["resnet50"] = "resnet50"
    dim: Count = 128
    """Elements of an embedding."""

    def build(self, channels: int, height: int, width: int) -> Projected:
        """Return it; every size of image fits."""
        model = self._model(channels, "bottleneck", [3, 4, 6, 3], [256, 512, 1024, 2048])
        return Projected(model, _perceptron(2048, self.dim))


class ViT(Encoder):
    """A vision transformer; the representation is its class token, the projector a perceptron."""

    name: Literal["vit"] = "vit"
    patch: Count = 16
    """Pixels of a patch's sides; divides those of a view."""
    hidden: Count = 384
    """Width of the tokens, a multiple of `heads`."""
    layers: Count = 12
    """Blocks of attention and perceptron, the latter four times as wide inside."""
    heads: Count = 6
    """Attention heads."""
    dim: Count = 128
    """Elements of an embedding."""

    @field_validator("heads")
    @classmethod
    def _heads_divide_hidden(cls, heads: int, info: ValidationInfo) -> int:
        return divisor_of_hidden(heads, info)

    def build(self, channels: int, height: int, width: int) -> Projected:
        """Return it, for images of this size alone."""
        if height % self.patch or width % self.patch:
            raise ConfigError(
                f"task.encoder.patch: must divide the sides of a view, {height} and {width}, got "
                f"{self.patch}"
            )
        transformers = load_package("transformers")
        config = transformers.ViTConfig(
            image_size=(height, width),
            patch_size=self.patch,
            num_channels=channels,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.hidden,
        )
        model = transformers.ViTModel(config, add_pooling_layer=False)
        return Projected(_ClassToken(model), _perceptron(self.hidden, self.dim))


def divisor_of_hidden(heads: int, info: ValidationInfo) -> int:
    """Check the field `heads` of a transformer against `hidden`; for validators."""
    hidden = info.data.get("hidden", heads)
    if hidden % heads:
        raise ValueError(f"must divide hidden, {hidden}")
    return heads


class _Pooled(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, images: Tensor) -> Tensor:
        pooled: Tensor = self.model(images).pooler_output
        return pooled.flatten(1)


class _ClassToken(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.model(images).last_hidden_state
        return tokens[:, 0]


def _perceptron(width: int, dim: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))


_ENCODERS: dict[str, type[Encoder]] = {
    "mlp": MLP,
    "resnet18": ResNet18,
    "resnet50": ResNet50,
    "vit": ViT,
}

EncoderField = Annotated[
    MLP | ResNet18 | ResNet50 | ViT,
    named(_ENCODERS, "task.encoder"),
]
"""An encoder: its name, or a section with a name and fields."""
