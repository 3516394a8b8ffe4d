"""Any classification data in SVMlight (LIBSVM) format, and UCI Adult in particular."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field
from sklearn.datasets import load_svmlight_files

from gossamer.algorithms.tasks.classification import ClassificationTask, Table
from gossamer.algorithms.tasks.files import locate, read_bytes
from gossamer.runtime.errors import ConfigError

__all__ = ["A9A", "SVMLight"]

_MOST_BYTES = 8 * 2**30
"""Features are held densely: a table beyond this is refused rather than swapped to disk."""


class SVMLight(ClassificationTask):
    """Examples in lines `label index:value ...`; labels are integers, in any numbering."""

    name: str = "svmlight"
    path: str
    """The training file, also `.gz`; a relative one is looked for here and in GOSSAMER_DATA."""
    test_path: str | None = None
    """The test file; None: see `test_examples`."""
    features: int | None = Field(None, ge=1, strict=True)
    """Number of features; None: the largest index of the two files."""

    def read(self) -> tuple[Table, Table | None]:
        """Return the files; classes are numbered by ascending label.

        Raises:
            ConfigError: a file is missing, damaged or malformed, labels are not classes, the test
                file has a label that the training file lacks, or the table is too large.
        """
        named = {"task.path": self.path, "task.test_path": self.test_path}
        paths = {field: locate(p, field) for field, p in named.items() if p is not None}
        files = self._parse(paths)
        classes = np.unique(files[0][1])
        if not np.array_equal(classes, np.round(classes)):
            raise ConfigError(
                f"task.path: labels of {paths['task.path']} must be integers (classes), found "
                f"{classes[classes != np.round(classes)][0]}"
            )
        tables = []
        for x, y in files:
            unknown = np.setdiff1d(y, classes)
            if len(unknown):
                raise ConfigError(
                    f"task.test_path: label {unknown[0]:g} of {paths['task.test_path']} does not "
                    "occur in the training file; give files of one data set"
                )
            tables.append(Table(x.toarray(), np.searchsorted(classes, y).astype(np.int64)))
        return tables[0], tables[1] if len(tables) > 1 else None

    def _parse(self, paths: dict[str, Path]) -> list[tuple[Any, np.ndarray]]:
        """Return (scipy CSR matrix, labels) per file, all with the same columns."""
        streams = [io.BytesIO(read_bytes(path, field)) for field, path in paths.items()]
        try:
            flat = load_svmlight_files(streams, n_features=self.features, dtype=np.float32)
        except (ValueError, OverflowError) as error:
            names = " and ".join(map(str, paths.values()))
            raise ConfigError(
                f"task.path: cannot read {names} as SVMlight ({error}); lines must be "
                "'label index:value ...' with ascending indices, at most task.features of them"
            ) from error
        for field, path, x in zip(paths, paths.values(), flat[::2], strict=True):
            if x.shape[0] == 0:
                raise ConfigError(f"{field}: {path} has no examples; give another file")
            if 4 * x.shape[0] * x.shape[1] > _MOST_BYTES:
                raise ConfigError(
                    f"{field}: {path} is {x.shape[0]} x {x.shape[1]}, too large to hold densely "
                    f"({_MOST_BYTES >> 30} GiB at most); cut it"
                )
        return list(zip(flat[::2], flat[1::2], strict=True))


class A9A(SVMLight):
    """UCI Adult, binarised: 32,560 and 16,281 people, 123 features, income above 50,000 or not."""

    name: str = "a9a"
    model: Literal["linear", "mlp"] = "mlp"
    """`linear` (with a bias) or `mlp` (see `hidden`; the default is 123-64-2)."""
    path: str = "a9a/train.svm.gz"
    """The training file; a relative one is looked for here and in GOSSAMER_DATA."""
    test_path: str | None = "a9a/test.svm.gz"
    """The test file."""
    features: int | None = Field(123, ge=1, strict=True)
    """Number of features."""
