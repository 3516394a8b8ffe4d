"""Images of one's own, and pairs with captions: what is read, and what a broken file says."""

import gzip
import json
import math

import numpy as np
import pytest
import torch
from contrastive_for_tests import build, evaluate, rows_of, written_out
from PIL import Image

from gossamer.algorithms.tasks import image_files
from gossamer.runtime.collectives import RankGroup
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.transports.stacked import StackedTransport

TINY = {"encoder": {"name": "mlp", "hidden": [8], "dim": 4}}
GRAY_OR_COLOR = pytest.mark.parametrize("channels", [None, 1, 3])


def photographs(count=12, height=6, width=5, channels=3):
    shape = (count, height, width, *([channels] if channels else []))
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def figures_of(problem, n=2):
    x, layout = rows_of(problem, n, scale=0)
    return evaluate(RankGroup(n, StackedTransport()), problem, x, layout)


def everything(dataset):
    return dataset[torch.arange(len(dataset))]


# --- arrays -----------------------------------------------------------------------------------


@GRAY_OR_COLOR
def test_arrays_of_bytes_stay_bytes_with_channels_first(tmp_path, channels):
    images = photographs(channels=channels)
    np.save(tmp_path / "some.npy", images)
    problem = build(data={"name": "arrays", "path": str(tmp_path / "some.npy")}, **TINY)
    (found,) = everything(problem.train)
    assert found.dtype == torch.uint8
    expected = images[..., None] if channels is None else images
    assert np.array_equal(found.permute(0, 2, 3, 1), expected)
    figures = figures_of(problem)
    assert math.isfinite(figures["loss"])
    assert not [name for name in figures if "knn" in name or "probe" in name]  # nothing has labels


def test_arrays_bring_labels_and_test_images(tmp_path, monkeypatch):
    images, labels = photographs(20) / 255, np.arange(20) % 3
    arrays = {"images": images[:12], "labels": labels[:12]}
    tests = {"test_images": images[12:], "test_labels": labels[12:]}
    np.savez(tmp_path / "all.npz", **arrays, **tests)
    np.savez(tmp_path / "train.npz", images=images, labels=labels)
    monkeypatch.setenv("GOSSAMER_DATA", str(tmp_path))
    brought = build(data={"name": "arrays", "path": "all.npz"}, heterogeneity="sorted", **TINY)
    held = build(data={"name": "arrays", "path": "train.npz"}, test_examples=8, **TINY)
    for problem in (brought, held):
        (found,) = everything(problem.train)
        assert found.dtype == torch.float32
        assert np.array_equal(found.permute(0, 2, 3, 1), images[:12].astype(np.float32))
        assert problem.figures.probing.test.labels.tolist() == labels[12:].tolist()
        assert 0 <= figures_of(problem)["knn1_accuracy"] <= 1
    assert sorted(labels[brought.shards[0]]) == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("arrays", "fields", "message"),
    [
        ({"pictures": photographs()}, {}, r"has no array 'images', but pictures"),
        ({"images": photographs()[0]}, {}, None),  # (6, 5, 3): three gray images of 5x3
        ({"images": photographs().transpose(0, 3, 1, 2)}, {}, r"at most 4 channels, got shape"),
        ({"images": photographs().astype(np.int64)}, {}, r"must be uint8 or floating, got int64"),
        ({"images": photographs() / 1.0}, {}, r"must lie in 0\.\.1, got 0\.\.255; scale them"),
        ({"images": photographs() / 255, "labels": np.zeros(3, int)}, {}, r"labels must be 12"),
        ({"images": photographs() / 255, "labels": np.full(12, -1)}, {}, r"labels must be 12"),
        ({"images": photographs()[:1]}, {}, r"task\.data: 'arrays' has 1 training examples; give"),
        ({"images": photographs()}, {"probes": ["knn"]}, r"task\.probes: need labelled images"),
        ({"images": photographs()}, {"test_examples": 11}, r"test_examples: must leave 2 of"),
        ({"images": photographs()}, {"heterogeneity": "sorted"}, r"sorted needs classes"),
        ({"images": photographs(channels=2)}, {"views": {"recipe": "simclr"}}, r"1 or 3 channels"),
    ],
)
def test_arrays_that_do_not_fit_are_named(tmp_path, arrays, fields, message):
    np.savez(tmp_path / "some.npz", **arrays)
    data = {"name": "arrays", "path": str(tmp_path / "some.npz")}
    if message is None:
        assert len(build(n=2, data=data, **TINY).train) == 6
        return
    with pytest.raises(ConfigError, match=message):
        build(n=1, data=data, **TINY, **fields)


def test_damaged_and_pickled_arrays_are_refused(tmp_path):
    path = tmp_path / "some.npy"
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    data = {"name": "arrays", "path": str(path)}
    with pytest.raises(ConfigError, match=r"task\.data\.path: cannot read .*without pickled"):
        build(data=data)
    path.write_bytes(b"no array")
    with pytest.raises(ConfigError, match=r"task\.data\.path: cannot read"):
        build(data=data)


# --- folders ----------------------------------------------------------------------------------


def write_folder(folder, classes=("cat", "dog", "eel"), each=4):
    images = photographs(len(classes) * each, 10, 14)
    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            Image.fromarray(images[k * each + i]).save(folder / name / f"{i}.png")
    return images


@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_a_folder_of_classes_gives_central_squares_class_by_class(tmp_path, monkeypatch, kept):
    monkeypatch.setattr(image_files, "_KEPT_BYTES", kept)
    images = write_folder(tmp_path / "train")
    write_folder(tmp_path / "test", each=2)
    data = {"name": "folder", "path": str(tmp_path / "train"), "size": 10}
    problem = build(
        n=3,
        data={**data, "test_path": str(tmp_path / "test")},
        heterogeneity="contiguous",
        views={"mode": "finite", "recipe": "simclr"},
        **TINY,
    )
    (found,) = problem.train[torch.tensor([5, 0])]
    assert found.dtype == torch.uint8
    squares = images[[5, 0], :, 2:12]
    assert np.array_equal(found.permute(0, 2, 3, 1), squares)
    assert problem.figures.probing.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert problem.figures.probing.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert 0 <= figures_of(problem)["knn1_accuracy"] <= 1


def test_a_folder_of_images_alone_has_no_classes(tmp_path):
    write_folder(tmp_path, classes=(".",))
    problem = build(n=1, data={"name": "folder", "path": str(tmp_path), "size": 8}, **TINY)
    assert everything(problem.train)[0].shape == (4, 3, 8, 8)
    assert problem.figures.probing is None
    (tmp_path / "more").mkdir()
    with pytest.raises(ConfigError, match=r"task\.data\.path: .* holds images beside folders"):
        build(data={"name": "folder", "path": str(tmp_path), "size": 8})


def test_folders_that_do_not_fit_are_named(tmp_path):
    data = {"name": "folder", "path": str(tmp_path / "train"), "size": 8}
    with pytest.raises(ConfigError, match=r"task\.data\.path: no file or folder"):
        build(data=data)
    with pytest.raises(ConfigError, match=r"task\.data\.size: missing"):
        build(data={"name": "folder", "path": str(tmp_path)})
    (tmp_path / "train").write_text("no folder")
    with pytest.raises(ConfigError, match=r"task\.data\.path: .* is a file, not a folder"):
        build(data=data)
    (tmp_path / "train").unlink()
    write_folder(tmp_path / "train")
    (tmp_path / "train" / "fox").mkdir()
    with pytest.raises(ConfigError, match=r"task\.data\.path: no image in .*fox; it must hold"):
        build(data=data)
    (tmp_path / "train" / "fox" / "broken.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"cannot read the image .*broken\.png \(.*correct or"):
        build(data=data)
    (tmp_path / "train" / "fox" / "broken.png").unlink()
    (tmp_path / "train" / "fox").rmdir()
    write_folder(tmp_path / "test", classes=("cat", "dog"))
    with pytest.raises(ConfigError, match=r"task\.data\.test_path: .*classes cat, dog, and those"):
        build(data={**data, "test_path": str(tmp_path / "test")})


# --- datasets ---------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A dataset on disk: 12 images of 3 classes, 6 to test, 8 without classes, 8 half so."""
    datasets = pytest.importorskip("datasets", reason="needs the extra: gossamer[huggingface]")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    classes = {"train": [0, 1, 2] * 4, "test": [0, 1, 2] * 2}
    classes |= {"unlabeled": [-1] * 8, "mixed": [-1, 0] * 4}
    columns = {"image": datasets.Image(), "label": datasets.Value("int64")}
    features = datasets.Features({**columns, "said": datasets.Value("string")})
    images = photographs(12, 10, 10)
    splits = {
        split: datasets.Dataset.from_dict(
            {
                "image": [Image.fromarray(i) for i in images[: len(labels)]],
                "label": labels,
                "said": [f"class {label}" for label in labels],
            },
            features=features,
        )
        for split, labels in classes.items()
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    return {"name": "dataset", "dataset": str(tmp_path / "saved"), "size": 10}, images


def test_a_dataset_gives_the_images_and_labels_of_its_splits(saved):
    data, images = saved
    problem = build(data={**data, "test_split": "test"}, heterogeneity="sorted", **TINY)
    assert np.array_equal(everything(problem.train)[0].permute(0, 2, 3, 1), images)
    assert problem.figures.probing.test.labels.tolist() == [0, 1, 2] * 2
    assert 0 <= figures_of(problem)["knn1_accuracy"] <= 1


def test_images_without_classes_are_trained_on_while_probes_learn_from_others(saved):
    data, _ = saved
    splits = {"train_split": "unlabeled", "probe_split": "train", "test_split": "test"}
    problem = build(data={**data, **splits}, **TINY)
    assert len(problem.train) == 8
    assert len(problem.figures.probing.train.labels) == 12
    assert 0 <= figures_of(problem)["knn10_accuracy"] <= 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "/nowhere"}, r"task\.data\.dataset: cannot load '/nowhere'"),
        ({"train_split": "trian"}, r"task\.data\.train_split: .* no split 'trian'; did you mean"),
        ({"image": "img"}, r"task\.data\.image: .* has no column 'img'"),
        ({"train_split": "mixed"}, r"task\.data\.label: some of split 'mixed' are negative"),
        ({"label": "said"}, r"task\.data\.label: column 'said' .* holds no classes"),
        ({"image": "label"}, r"task\.data\.image: column 'label' .* holds no images, but int"),
    ],
)
def test_datasets_that_do_not_fit_are_named(saved, fields, message):
    with pytest.raises(ConfigError, match=message):
        build(data={**saved[0], **fields}, **TINY)


# --- pairs ------------------------------------------------------------------------------------

CAPTIONS = [f"a picture of number {k}, wünderbar" for k in range(12)]


def test_arrays_of_pairs_are_two_views_with_an_exact_loss(tmp_path):
    images = photographs()
    np.savez(tmp_path / "pairs.npz", images=images, captions=np.array(CAPTIONS))
    data = {"name": "pairs", "path": str(tmp_path / "pairs.npz"), "context": 24}
    problem = build(data=data, examples=10, dtype="float64", **TINY)
    assert problem.contrast.mode == "pairs"
    found, tokens = everything(problem.train)
    assert np.array_equal(found.permute(0, 2, 3, 1), images[:10])
    assert bytes(tokens[3].to(torch.uint8).tolist()) == CAPTIONS[3].encode()[:24]
    x, layout = rows_of(problem, 2)
    problem.figures.beta = 4.0
    figures = evaluate(RankGroup(2, StackedTransport()), problem, x, layout)
    grad = torch.zeros(layout.d, dtype=torch.float64)
    layout.bind(problem.module, x.mean(dim=0), grad)
    ids, views = torch.arange(10), problem.contrast
    sides = [
        views.embed(problem.module, views.held((found, tokens), ids, view), view) for view in (0, 1)
    ]
    loss = written_out(torch.stack(sides), 4.0, pairs=True)
    loss.backward()
    assert figures["loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert figures["grad_norm"] == pytest.approx(grad.norm().item(), rel=1e-10)
    assert figures["collapsed_loss"] == pytest.approx(math.log(9))


@pytest.mark.parametrize("packed", [False, True])
def test_lines_name_images_beside_the_file(tmp_path, packed):
    images = write_folder(tmp_path / "files", classes=("all",), each=12)
    rows = [
        {"image": f"files/all/{k}.png", "caption": caption} for k, caption in enumerate(CAPTIONS)
    ]
    content = "\n".join(map(json.dumps, rows)).encode() + b"\n\n"
    path = tmp_path / ("pairs.jsonl.gz" if packed else "pairs.jsonl")
    path.write_bytes(gzip.compress(content) if packed else content)
    text = {"name": "transformer", "hidden": 8, "layers": 1, "heads": 2}
    problem = build(data={"name": "pairs", "path": str(path), "size": 10}, text=text, **TINY)
    found, tokens = everything(problem.train)
    assert np.array_equal(found[7].permute(1, 2, 0), images[7][:, 2:12])
    length = len(CAPTIONS[7].encode())
    assert bytes(tokens[7, :length].to(torch.uint8).tolist()) == CAPTIONS[7].encode()
    assert (tokens[7, length:] == -1).all()
    assert math.isfinite(figures_of(problem)["loss"])


@pytest.mark.parametrize(
    ("content", "fields", "message"),
    [
        ("{", {}, r"task\.data\.path: line 1 of .* is no JSON"),
        ('{"image": "a.png"}', {}, r"line 1 of .* has no text 'caption'; set task\.data\.caption"),
        ('{"image": "a.png", "caption": "x"}', {}, r"cannot read the image .*a\.png"),
        ("", {}, r"task\.data: 'pairs' has 0 training examples"),
        ("", {"size": None}, r"task\.data\.size: missing"),
    ],
)
def test_lines_that_do_not_fit_are_named(tmp_path, content, fields, message):
    (tmp_path / "pairs.jsonl").write_text(content)
    data = {"name": "pairs", "path": str(tmp_path / "pairs.jsonl"), "size": 8, **fields}
    with pytest.raises(ConfigError, match=message):
        build(data=data, **TINY)


@pytest.mark.parametrize(
    ("arrays", "fields", "message"),
    [
        ({"images": photographs()}, {}, r"must hold 'images' and 'captions' \(text\), has images"),
        ({"images": photographs(), "captions": np.arange(12)}, {}, r"must hold .*captions"),
        ({"images": photographs(), "captions": np.array(["a"])}, {}, r"12 images and captions of"),
        ({"images": photographs(), "captions": np.array(CAPTIONS)}, {"size": 5}, r"on arrays"),
    ],
)
def test_arrays_of_pairs_that_do_not_fit_are_named(tmp_path, arrays, fields, message):
    np.savez(tmp_path / "pairs.npz", **arrays)
    data = {"name": "pairs", "path": str(tmp_path / "pairs.npz"), **fields}
    with pytest.raises(ConfigError, match=message):
        build(data=data, **TINY)


@pytest.mark.parametrize(
    "field",
    [{"views": {"mode": "finite"}}, {"probes": ["knn"]}, {"test_examples": 3}],
)
def test_fields_without_effect_on_pairs_are_refused(field):
    with pytest.raises(ConfigError, match=f"task.{next(iter(field))}: has no effect on pairs"):
        build(data={"name": "pairs", "path": "pairs.npz"}, **field)
