"""The base of the classification tasks: a table of examples, a small model, a split over ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import nn

from gossamer.algorithms.problems import Problem, default_dtype
from gossamer.algorithms.tasks.arrays import TensorDataset
from gossamer.algorithms.tasks.models import (
    Activation,
    Initialisation,
    convnet,
    initialise_,
    lenet,
    mlp,
    seeded,
)
from gossamer.algorithms.tasks.objectives import ClassificationLoss, count_right
from gossamer.algorithms.tasks.partition import ShardedTask
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.random import Random

__all__ = ["ClassificationTask", "Model", "Table"]

Count = Annotated[int, Field(ge=1, strict=True)]
Model = Literal["linear", "mlp", "cnn", "convnet"]


@dataclass(frozen=True)
class Table:
    """Examples and their classes.

    Attributes:
        features: floating (N, F), or (N, height, width) for images.
        labels: int64 (N,), classes 0..C-1.
    """

    features: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: np.ndarray | slice) -> Table:
        return Table(self.features[rows], self.labels[rows])

    def scaled(self, mean: np.ndarray | float, deviation: np.ndarray | float) -> Table:
        """Return the table with features (x - mean) / deviation."""
        return replace(self, features=(self.features - mean) / deviation)


class ClassificationTask(ShardedTask, ABC):
    """Train a small model to tell classes apart."""

    model: Model = "linear"
    """`linear` (with a bias), `mlp` (see `hidden`), or for images `cnn` (LeNet) and `convnet`
    (convolutions with GroupNorm, see `channels`)."""
    hidden: tuple[Count, ...] = (64,)
    """Widths of the mlp's hidden layers."""
    activation: Activation = "tanh"
    """Between the layers of a deep model: `tanh` or `relu`."""
    channels: Annotated[tuple[Count, ...], Field(min_length=1)] = (16, 32)
    """Maps of the convnet's stages: a 3x3 convolution, GroupNorm, the activation, and a pooling
    that halves the image."""
    groups: Count | tuple[Count, ...] = 4
    """Groups of the convnet's normalisations: one number for all stages or one for each; divisors
    of `channels`."""
    global_pool: bool = False
    """The convnet's last stage averages each map over the whole image, instead of halving it."""
    init: Initialisation = "torch"
    """x0: `torch` (the layers' own rule), `normal` (N(0, 1 / fan_in), zero biases), or `zeros`
    (linear models only)."""
    positive: int | None = Field(None, ge=0, strict=True)
    """Tell this class from the rest: one output a, labels b = +1 for it and -1 for the others,
    logistic loss log(1 + exp(-b a)). Without it, cross-entropy over all classes."""
    l2: float = Field(0.0, ge=0)
    """Adds l2 * sum x^2 over all parameters to each f_i."""
    nonconvex: float = Field(0.0, ge=0)
    """Adds nonconvex * sum x^2 / (1 + x^2) over all parameters to each f_i."""
    standardize: bool = False
    """Give every feature mean 0 and (population) standard deviation 1 over the training set."""
    normalize: tuple[float, Annotated[float, Field(gt=0)]] | None = None
    """(mean, deviation): every feature becomes (x - mean) / deviation, by these constants, which
    unlike those of `standardize` tell nothing of the examples."""
    shuffle: bool = False
    """Permute the training set by the seed before `test_examples` are taken from its end."""
    shuffle_seed: int | None = None
    """Of that permutation; a number holds the same examples out whatever the run's seed, which is
    taken where there is none."""
    test_examples: int = Field(0, ge=0, strict=True)
    """How many examples at the end of the training set are held out as the test set; 0 for data
    that bring a test set of their own."""
    examples: int | None = Field(None, ge=1, strict=True)
    """Train on the first so many examples only (after `shuffle` and `test_examples`); None: all."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of features and parameters."""

    @field_validator("hidden", "activation", "channels", "groups", "global_pool")
    @classmethod
    def _layers_need_their_model(cls, value: object, info: ValidationInfo) -> object:
        field, model = str(info.field_name), info.data.get("model")
        takes = {"hidden": ("mlp",), "activation": ("mlp", "cnn", "convnet")}.get(
            field, ("convnet",)
        )
        if model not in (None, *takes) and value != cls.model_fields[field].default:
            raise ValueError(
                f"has no effect with model: {model}; set model: {takes[0]}, or leave it out"
            )
        return value

    @field_validator("groups")
    @classmethod
    def _groups_divide_channels(
        cls, groups: int | tuple[int, ...], info: ValidationInfo
    ) -> int | tuple[int, ...]:
        channels = info.data.get("channels", ())
        each = (groups,) * len(channels) if isinstance(groups, int) else groups
        if len(each) != len(channels) or any(c % g for c, g in zip(channels, each, strict=True)):
            raise ValueError(
                f"must be a divisor of every one of channels, {list(channels)}, or a list with a "
                "divisor for each"
            )
        return groups

    @field_validator("normalize")
    @classmethod
    def _features_are_scaled_once(
        cls, normalize: tuple[float, float] | None, info: ValidationInfo
    ) -> tuple[float, float] | None:
        if normalize is not None and info.data.get("standardize"):
            raise ValueError("standardize scales the features already; keep one of the two")
        return normalize

    @field_validator("init")
    @classmethod
    def _zeros_are_for_linear_models(cls, init: str, info: ValidationInfo) -> str:
        if init == "zeros" and info.data.get("model", "linear") != "linear":
            raise ValueError("leaves deep models without a gradient; use torch or normal")
        return init

    @abstractmethod
    def read(self) -> tuple[Table, Table | None]:
        """Return the training set in the order of the file, and the test set if there is one."""

    def build(self, n: int, seed: int) -> Problem:
        """Read, hold out, standardize, split over n ranks, and build the model.

        Raises:
            ConfigError: a file is missing or broken, a field does not fit the data, or there are
                fewer examples than ranks.
        """
        train, test = self._hold_out(*self.read(), seed)
        constants = _mean_and_deviation(train) if self.standardize else self.normalize
        if constants is not None:
            train = train.scaled(*constants)
            test = None if test is None else test.scaled(*constants)
        classes = int(max(t.labels.max() for t in (train, test) if t is not None)) + 1
        train = self._first(train)
        module = self._model(train.features.shape[1:], classes, seed)
        return Problem(
            module=module.to(default_dtype(self.dtype)),
            train=self._dataset(train, classes),
            shards=self.split(self._targets(train.labels), n, seed),
            mixes_examples=self.standardize,
            loss=ClassificationLoss(self.l2, self.nonconvex),
            test=None if test is None else self._dataset(test, classes),
            score=count_right,
        )

    def _hold_out(self, train: Table, test: Table | None, seed: int) -> tuple[Table, Table | None]:
        if self.shuffle:
            order = Random(seed if self.shuffle_seed is None else self.shuffle_seed)
            train = train[order.stream("task/shuffle").permutation(len(train))[0].numpy()]
        if not self.test_examples:
            return train, test
        if test is not None:
            raise ConfigError(
                f"task.test_examples: '{self.name}' brings {len(test)} test examples of its own, "
                f"got {self.test_examples}; leave it out"
            )
        kept = len(train) - self.test_examples
        if kept < 1:
            raise ConfigError(
                f"task.test_examples: must be less than the {len(train)} examples of "
                f"'{self.name}', got {self.test_examples}"
            )
        return train[:kept], train[kept:]

    def _first(self, train: Table) -> Table:
        if self.examples is not None and self.examples > len(train):
            raise ConfigError(
                f"task.examples: '{self.name}' has {len(train)} training examples, "
                f"got {self.examples}"
            )
        return train[: self.examples]

    def _targets(self, labels: np.ndarray) -> np.ndarray:
        """Return what is predicted: the classes, or 0 and 1 where one stands against the rest."""
        return labels if self.positive is None else (labels == self.positive).astype(np.int64)

    def _dataset(self, table: Table, classes: int) -> TensorDataset:
        dtype = default_dtype(self.dtype)
        features = torch.from_numpy(np.ascontiguousarray(table.features)).to(dtype)
        features = features.unsqueeze(1) if self._sees_images else features.flatten(1)
        labels = torch.from_numpy(self._targets(table.labels))
        if self.positive is not None:
            if self.positive >= classes:
                raise ConfigError(
                    f"task.positive: '{self.name}' has classes 0..{classes - 1}, "
                    f"got {self.positive}"
                )
            labels = (2 * labels - 1).to(dtype)
        return TensorDataset((features, labels))

    @property
    def _sees_images(self) -> bool:
        return self.model in ("cnn", "convnet")

    def _model(self, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
        outputs = classes if self.positive is None else 1
        if self._sees_images:
            halvings = 2 if self.model == "cnn" else len(self.channels) - self.global_pool
            if len(shape) != 2 or min(shape) < 2**halvings:
                size = 2**halvings
                raise ConfigError(
                    f"task.model: {self.model} needs images of at least {size}x{size} pixels, but "
                    f"an example of '{self.name}' has shape {shape}; use mlp"
                )
        with seeded(seed):
            if self.model == "cnn":
                module = lenet(shape[0], shape[1], outputs, self.activation)
            elif self.model == "convnet":
                g, maps = self.groups, self.channels
                groups = (g,) * len(maps) if isinstance(g, int) else g
                module = convnet(
                    shape[0], shape[1], outputs, self.activation, maps, groups, self.global_pool
                )
            else:
                hidden = self.hidden if self.model == "mlp" else ()
                module = mlp(int(np.prod(shape)), hidden, outputs, self.activation)
            return initialise_(module, self.init)


def _mean_and_deviation(table: Table) -> tuple[np.ndarray, np.ndarray]:
    mean = table.features.mean(axis=0, dtype=np.float64)
    deviation = table.features.std(axis=0, dtype=np.float64)
    deviation[deviation == 0] = 1  # a constant feature becomes zero
    return mean, deviation
