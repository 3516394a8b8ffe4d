"""MNIST and SVMlight files: what is read, and what a missing or damaged file says."""

import gzip
import os
import struct

import numpy as np
import pytest
import torch

from gossamer.algorithms.tasks.files import DATA_VARIABLE
from gossamer.algorithms.tasks.mnist import MNIST
from gossamer.algorithms.tasks.svmlight import A9A, SVMLight
from gossamer.runtime.errors import ConfigError

needs_data = pytest.mark.skipif(
    DATA_VARIABLE not in os.environ, reason=f"{DATA_VARIABLE} names no folder of data sets"
)


def idx(array):
    return (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + bytes(array)
    )


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (50, 28, 28), dtype=np.uint8)


@pytest.fixture
def labels():
    return (np.arange(50) % 10).astype(np.uint8)


def write_pair(folder, prefix, images, labels):
    (folder / f"{prefix}images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (folder / f"{prefix}labels-idx1-ubyte").write_bytes(idx(labels))


# --- MNIST ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "t10k-"])
def test_one_pair_of_idx_files_is_cut_at_four_fifths(tmp_path, images, labels, prefix):
    write_pair(tmp_path, prefix, images, labels)
    problem = MNIST(path=str(tmp_path)).build(2, 0)
    features, classes = problem.train.tensors
    assert features.shape == (40, 1, 28, 28)
    assert np.array_equal((features[:, 0] * 255).round().numpy(), images[:40])
    assert classes.tolist() == labels[:40].tolist()
    assert problem.test.tensors[1].tolist() == labels[40:].tolist()
    assert problem.module(features[:2]).shape == (2, 10)


def test_the_full_set_brings_its_own_test_files(tmp_path, images, labels):
    write_pair(tmp_path, "train-", images, labels)
    write_pair(tmp_path, "t10k-", images[:8], labels[:8])
    problem = MNIST(path=str(tmp_path), model="linear").build(2, 0)
    assert (len(problem.train), len(problem.test)) == (50, 8)
    with pytest.raises(ConfigError, match=r"task\.test_examples: 'mnist' brings 8 test examples"):
        MNIST(path=str(tmp_path), test_examples=5).build(2, 0)


def test_missing_truncated_and_foreign_idx_files_are_named(tmp_path, images, labels, monkeypatch):
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=r"task\.path: no file or folder 'mnist10k' .* GOSSAMER_DATA is not set"
    ):
        MNIST().build(2, 0)
    with pytest.raises(ConfigError, match=r"task\.path: no file 't10k-images-idx3-ubyte' or"):
        MNIST(path=str(tmp_path)).build(2, 0)
    write_pair(tmp_path, "", images, labels[:-1])
    with pytest.raises(ConfigError, match="50 images but 49 labels"):
        MNIST(path=str(tmp_path)).build(2, 0)
    write_pair(tmp_path, "", images, labels)
    packed = tmp_path / "images-idx3-ubyte.gz"
    whole = packed.read_bytes()
    for cut, message in [
        (whole[: len(whole) // 2], "images-idx3-ubyte.gz is truncated or damaged"),
        (gzip.compress(idx(images)[:-1]), "39200|truncated or damaged"),
        (gzip.compress(idx(labels)), "is not an IDX file of 3 dimensions"),
        (b"not gzip", "is truncated or damaged"),
        (b"", "is truncated or damaged|is not an IDX file"),
    ]:
        packed.write_bytes(cut)
        with pytest.raises(ConfigError, match=message) as error:
            MNIST(path=str(tmp_path)).build(2, 0)
        assert str(error.value).startswith("task.path: ")
        assert str(packed) in str(error.value)


def test_relative_paths_are_found_below_the_data_folder(tmp_path, images, labels, monkeypatch):
    (tmp_path / "mnist10k").mkdir()
    write_pair(tmp_path / "mnist10k", "", images, labels)
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    assert len(MNIST().build(2, 0).train) == 40


# --- SVMlight -------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_svmlight_numbers_labels_and_agrees_on_the_features(tmp_path, packed):
    def write(name, text):
        path = tmp_path / (name + ".gz" * packed)
        path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
        return str(path)

    train = write("train", "-1 1:1 3:0.5\n+1 2:2\n+1 1:1\n")
    test = write("test", "+1 4:7\n")
    problem = SVMLight(path=train, test_path=test, dtype="float64").build(2, 0)
    features, labels = problem.train.tensors
    expected = [[1, 0, 0.5, 0], [0, 2, 0, 0], [1, 0, 0, 0]]
    assert torch.equal(features, torch.tensor(expected).double())
    assert labels.tolist() == [0, 1, 1]
    assert problem.test.tensors[0].tolist() == [[0, 0, 0, 7]]
    wide = SVMLight(path=train, features=9, test_examples=1).build(1, 0)
    assert wide.train.tensors[0].shape == (2, 9)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("1 1:1\n2 a:b\n", None, r"task\.path: cannot read .*train as SVMlight"),
        ("0.5 1:1\n1 1:1\n", None, r"task\.path: labels of .* must be integers .* found 0\.5"),
        ("0 1:1\n1 1:1\n", "3 1:1\n", r"task\.test_path: label 3 of .* does not occur"),
        ("", None, r"task\.path: .*train has no examples"),
        ("0 1:1\n1 1:1 2:", None, r"task\.path: cannot read"),
        ("0 1:1\n1 3000000000:1\n", None, r"task\.path: cannot read"),
        ("0 1:1\n1 2000000000:1\n", None, r"task\.path: .*train is 2 x 2000000000, too large"),
        (None, None, r"task\.path: no file or folder '.*train'; correct the path"),
    ],
)
def test_bad_svmlight_files_are_named(tmp_path, train, test, message):
    paths = {"path": str(tmp_path / "train")}
    if train is not None:
        (tmp_path / "train").write_text(train)
    if test is not None:
        paths["test_path"] = str(tmp_path / "test")
        (tmp_path / "test").write_text(test)
    with pytest.raises(ConfigError, match=message):
        SVMLight(**paths).build(1, 0)


# --- the real files -------------------------------------------------------------------------


@needs_data
def test_a9a_and_mnist10k_are_as_described():
    adult = A9A(heterogeneity="contiguous").build(8, 0)
    assert adult.train.tensors[0].shape == (32560, 123)
    assert len(adult.test) == 16281
    assert [len(s) for s in adult.shards] == [4070] * 8
    assert adult.train.tensors[1].double().mean().item() == pytest.approx(0.24, abs=0.005)
    assert [tuple(p.shape) for p in adult.module.parameters()][::2] == [(64, 123), (2, 64)]
    digits = MNIST().build(8, 0)
    assert (len(digits.train), len(digits.test)) == (8000, 2000)
