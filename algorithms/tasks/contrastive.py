"""``contrastive``: an encoder whose embeddings tell an example's views from all others."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NoReturn, Self

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from gossamer.algorithms.contrastive.encoders import MLP, EncoderField
from gossamer.algorithms.contrastive.evaluation import (
    ContrastFigures,
    EvaluatedViews,
    Labelled,
    Probing,
)
from gossamer.algorithms.contrastive.probes import KNN, ProbeField
from gossamer.algorithms.contrastive.recipes import Digits, RecipeField
from gossamer.algorithms.contrastive.text_encoders import Bag, PairModule, TextField
from gossamer.algorithms.contrastive.views import ImageViews, PairViews
from gossamer.algorithms.problems import Dataset, Problem, default_dtype
from gossamer.algorithms.tasks.arrays import Subset
from gossamer.algorithms.tasks.image_sources import ArrayImages, FolderImages, HubImages
from gossamer.algorithms.tasks.images import (
    DigitImages,
    ImageData,
    Images,
    MNISTImages,
    PhotographImages,
)
from gossamer.algorithms.tasks.models import seeded
from gossamer.algorithms.tasks.pairs import HubPairs, Pairs, PairSource
from gossamer.algorithms.tasks.partition import ShardedTask
from gossamer.runtime.component import Component, named
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.random import Random

__all__ = ["Contrastive", "Views"]

_SOURCES: dict[str, type[Component]] = {
    "digits": DigitImages,
    "mnist": MNISTImages,
    "photographs": PhotographImages,
    "arrays": ArrayImages,
    "folder": FolderImages,
    "dataset": HubImages,
    "pairs": Pairs,
    "dataset-pairs": HubPairs,
}

SourceField = Annotated[
    DigitImages
    | MNISTImages
    | PhotographImages
    | ArrayImages
    | FolderImages
    | HubImages
    | Pairs
    | HubPairs,
    named(_SOURCES, "task.data"),
]


class Views(Component):
    """How the two views of an image come about."""

    mode: Literal["infinite", "finite"] = "infinite"
    """`infinite`: augmentations drawn anew at each visit; `finite`: two per image that stay."""
    recipe: RecipeField = Digits()
    """The augmentation: `digits`, or with the extra `contrastive` `simclr`, `stl10`, `imagenet100`;
    or a section, {name: stl10, size: 64}."""


class Contrastive(ShardedTask):
    """Train an encoder such that two views of an example are near, and all others far.

    Views are augmentations of images, or the sides of image-text pairs. Labels, where there are
    some, serve the evaluation alone. For the oracle `contrastive`.
    """

    name: str = "contrastive"
    data: SourceField = DigitImages()
    """Where the examples come from: `digits`, `mnist`, `photographs`, or a section: {name: arrays,
    path: FILE}, {name: folder, path: FOLDER, size: 96}, {name: dataset, dataset: NAME, size: 224};
    and pairs from {name: pairs, path: FILE} or {name: dataset-pairs, dataset: NAME, size: 224}."""
    views: Views = Views()
    """What the encoder sees of an image, such as {mode: finite, recipe: digits}. A pair is seen as
    it is: its views are its sides."""
    encoder: EncoderField = MLP()
    """What makes embeddings of images: `mlp`, `resnet18`, `resnet50`, `vit`, or such a section,
    {name: mlp, hidden: [128, 128], dim: 32}; all but the first need the extra `huggingface`."""
    text: TextField | None = None
    """What makes embeddings of the captions of pairs, as long as the images': `bag`, `transformer`,
    or such a section; None: `bag`."""
    examples: int | None = Field(default=None, ge=2, strict=True)
    """Train on the first so many examples only (after `test_examples`), while probes learn from
    all; None: all."""
    test_examples: int = Field(default=0, ge=0, strict=True)
    """How many images at the end of the training set are held out for the probes; 0 for data that
    bring test images of their own."""
    probes: tuple[ProbeField, ...] | None = None
    """What evaluations learn from frozen representations: `knn`, `linear`, or such a section; None:
    `knn` where there are labelled test images, else nothing."""
    probe_examples: int = Field(default=4096, ge=0, strict=True)
    """At most so many examples, evenly spaced, have their exact loss computed by an evaluation, are
    learnt from by its probes, and tested on; 0: all."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of images and parameters."""

    @field_validator("probe_examples")
    @classmethod
    def _one_has_no_other(cls, count: int) -> int:
        if count == 1:
            raise ValueError("must be 2 at least, for one is compared with the others; 0: all")
        return count

    @model_validator(mode="after")
    def _fields_have_an_effect(self) -> Self:
        pairs = isinstance(self.data, PairSource)
        without = ["views", "test_examples", "probes"] if pairs else ["text"]
        for field in without:
            if getattr(self, field) != type(self).model_fields[field].default:
                raise ConfigError(
                    f"task.{field}: has no effect {'on' if pairs else 'without'} pairs; leave it "
                    "out"
                )
        return self

    def build(self, n: int, seed: int) -> Problem:
        """Read, hold out, split over n ranks, and build the encoder.

        Raises:
            ConfigError: a file or package is missing or broken, a field does not fit the data, or
                there are fewer than 2 examples, or fewer than ranks.
        """
        if isinstance(self.data, PairSource):
            return self._of_pairs(self.data, n, seed)
        data = self._held_out(self.data.read())
        images = data.train[: self._count(len(data.train))]
        channels, height, width = images.shape
        recipe, dtype = self.views.recipe, default_dtype(self.dtype)
        recipe.require(channels, height, width)
        with seeded(seed):
            module = self.encoder.build(channels, *recipe.view_size(height, width))
        views = ImageViews(self.views.mode, recipe, images.dataset, Random(seed), dtype)
        shards = self.split(self._labels(images.labels, len(images)), n, seed)
        return self._problem(module, images.dataset, shards, views, seed, self._probing(data))

    def _of_pairs(self, pairs: PairSource, n: int, seed: int) -> Problem:
        data = pairs.read()
        count = self._count(len(data.dataset))
        dataset = Subset(data.dataset, torch.arange(count))
        with seeded(seed):
            shape = dataset[torch.zeros(1, dtype=torch.int64)][0].shape[1:]
            image = self.encoder.build(*shape)
            text = (self.text or Bag()).build(data.vocabulary, data.context, self.encoder.dim)
        shards = self.split(self._labels(None, count), n, seed)
        views = PairViews(default_dtype(self.dtype))
        return self._problem(PairModule(image, text), dataset, shards, views, seed, None)

    def _problem(
        self,
        module: nn.Module,
        dataset: Dataset,
        shards: tuple[np.ndarray, ...],
        views: EvaluatedViews,
        seed: int,
        probing: Probing | None,
    ) -> Problem:
        module = module.to(default_dtype(self.dtype))
        places, random = _spread(len(dataset), self.probe_examples), Random(seed)
        return Problem(
            module=module,
            train=dataset,
            shards=shards,
            loss=_no_loss,
            contrast=views,
            figures=ContrastFigures(module, views, dataset, places, random, probing),
        )

    def _held_out(self, data: ImageData) -> ImageData:
        train, kept = data.train, len(data.train) - self.test_examples
        if not self.test_examples:
            return data
        if data.test is not None:
            raise ConfigError(
                f"task.test_examples: '{self.data.name}' brings {len(data.test)} test examples of "
                f"its own, got {self.test_examples}; leave it out"
            )
        if kept < 2:
            raise ConfigError(
                f"task.test_examples: must leave 2 of the {len(train)} examples to train on, got "
                f"{self.test_examples}"
            )
        return data._replace(train=train[:kept], test=train[kept:])

    def _count(self, found: int) -> int:
        """Return how many examples there are to train on."""
        if found < 2:
            raise ConfigError(
                f"task.data: '{self.data.name}' has {found} training examples; give 2 at least, "
                "for one is compared with the others"
            )
        if self.examples is not None and self.examples > found:
            raise ConfigError(
                f"task.examples: '{self.data.name}' has {found} training examples, got "
                f"{self.examples}"
            )
        return self.examples or found

    def _labels(self, labels: np.ndarray | None, count: int) -> np.ndarray:
        """Return what shards are cut by."""
        if labels is not None:
            return labels
        if self.heterogeneity in ("sorted", "dirichlet"):
            raise ConfigError(
                f"task.heterogeneity: {self.heterogeneity} needs classes, and those of "
                f"'{self.data.name}' are not known; use iid or contiguous"
            )
        return np.zeros(count, np.int64)

    def _probing(self, data: ImageData) -> Probing | None:
        learnt, test = data.probe or data.train, data.test
        if test is None or test.labels is None or learnt.labels is None:
            if self.probes:
                raise ConfigError(
                    f"task.probes: need labelled images to learn from and to test on, which "
                    f"'{self.data.name}' has not; name test data or set test_examples where there "
                    "are labels, or leave it out"
                )
            return None
        probes: Any = (KNN(),) if self.probes is None else self.probes
        return Probing(probes, self._labelled(learnt), self._labelled(test)) if probes else None

    def _labelled(self, images: Images) -> Labelled:
        assert images.labels is not None
        places = _spread(len(images), self.probe_examples)
        return Labelled(images.dataset, places, torch.from_numpy(images.labels)[places])


def _spread(count: int, most: int) -> Tensor:
    """Return at most ``most`` of 0..count-1, evenly spaced: sorted examples keep their classes."""
    kept = min(count, most or count)
    return torch.arange(kept) * count // kept


def _no_loss(module: nn.Module, inputs: tuple[Tensor, ...]) -> NoReturn:
    raise AssertionError("examples of a contrastive task have no loss of their own")
