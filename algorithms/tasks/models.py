"""Small classifiers: a linear map, a perceptron, LeNet, and convolutions with GroupNorm."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from gossamer.runtime.random import Random

__all__ = ["Activation", "Initialisation", "convnet", "initialise_", "lenet", "mlp", "seeded"]

Activation = Literal["tanh", "relu"]
Initialisation = Literal["torch", "normal", "zeros"]

_ACTIVATIONS: dict[Activation, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let torch's own initialisers draw from the run's seed; the global generator is untouched."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would reseed the accelerators' generators too.
        torch.default_generator.manual_seed(Random(seed).stream("init").seed())
        yield


def mlp(features: int, hidden: Sequence[int], outputs: int, activation: Activation) -> nn.Module:
    """Return a perceptron (B, ...) -> (B, outputs); a linear map when ``hidden`` is empty.

    Args:
        features: elements of one input.
        hidden: widths of the hidden layers.
        outputs: elements of one output.
        activation: between the layers.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for i, o in itertools.pairwise([features, *hidden, outputs]):
        layers += [nn.Linear(i, o), _ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


def lenet(height: int, width: int, outputs: int, activation: Activation) -> nn.Module:
    """Return LeNet (B, 1, height, width) -> (B, outputs): 6 and 16 maps of 5x5, then 84 units.

    Both convolutions keep the size (padding 2) and both poolings halve it, so that images from
    4x4 on fit.
    """
    act = _ACTIVATIONS[activation]
    return nn.Sequential(
        nn.Conv2d(1, 6, kernel_size=5, padding=2),
        act(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, kernel_size=5, padding=2),
        act(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * (height // 4) * (width // 4), 84),
        act(),
        nn.Linear(84, outputs),
    )


def convnet(
    height: int,
    width: int,
    outputs: int,
    activation: Activation,
    channels: Sequence[int],
    groups: Sequence[int],
    global_pool: bool = False,
) -> nn.Module:
    """Return stages of convolution, GroupNorm and pooling, (B, 1, height, width) -> (B, outputs).

    Convolutions are 3x3 and keep the size, poolings halve it; no layer mixes examples.

    Args:
        height: of an image, at least 2 ** halvings; so is ``width``.
        width: of an image.
        outputs: elements of one output.
        activation: after each normalisation.
        channels: maps of each stage.
        groups: of each stage's GroupNorm; divide ``channels``.
        global_pool: the last stage averages each map over the whole image, instead of halving it.
    """
    layers: list[nn.Module] = []
    for i, o, g in zip([1, *channels], channels, groups, strict=False):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.GroupNorm(g, o), _ACTIVATIONS[activation]()]
        layers += [nn.MaxPool2d(2)]
    pixels = (height >> len(channels)) * (width >> len(channels))
    if global_pool:
        layers[-1], pixels = nn.AdaptiveAvgPool2d(1), 1
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * pixels, outputs))


@torch.no_grad()
def initialise_(module: nn.Module, rule: Initialisation) -> nn.Module:
    """Set the parameters of ``module`` in place and return it; see the field `init` of the tasks.

    Args:
        module: made of linear layers, convolutions and normalisations.
        rule: ``torch`` leaves what the layers' constructors drew; ``normal`` is N(0, 1 / fan_in)
            with zero biases, normalisations at the identity; ``zeros`` is zero everywhere.
    """
    if rule == "torch":
        return module
    for layer in module.modules():
        for p in layer.parameters(recurse=False):
            p.zero_()
        if rule == "normal" and isinstance(layer, nn.GroupNorm):
            layer.reset_parameters()
        elif rule == "normal" and isinstance(layer, nn.Linear | nn.Conv2d):
            layer.weight.normal_(0.0, layer.weight[0].numel() ** -0.5)
    return module
