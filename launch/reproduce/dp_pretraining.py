"""DP-CPT (arXiv:2402.18752): public data first, then private; and other ways to use both.

Digits: a few of the training examples are public, the others private. Every seed has a split of its
own into training and test set and so other public examples: with so few of them, which they are
counts for several points of accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from gossamer.launch.reproduce.claims import Claim, at_least, shown
from gossamer.launch.reproduce.filters import DIGITS_TASK
from gossamer.launch.reproduce.paper import Paper
from gossamer.launch.reproduce.private import Gain, noise_multiplier
from gossamer.launch.reproduce.simulation import Laboratory, Simulation

__all__ = ["PAPER", "Rates", "digits", "digits_twice_as_public"]

Values = dict[str, Any]
Method = Literal["only public", "only private", "Sample", "DPMD", "DP-CPT"]

_MIXES: dict[Method, str] = {"only private": "only-private", "Sample": "sample", "DPMD": "dpmd"}
Rates = Mapping[Method, Sequence[float]]
"""Learning rates to try, by method that uses private examples."""

_EXAMPLES, _BATCH, _DELTA = 1437, 256, 1e-5
_PRIVATE_STEPS, _PUBLIC_STEPS, _PUBLIC_RATE = 100, 200, 0.5
_METHODS: tuple[Method, ...] = ("only private", "Sample", "DPMD", "DP-CPT")
_ALL_RATES: Rates = dict.fromkeys(_METHODS, (0.03, 0.1, 0.3, 0.6))
_POINT = 0.01

_MORE_THAN: Mapping[float, Mapping[Method, float]] = {
    0.5: {"only private": 6.0, "only public": 1.0},
    1.0: {"only private": 2.0, "only public": 2.5},
}
"""epsilon -> by how many points DP-CPT is to be above a method, with 72 public examples."""


def run(method: Method, public: int, epsilon: float, lr: float) -> Simulation:
    """Return a run with ``public`` examples; the rate of public steps is the same for all."""
    steps, private_lr, more = _PRIVATE_STEPS, lr, Values()
    if method == "only public":
        steps, private_lr, more = _PUBLIC_STEPS, _PUBLIC_RATE, {"mix": "only-public"}
    elif method == "DP-CPT":
        steps += _PUBLIC_STEPS
        more = {"mix": "switch", "switch": _PUBLIC_STEPS / steps, "scale": _PUBLIC_RATE / lr}
    else:
        more = {"mix": _MIXES[method]}
    if method != "only private":
        more["sampling"] = "full"
    rate = _BATCH / (_EXAMPLES - public)
    sigma = noise_multiplier(epsilon, _DELTA, rate, _PRIVATE_STEPS)
    values = {
        "task": DIGITS_TASK,
        "oracle": [
            {"name": "backprop", "batch_size": _BATCH},
            {"name": "dp", "noise_multiplier": sigma, "delta": _DELTA},
            {"name": "public", "fraction": public / _EXAMPLES, "indices": "first", **more},
        ],
        "optimizer": {"name": "sgd", "lr": private_lr},
        "algorithm": {"name": "all-reduce"},
        "ranks": 1,
        "steps": steps,
    }
    return Simulation(values, evaluator={"per_rank": False})


def digits(
    lab: Laboratory,
    epsilons: Sequence[float] = (0.5, 1.0, 2.0, 4.0),
    rates: Rates = _ALL_RATES,
) -> Iterator[Claim]:
    """72 public examples, a twentieth.

    Args:
        lab: to run in.
        epsilons: of the private examples.
        rates: learning rates by method; fewer for DP-CPT make the claim harder.
    """
    yield from _mixes(lab, 72, epsilons, rates, _MORE_THAN)


def digits_twice_as_public(lab: Laboratory) -> Iterator[Claim]:
    """144 public examples, a tenth."""
    yield from _mixes(lab, 144, (0.5, 1.0), _ALL_RATES, {})


def _mixes(
    lab: Laboratory,
    public: int,
    epsilons: Sequence[float],
    rates: Rates,
    bounds: Mapping[float, Mapping[Method, float]],
) -> Iterator[Claim]:
    runs = {"only public": run("only public", public, epsilons[0], _PUBLIC_RATE)}
    for epsilon in epsilons:
        for method, tried in rates.items():
            for lr in tried:
                runs[f"{method} {epsilon} {lr}"] = run(method, public, epsilon, lr)
    found = lab.run(runs)
    where = f"{public} public of {_EXAMPLES} digits"
    alone = found["only public"].last("accuracy")
    note = f"lowest of the seeds {alone.min():.3f}, highest {alone.max():.3f}"
    yield shown(f"{where}: only public: accuracy", alone.mean(), lab.seeds, note)
    for epsilon in epsilons:
        accuracy: dict[Method, np.ndarray] = {"only public": alone}
        for method, tried in rates.items():
            samples = [found[f"{method} {epsilon} {lr}"] for lr in tried]
            means = [float(sample.last("accuracy").mean()) for sample in samples]
            best = int(np.argmax(means))
            accuracy[method] = samples[best].last("accuracy")
            yield shown(
                f"{where}, epsilon = {epsilon:g}: {method}: accuracy",
                means[best],
                lab.seeds,
                f"at lr = {tried[best]:g}, the best of {', '.join(f'{lr:g}' for lr in tried)}",
            )
        for other, bound in bounds.get(epsilon, {}).items():
            gain = Gain.of(accuracy["DP-CPT"], accuracy[other], _POINT)
            claim = f"{where}, epsilon = {epsilon:g}: DP-CPT - {other}, points"
            yield at_least(claim, gain.mean, bound, lab.seeds, str(gain))


PAPER = Paper(
    title="DP-CPT (arXiv:2402.18752)",
    groups={"digits": digits, "twice-as-public": digits_twice_as_public},
    seeds={"digits": 10, "twice-as-public": 10},
    limits=(
        "It needs public examples like the private ones: here both are of one data set, which is "
        "the best case. Epsilon covers the private examples alone.",
        "The looser epsilon is, the less public data add: the rows show how much is left at 4.",
        "Both rates matter, and the number of public steps: too long on too few public examples "
        "can leave the private steps worse off than without.",
        "The paper's own models (ViT on ImageNet-11k, GPT-2 on code) are not run here.",
        "The seeds of these runs make their noise too: they repeat, and protect nobody.",
    ),
)
