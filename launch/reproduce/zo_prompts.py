"""Prompts and schemes: what a template is worth to forward passes, and which parameters to train.

Small models that have read a small language (``sentences``), fine-tuned on 512 of its sentences by
the task ``prompted``, 16 a batch, one rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gossamer.launch.reproduce.claims import Claim, at_least, at_most, shown, skipped
from gossamer.launch.reproduce.sentences import NEUTRAL, write
from gossamer.launch.reproduce.simulation import Laboratory, Simulation

__all__ = ["alignment", "schemes"]

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
    if why := _missing("transformers"):
        yield skipped("A template that asks", ">= 0.86", why)
        return
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


@dataclass(frozen=True)
class _Method:
    """A row of the table.

    Attributes:
        optimizer: its name.
        rates: of the schemes, in their order: the best of three or more a factor of three apart,
            for one seed on the test sentences themselves; derivatives take those of two losses.
        oracle: its fields; losses get the scheme's eps.
        algorithm: its name.
        steps: of a run.
    """

    optimizer: str
    rates: tuple[float, float, float, float]
    oracle: Mapping[str, Any] = field(default_factory=lambda: _LOSSES)
    algorithm: str = "all-reduce"
    steps: int = 1000


_EPS = {"full": 1e-3, "lora": 1e-2, "prefix": 1e-1, "prompt": 1e-3}
"""Scheme -> how far apart losses are taken: the defaults of arXiv:2305.17333."""
_FORWARD = {**_LOSSES, "estimate": "forward"}
_RATES = (3e-4, 3e-3, 0.3, 0.01)
_METHODS = {
    "backpropagation, SGD": _Method("sgd", (0.03, 1.0, 3.0, 1.0), _GRADIENTS, steps=100),
    "backpropagation, Adam": _Method("adam", (1e-3, 0.01, 0.1, 0.03), _GRADIENTS, steps=100),
    "forward derivatives, SGD": _Method("sgd", _RATES, _FORWARD),
    "losses, SGD": _Method("sgd", _RATES),
    "losses, momentum": _Method("momentum", (3e-5, 3e-4, 0.03, 1e-3)),
    "losses, conservative": _Method("sgd", (3e-4, 9e-3, 0.3, 0.09), algorithm="conservative"),
    "losses, signs": _Method("sign-sgd", (3e-4, 9e-4, 9e-3, 9e-3)),
    "losses, Adam": _Method("adam", (3e-4, 1e-3, 3e-3, 0.03)),
}


def schemes(lab: Laboratory) -> Iterator[Claim]:
    """Optimizers times schemes, on one pretrained model and the template that asks."""
    if why := _missing("transformers", "peft"):
        yield skipped("Optimizers times schemes", "", why)
        return
    with _models(1) as (folder,):
        runs = {
            (name, scheme): _run(
                folder,
                method.steps,
                {**method.oracle, **({"eps": eps} if method.oracle is not _GRADIENTS else {})},
                {"name": method.optimizer, "lr": lr},
                scheme=scheme,
                algorithm=method.algorithm,
            )
            for name, method in _METHODS.items()
            for (scheme, eps), lr in zip(_EPS.items(), method.rates, strict=True)
        }
        found = lab.run({", ".join(key): run for key, run in runs.items()})
    mean = {key: float(found[", ".join(key)].last("accuracy").mean()) for key in runs}
    for name in _METHODS:
        row = [mean[name, scheme] for scheme in _EPS]
        yield shown(
            f"{name}: mean accuracy of the schemes",
            sum(row) / len(row),
            lab.seeds,
            ", ".join(f"{scheme} {value:.3f}" for scheme, value in zip(_EPS, row, strict=True)),
        )
    by_losses = [name for name in _METHODS if name.startswith("losses")]
    start = {scheme: found[f"losses, SGD, {scheme}"].first("accuracy").mean() for scheme in _EPS}
    yield at_least(
        "Two losses: the least that any optimizer and scheme adds to the start",
        min(mean[name, scheme] - start[scheme] for name in by_losses for scheme in _EPS),
        0.03,
        lab.seeds,
        "start: " + ", ".join(f"{scheme} {value:.3f}" for scheme, value in start.items()),
    )
    yield at_most(
        "Derivatives in place of two losses: largest difference of accuracy over the schemes",
        max(abs(mean["forward derivatives, SGD", s] - mean["losses, SGD", s]) for s in _EPS),
        0.01,
        lab.seeds,
    )
    best = {s: max(mean[name, s] for name in _METHODS) for s in _EPS}
    yield at_most(
        "LoRA, two losses: the worst optimizer's distance from the best of all",
        max(best["lora"] - mean[name, "lora"] for name in by_losses),
        0.03,
        lab.seeds,
    )


def _missing(*packages: str) -> str:
    """Return what to install, or nothing."""
    lacking = [name for name in packages if find_spec(name) is None]
    return f"not tested: needs {', '.join(lacking)}: gossamer[huggingface]" if lacking else ""
