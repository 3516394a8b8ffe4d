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
    initialise_,
    lenet,
    mlp,
    seeded,
)
from gossamer.algorithms.tasks.objectives import ClassificationLoss, count_right
from gossamer.algorithms.tasks.partition import ShardedTask
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.random import Random

__all__ = ["ClassificationTask", "Table"]

Count = Annotated[int, Field(ge=1, strict=True)]


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


class ClassificationTask(ShardedTask, ABC):
    """Train a small model to tell classes apart."""

    model: Literal["linear", "mlp", "cnn"] = "linear"
    """`linear` (with a bias), `mlp` (see `hidden`), or `cnn` (LeNet, for images)."""
    hidden: tuple[Count, ...] = (64,)
    """Widths of the mlp's hidden layers."""
    activation: Activation = "tanh"
    """Between the layers of the mlp and the cnn: `tanh` or `relu`."""
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
    shuffle: bool = False
    """Permute the training set by the seed before `test_examples` are taken from its end."""
    test_examples: int = Field(0, ge=0, strict=True)
    """How many examples at the end of the training set are held out as the test set; 0 for data
    that bring a test set of their own."""
    examples: int | None = Field(None, ge=1, strict=True)
    """Train on the first so many examples only (after `shuffle` and `test_examples`); None: all."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of features and parameters."""

    @field_validator("hidden", "activation")
    @classmethod
    def _layers_need_a_deep_model(cls, value: object, info: ValidationInfo) -> object:
        model = info.data.get("model", "mlp")
        takes = {"hidden": ("mlp",), "activation": ("mlp", "cnn")}[str(info.field_name)]
        default = cls.model_fields[str(info.field_name)].default
        if model not in takes and value != default:
            raise ValueError(f"has no effect with model: {model}; set model: mlp, or leave it out")
        return value

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
        if self.standardize:
            train, test = _standardized(train, test)
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
            train = train[Random(seed).stream("task/shuffle").permutation(len(train))[0].numpy()]
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
        features = features.unsqueeze(1) if self.model == "cnn" else features.flatten(1)
        labels = torch.from_numpy(self._targets(table.labels))
        if self.positive is not None:
            if self.positive >= classes:
                raise ConfigError(
                    f"task.positive: '{self.name}' has classes 0..{classes - 1}, "
                    f"got {self.positive}"
                )
            labels = (2 * labels - 1).to(dtype)
        return TensorDataset((features, labels))

    def _model(self, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
        outputs = classes if self.positive is None else 1
        with seeded(seed):
            if self.model == "cnn":
                if len(shape) != 2 or min(shape) < 4:
                    raise ConfigError(
                        f"task.model: cnn needs images of at least 4x4 pixels, but an example of "
                        f"'{self.name}' has shape {shape}; use mlp"
                    )
                module = lenet(*shape, outputs, self.activation)
            else:
                hidden = self.hidden if self.model == "mlp" else ()
                module = mlp(int(np.prod(shape)), hidden, outputs, self.activation)
            return initialise_(module, self.init)


def _standardized(train: Table, test: Table | None) -> tuple[Table, Table | None]:
    mean = train.features.mean(axis=0, dtype=np.float64)
    std = train.features.std(axis=0, dtype=np.float64)
    std[std == 0] = 1  # a constant feature becomes zero

    def scaled(table: Table) -> Table:
        return replace(table, features=(table.features - mean) / std)

    return scaled(train), None if test is None else scaled(test)
