"""What tests of the pretraining task share: a small model, texts, and a folder without a hub."""

import json

import pytest

from gossamer.algorithms.registry import find
from gossamer.runtime.component import validate

datasets = pytest.importorskip("datasets", reason="needs the extra: gossamer[huggingface]")

SHAPE = {"hidden": 16, "layers": 1, "heads": 2, "ffn": 24}
TEXTS = [f"{k}: the film " + "is good and " * (k % 5) for k in range(40)]
STREAM = {"streaming": True, "shuffle_buffer": 7, "documents": "single", "context": 64}


def stay_here(monkeypatch, folder):
    """Work in the folder, where data are looked for too; the hub cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    monkeypatch.setenv("GOSSAMER_DATA", str(folder))
    monkeypatch.chdir(folder)


def save_lines(path, texts, column="text"):
    path.write_text("".join(json.dumps({column: text, "k": 0}) + "\n" for text in texts))
    return path.name


def build(n=2, seed=0, **fields):
    values = {"model": SHAPE, "context": 8, **fields}
    return validate(find("task", "pretraining"), values, "task").build(n, seed)
