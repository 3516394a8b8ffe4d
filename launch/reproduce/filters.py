"""What filters of private gradients gain: at large learning rates, and at tuned ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gossamer.algorithms.tasks.files import DATA_VARIABLE, find_data
from gossamer.launch.reproduce.claims import (
    Claim,
    at_least,
    at_most,
    between,
    shown,
    skipped,
)
from gossamer.launch.reproduce.private import (
    BASELINE,
    FILTERS,
    Cell,
    Gain,
    Runs,
    Setting,
    best,
    run_cells,
)
from gossamer.launch.reproduce.simulation import Laboratory, Sample

__all__ = [
    "DIGITS",
    "DIGITS_TASK",
    "EPSILONS",
    "LARGE_RATES",
    "SAMPLED_DIGITS",
    "characters",
    "convolutions",
    "large_rates",
    "mnist",
    "small_convolutions",
    "tuned_rates",
]

Values = dict[str, Any]

_POINT = 0.01
_EXAMPLES = 1437

DIGITS_TASK: Values = {
    "name": "digits",
    "model": "mlp",
    "hidden": [32],
    "activation": "tanh",
    "normalize": [0.3, 0.37],
    "test_examples": 360,
    "shuffle_seed": 0,
}
DIGITS = Setting(
    "digits, all examples, 30 steps", DIGITS_TASK, _EXAMPLES, 30, loss="nonprivate_loss"
)
SAMPLED_DIGITS = Setting("digits, batch 256, 200 steps", DIGITS_TASK, _EXAMPLES, 200, 256)

_IMAGES: Values = {
    "name": "digits",
    "model": "convnet",
    "activation": "relu",
    "normalize": [0.3, 0.37],
    "test_examples": 360,
    "shuffle_seed": 0,
}
_SMALL_CONVNET = Setting(
    "digits, two convolutions of 8 and 16 maps, batch 128, 100 steps",
    {**_IMAGES, "channels": [8, 16], "groups": [2, 4]},
    _EXAMPLES,
    100,
    128,
)
_CONVNET = Setting(
    "digits, two convolutions of 16 and 32 maps, batch 256, 100 steps",
    {**_IMAGES, "channels": [16, 32], "groups": 4, "global_pool": True},
    _EXAMPLES,
    100,
    256,
)
_CHARACTERS = Setting(
    "characters of Python's documentation, batch 2048, 200 steps",
    {"name": "custom", "build": "gossamer.launch.reproduce.problems:characters"},
    200_000,
    200,
    2048,
    delta=1e-6,
)
_MNIST = Setting(
    "MNIST, 8,000 images, two convolutions of 8 and 16 maps, batch 256, 60 steps",
    {
        "name": "mnist",
        "model": "convnet",
        "activation": "relu",
        "channels": [8, 16],
        "normalize": [0.1307, 0.3081],
    },
    8000,
    60,
    256,
)


# --- at given rates ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """What a method has to reach beside DP-SGD.

    Attributes:
        gain: points of accuracy, at least.
        ratio: of the losses, at most.
    """

    gain: float | None = None
    ratio: float | None = None


Bounds = Mapping[tuple[str, float, float], Bound]
"""By method, epsilon and learning rate."""

LARGE_RATES: tuple[Cell, ...] = ((0.5, 32), (1, 16), (1, 32), (2, 32), (4, 16), (8, 32))
_LARGE_RATE_BOUNDS: Bounds = {
    ("ema(.5)", 8, 32): Bound(2.0, 0.65),
    ("DiSK .5", 1, 32): Bound(1.0, 0.95),
    ("DiSK .5", 2, 32): Bound(1.0, 0.95),
    ("DiSK .3", 1, 32): Bound(2.0),
    ("DiSK .3", 2, 32): Bound(2.0),
}
_SMALL_CELLS: tuple[Cell, ...] = ((1, 1), (1, 4), (2, 1), (2, 4))
_MNIST_CELLS: tuple[Cell, ...] = ((2, 0.5), (2, 2))
_SMALL_BOUNDS: Bounds = {
    ("DiSK .5", 2, 4): Bound(ratio=0.88),
    ("DiSK .3", 2, 4): Bound(2.5, 0.85),
}


def large_rates(
    lab: Laboratory, methods: Sequence[str], cells: Sequence[Cell] = LARGE_RATES
) -> Iterator[Claim]:
    """Digits with every example at every step: few steps, long ones."""
    yield from _at_cells("Large rate", lab, DIGITS, methods, cells, _LARGE_RATE_BOUNDS)


def small_convolutions(
    lab: Laboratory, methods: Sequence[str], cells: Sequence[Cell] = _SMALL_CELLS
) -> Iterator[Claim]:
    """Digits seen by a small convolutional network, at a tuned rate and at a large one."""
    yield from _at_cells("CNN", lab, _SMALL_CONVNET, methods, cells, _SMALL_BOUNDS)


def mnist(lab: Laboratory, methods: Sequence[str]) -> Iterator[Claim]:
    """MNIST at one epsilon and two rates."""
    if find_data("mnist10k") is None:
        why = f"not run: set {DATA_VARIABLE} to a folder with mnist10k"
        yield skipped(f"MNIST: {', '.join(methods)} - {BASELINE}, points", "", why)
        return
    yield from _at_cells("MNIST", lab, _MNIST, methods, _MNIST_CELLS, {})


def _at_cells(
    group: str,
    lab: Laboratory,
    setting: Setting,
    methods: Sequence[str],
    cells: Sequence[Cell],
    bounds: Bounds,
) -> Iterator[Claim]:
    runs = run_cells(lab, setting, (BASELINE, *methods), cells)
    what = "test loss" if setting.loss == "test_loss" else "training loss"
    for epsilon, lr in cells:
        plain = runs[BASELINE, epsilon, lr]
        loss = float(plain.last(setting.loss).mean())
        yield shown(
            f"{group}: {setting.title}, epsilon = {epsilon:g}, lr = {lr:g}: {BASELINE}: accuracy",
            float(plain.last("accuracy").mean()),
            lab.seeds,
            f"{what} {loss:.3g}",
        )
        for method in methods:
            sample = runs[method, epsilon, lr]
            gain = Gain.of(sample.last("accuracy"), plain.last("accuracy"), _POINT)
            ratio = float(sample.last(setting.loss).mean()) / loss
            bound = bounds.get((method, epsilon, lr), Bound())
            where = f"The same, epsilon = {epsilon:g}, lr = {lr:g}: {method}"
            claim, note = f"{where} - {BASELINE}, points", f"{gain}; {what} x {ratio:.2f}"
            if bound.gain is None:
                yield shown(claim, gain.mean, lab.seeds, note)
            else:
                yield at_least(claim, gain.mean, bound.gain, lab.seeds, note)
            if bound.ratio is not None:
                yield at_most(f"{where}: {what} / {BASELINE}'s", ratio, bound.ratio, lab.seeds)


# --- at the best rate of each --------------------------------------------------------------------

EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0)
_RATES = (2.0, 4.0, 8.0, 16.0, 32.0)
_CONVNET_RATES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
_WINNERS = ("ema(.9)", "DiSK .3")


def tuned_rates(
    lab: Laboratory, methods: Sequence[str], epsilons: Sequence[float] = EPSILONS
) -> Iterator[Claim]:
    """Digits with every example at every step, each method at its best rate: no gain."""
    cells = [(epsilon, lr) for epsilon in epsilons for lr in _RATES]
    runs = run_cells(lab, DIGITS, (BASELINE, *methods), cells)
    for epsilon in epsilons:
        plain, at = best(runs, BASELINE, epsilon, _RATES)
        yield shown(
            f"Tuned rate: {DIGITS.title}, epsilon = {epsilon:g}: {BASELINE}: best accuracy",
            plain,
            lab.seeds,
            _over_rates(runs, BASELINE, epsilon, _RATES),
        )
        for method in methods:
            _, lr = best(runs, method, epsilon, _RATES)
            gain = Gain.of(
                runs[method, epsilon, lr].last("accuracy"),
                runs[BASELINE, epsilon, at].last("accuracy"),
                _POINT,
            )
            claim = (
                f"The same, epsilon = {epsilon:g}: best of {method} - best of {BASELINE}, points"
            )
            note = f"{gain}; {_over_rates(runs, method, epsilon, _RATES)}"
            if method in FILTERS:
                yield between(claim, gain.mean, -1.5, 1.0, lab.seeds, note)
            else:
                yield shown(claim, gain.mean, lab.seeds, note)


def convolutions(
    lab: Laboratory,
    methods: Sequence[str],
    rates: Mapping[str, Sequence[float]] | None = None,
) -> Iterator[Claim]:
    """Digits seen by a larger network: the filters win against tuned DP-SGD, as momentum does.

    Args:
        lab: to run in.
        methods: beside DP-SGD.
        rates: those to run, by method; fewer for a method that wins make the claim harder.
    """
    epsilon = 4.0
    grid = {m: (rates or {}).get(m, _CONVNET_RATES) for m in (BASELINE, *methods)}
    runs: dict[tuple[str, float, float], Sample] = {}
    for method, tried in grid.items():
        runs |= run_cells(lab, _CONVNET, [method], [(epsilon, lr) for lr in tried])
    plain, at = best(runs, BASELINE, epsilon, grid[BASELINE])
    yield shown(
        f"CNN: {_CONVNET.title}, epsilon = {epsilon:g}: {BASELINE}: best accuracy",
        plain,
        lab.seeds,
        _over_rates(runs, BASELINE, epsilon, grid[BASELINE]),
    )
    for method in methods:
        _, lr = best(runs, method, epsilon, grid[method])
        ours, theirs = runs[method, epsilon, lr], runs[BASELINE, epsilon, at]
        gain = Gain.of(ours.last("accuracy"), theirs.last("accuracy"), _POINT)
        claim = f"The same: best of {method} - best of {BASELINE}, points"
        note = f"{gain}; {_over_rates(runs, method, epsilon, grid[method])}"
        if method in _WINNERS:
            yield at_least(claim, gain.mean, 7.0, lab.seeds, note)
        else:
            yield shown(claim, gain.mean, lab.seeds, note)


def _over_rates(runs: Runs, method: str, epsilon: float, rates: Sequence[float]) -> str:
    means = [f"{runs[method, epsilon, lr].last('accuracy').mean():.3f}" for lr in rates]
    return f"lr {'/'.join(f'{lr:g}' for lr in rates)}: {'/'.join(means)}"


# --- text ----------------------------------------------------------------------------------------

_TEXT_RATES = (8.0, 11.0, 16.0, 24.0)
_TEXT_BOUNDS = {("ema(.5)", 16.0): -0.03, ("DiSK .5", 16.0): -0.03}


def characters(
    lab: Laboratory, methods: Sequence[str], rates: Sequence[float] = _TEXT_RATES
) -> Iterator[Claim]:
    """200,000 windows of text: many examples, little noise in each step."""
    epsilon = 0.5
    runs = run_cells(lab, _CHARACTERS, (BASELINE, *methods), [(epsilon, lr) for lr in rates])
    for lr in rates:
        plain = runs[BASELINE, epsilon, lr].last("test_loss")
        yield shown(
            f"Text: {_CHARACTERS.title}, epsilon = {epsilon:g}, lr = {lr:g}: {BASELINE}: test loss",
            float(plain.mean()),
            lab.seeds,
            f"lowest of the seeds {plain.min():.3f}, highest {plain.max():.3f}",
        )
        for method in methods:
            change = Gain.of(runs[method, epsilon, lr].last("test_loss"), plain)
            claim, bound = f"The same, lr = {lr:g}: {method} - {BASELINE}", (method, lr)
            if bound in _TEXT_BOUNDS:
                yield at_most(claim, change.mean, _TEXT_BOUNDS[bound], lab.seeds, str(change))
            else:
                yield shown(claim, change.mean, lab.seeds, str(change))
