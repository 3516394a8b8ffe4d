"""Prompts and schemes: what a template is worth to forward passes, and which parameters to train.

Small models that have read a small language (``sentences``), fine-tuned on 512 of its sentences by
the task ``prompted``, 16 a batch, one rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gossamer.launch.reproduce.claims import Claim, at_least, at_most
from gossamer.launch.reproduce.sentences import NEUTRAL, write
from gossamer.launch.reproduce.simulation import Laboratory, Simulation

__all__ = ["alignment"]

Values = dict[str, Any]

_ALIGNED: Values = {
    "template": "{sentence} it was {label}",
    "labels": {"0": "terrible", "1": "great"},
}
_MISALIGNED: Values = {
    "template": "{sentence} {label}",
    "labels": {"0": NEUTRAL[0], "1": NEUTRAL[1]},
}
_LOSSES, _GRADIENTS = {"name": "zeroth-order"}, {"name": "backprop"}


@contextmanager
def _models(count: int) -> Iterator[list[Path]]:
    """Write models and sentences, and take them away afterwards."""
    with TemporaryDirectory(prefix="gossamer-sentences-") as folder:
        folders = [Path(folder) / str(k) for k in range(count)]
        for seed, path in enumerate(folders):
            path.mkdir()
            write(path, seed)
        yield folders


def _run(
    folder: Path,
    steps: int,
    oracle: Mapping[str, Any],
    optimizer: Values,
    template: Values = _ALIGNED,
    scheme: str = "full",
    algorithm: str = "all-reduce",
) -> Simulation:
    task: Values = {
        "name": "prompted",
        "model": str(folder / "model"),
        "dataset": str(folder / "data"),
        "test_split": "test",
        "train_examples": None,
        "dev_examples": 0,
        "test_examples": None,
        "context": 16,
        "scheme": scheme,
        **template,
    }
    values: Values = {
        "task": task,
        "oracle": {"batch_size": 16, **oracle},
        "optimizer": optimizer,
        "algorithm": {"name": algorithm},
        "ranks": 1,
        "steps": steps,
    }
    return Simulation(values, evaluator={"per_rank": False})


def alignment(lab: Laboratory) -> Iterator[Claim]:
    """A template that says what is asked for, and one that does not: two pretrained models."""
    templates = {"aligned": _ALIGNED, "misaligned": _MISALIGNED}
    with _models(2) as folders:
        runs = {
            (what, how, k): _run(folder, steps, oracle, {"name": "sgd", "lr": lr}, template)
            for k, folder in enumerate(folders)
            for what, template in templates.items()
            for how, steps, oracle, lr in (
                ("losses", 1000, _LOSSES, 3e-4),
                ("gradients", 50, _GRADIENTS, 0.1),
            )
        }
        found = lab.run({" ".join(map(str, name)): run for name, run in runs.items()})

    def accuracy(what: str, how: str) -> float:
        samples = [found[f"{what} {how} {k}"] for k in range(len(folders))]
        return float(sum(sample.last("accuracy").mean() for sample in samples) / len(samples))

    def before(what: str) -> str:
        start = [found[f"{what} losses {k}"].first("accuracy").mean() for k in range(len(folders))]
        return "zero-shot " + " and ".join(f"{value:.3f}" for value in start)

    aligned, misaligned = (accuracy(what, "losses") for what in templates)
    yield at_least(
        "Template that asks, 1,000 steps of two losses: accuracy",
        aligned,
        0.86,
        lab.seeds,
        before("aligned"),
    )
    yield at_least(
        "The same, beyond a template that does not ask",
        aligned - misaligned,
        0.08,
        lab.seeds,
        f"{misaligned:.3f}; {before('misaligned')}",
    )
    first = [accuracy(what, "gradients") for what in templates]
    yield at_most(
        "Backpropagation, 50 steps: difference between the templates",
        abs(first[0] - first[1]),
        0.05,
        lab.seeds,
        f"{first[0]:.3f} and {first[1]:.3f}",
    )
