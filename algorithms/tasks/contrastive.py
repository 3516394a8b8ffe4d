"""``contrastive``: an encoder whose embeddings tell an example's views from all others."""

from __future__ import annotations

from typing import Annotated, Literal, NoReturn

import numpy as np
import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from gossamer.algorithms.contrastive.encoders import MLP, Encoder
from gossamer.algorithms.contrastive.evaluation import ContrastFigures, Labelled, Probing
from gossamer.algorithms.contrastive.probes import KNN, ProbeField
from gossamer.algorithms.contrastive.recipes import Digits, Recipe
from gossamer.algorithms.contrastive.views import ImageViews
from gossamer.algorithms.problems import Problem, default_dtype
from gossamer.algorithms.tasks.images import (
    DigitImages,
    ImageData,
    Images,
    ImageSource,
    MNISTImages,
)
from gossamer.algorithms.tasks.models import seeded
from gossamer.algorithms.tasks.partition import ShardedTask
from gossamer.runtime.component import Component, choose
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.random import Random

__all__ = ["Contrastive", "Views"]

_SOURCES: dict[str, type[ImageSource]] = {"digits": DigitImages, "mnist": MNISTImages}
_RECIPES: dict[str, type[Recipe]] = {"digits": Digits}
_ENCODERS: dict[str, type[Encoder]] = {"mlp": MLP}

SourceField = Annotated[
    DigitImages | MNISTImages,
    BeforeValidator(
        lambda given: choose(given, _SOURCES, "task.data"),
        json_schema_input_type=Literal["digits", "mnist"] | DigitImages | MNISTImages,
    ),
]
RecipeField = Annotated[
    Digits,
    BeforeValidator(
        lambda given: choose(given, _RECIPES, "task.views.recipe"),
        json_schema_input_type=Literal["digits"] | Digits,
    ),
]
EncoderField = Annotated[
    MLP,
    BeforeValidator(
        lambda given: choose(given, _ENCODERS, "task.encoder"),
        json_schema_input_type=Literal["mlp"] | MLP,
    ),
]


class Views(Component):
    """How the two views of an image come about."""

    mode: Literal["infinite", "finite"] = "infinite"
    """`infinite`: augmentations drawn anew at each visit; `finite`: two per image that stay."""
    recipe: RecipeField = Digits()
    """The augmentation: a recipe's name, or {name: digits, noise: 0}."""


class Contrastive(ShardedTask):
    """Train an encoder such that two views of an example are near, and all others far."""

    name: str = "contrastive"
    data: SourceField = DigitImages()
    """Where the examples come from: a source's name, or {name: mnist, path: FOLDER}."""
    views: Views = Views()
    """What the encoder sees of an image, such as {mode: finite, recipe: digits}."""
    encoder: EncoderField = MLP()
    """What makes embeddings of images: a name, or {name: mlp, hidden: [128, 128], dim: 32}."""
    examples: int | None = Field(default=None, ge=2, strict=True)
    """Train on the first so many examples only (after `test_examples`), while probes learn from
    all; None: all."""
    test_examples: int = Field(default=0, ge=0, strict=True)
    """How many examples at the end of the training set are held out for the probes; 0 for data that
    bring test examples of their own."""
    probes: tuple[ProbeField, ...] | None = None
    """What evaluations learn from frozen representations: `knn`, `linear`, or such a section; None:
    `knn` where there are labelled test examples, else nothing."""
    probe_examples: int | None = Field(default=4096, ge=2, strict=True)
    """At most so many examples, evenly spaced, have their exact loss computed by an evaluation, are
    learnt from by its probes, and tested on; None: all."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of views and parameters."""

    def build(self, n: int, seed: int) -> Problem:
        """Read, hold out, split over n ranks, and build the encoder.

        Raises:
            ConfigError: a file or package is missing or broken, a field does not fit the data, or
                there are fewer than 2 examples, or fewer than ranks.
        """
        data = self._held_out(self.data.read())
        train = self._first(data.train)
        dtype, random = default_dtype(self.dtype), Random(seed)
        channels, height, width = train.shape
        recipe = self.views.recipe
        recipe.require(channels, height, width)
        with seeded(seed):
            module = self.encoder.build(channels, *recipe.size(height, width)).to(dtype)
        views = ImageViews(self.views.mode, recipe, train.dataset, random, dtype)
        return Problem(
            module=module,
            train=train.dataset,
            shards=self.split(self._labels(train), n, seed),
            loss=_no_loss,
            contrast=views,
            figures=ContrastFigures(
                module=module,
                views=views,
                dataset=train.dataset,
                places=_spread(len(train), self.probe_examples),
                random=random,
                probing=self._probing(data),
            ),
        )

    def _held_out(self, data: ImageData) -> ImageData:
        train, kept = data.train, len(data.train) - self.test_examples
        if self.test_examples:
            if data.test is not None:
                raise ConfigError(
                    f"task.test_examples: data '{self.data.name}' brings {len(data.test)} test "
                    f"examples of its own, got {self.test_examples}; leave it out"
                )
            if kept < 2:
                raise ConfigError(
                    f"task.test_examples: must leave 2 of the {len(train)} examples to train on, "
                    f"got {self.test_examples}"
                )
            data = data._replace(train=train[:kept], test=train[kept:])
        return data

    def _first(self, train: Images) -> Images:
        if len(train) < 2:
            raise ConfigError(
                f"task.data: '{self.data.name}' has {len(train)} training examples; give 2 at "
                "least, for one is compared with the others"
            )
        if self.examples is not None and self.examples > len(train):
            raise ConfigError(
                f"task.examples: '{self.data.name}' has {len(train)} training examples, got "
                f"{self.examples}"
            )
        return train[: self.examples]

    def _labels(self, train: Images) -> np.ndarray:
        if train.labels is not None:
            return train.labels
        if self.heterogeneity in ("sorted", "dirichlet"):
            raise ConfigError(
                f"task.heterogeneity: {self.heterogeneity} needs classes, which "
                f"'{self.data.name}' has not; use iid or contiguous"
            )
        return np.zeros(len(train), np.int64)

    def _probing(self, data: ImageData) -> Probing | None:
        learnt, test = data.probe or data.train, data.test
        if test is None or test.labels is None or learnt.labels is None:
            if self.probes:
                raise ConfigError(
                    f"task.probes: need labelled training and test examples, which "
                    f"'{self.data.name}' has not; set test_examples where there are labels, or "
                    "leave probes out"
                )
            return None
        probes = (KNN(),) if self.probes is None else self.probes
        return Probing(probes, self._labelled(learnt), self._labelled(test)) if probes else None

    def _labelled(self, images: Images) -> Labelled:
        assert images.labels is not None
        places = _spread(len(images), self.probe_examples)
        return Labelled(images.dataset, places, torch.from_numpy(images.labels)[places])


def _spread(count: int, most: int | None) -> Tensor:
    """Return at most ``most`` of 0..count-1, evenly spaced: sorted examples keep their classes."""
    kept = min(count, most or count)
    return torch.arange(kept) * count // kept


def _no_loss(module: nn.Module, inputs: tuple[Tensor, ...]) -> NoReturn:
    raise AssertionError("examples of a contrastive task have no loss of their own")
