"""Real data that ship with scikit-learn: nothing to download."""

from __future__ import annotations

from abc import ABC
from functools import cache

import numpy as np
from pydantic import Field
from sklearn import datasets

from gossamer.algorithms.tasks.classification import ClassificationTask, Model, Table

__all__ = ["BreastCancer", "Digits", "Wine", "read_digits"]


@cache
def read_digits() -> Table:
    """Return the 1,797 images of 8x8 in the order of the file, scaled by 1/16."""
    # Kept: scikit-learn reads numbers written out, which takes longer than many a small run.
    data = datasets.load_digits()
    return Table(data.images / 16, data.target.astype(np.int64))


class _Bundled(ClassificationTask, ABC):
    """A table without a test set of its own, and in no useful order."""

    shuffle: bool = True
    """Permute the examples by the seed before `test_examples` are taken from their end; false
    keeps the order of the file."""


class Digits(_Bundled):
    """Handwritten digits: 1,797 images of 8x8 pixels in 0..1, ten classes (UCI)."""

    name: str = "digits"
    model: Model = "mlp"
    """`linear` (with a bias), `mlp` (`hidden`), `cnn` (LeNet), or `convnet` (see `channels`)."""
    test_examples: int = Field(357, ge=0, strict=True)
    """How many examples are held out as the test set; 357 leaves 1,440 to train on."""

    def read(self) -> tuple[Table, Table | None]:
        """Return the images, scaled by 1/16; no test set."""
        return read_digits(), None


class BreastCancer(_Bundled):
    """Breast cancer Wisconsin: 569 tumours, 30 features, malignant (0) or benign (1) (UCI)."""

    name: str = "breast-cancer"
    standardize: bool = True
    """Give every feature mean 0 and (population) standard deviation 1 over the training set."""
    test_examples: int = Field(114, ge=0, strict=True)
    """How many examples are held out as the test set; 114 are a fifth, 0 trains on all 569."""

    def read(self) -> tuple[Table, Table | None]:
        """Return the table in the order of the file; no test set."""
        data = datasets.load_breast_cancer()
        return Table(data.data, data.target.astype(np.int64)), None


class Wine(_Bundled):
    """Wine recognition: 178 wines, 13 features, three growers (UCI)."""

    name: str = "wine"
    standardize: bool = True
    """Give every feature mean 0 and (population) standard deviation 1 over the training set."""
    test_examples: int = Field(36, ge=0, strict=True)
    """How many examples are held out as the test set; 36 are a fifth, 0 trains on all 178."""

    def read(self) -> tuple[Table, Table | None]:
        """Return the table in the order of the file; no test set."""
        data = datasets.load_wine()
        return Table(data.data, data.target.astype(np.int64)), None
