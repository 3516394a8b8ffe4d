"""The zeroth-order benchmark in small (arXiv:2402.11592): what forward passes alone can train.

Digits, an MLP 64-32-10 of 2,410 parameters, batches of 64, one rank; language models are in
``zo_prompts``. Rates are each method's best of a few on these test examples: the table does not
rank the zeroth-order variants.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gossamer.launch.reproduce.claims import Claim, at_least, at_most, shown
from gossamer.launch.reproduce.paper import Paper
from gossamer.launch.reproduce.simulation import Laboratory, Sample, Simulation
from gossamer.launch.reproduce.zo_prompts import alignment, schemes

__all__ = ["PAPER", "accuracy", "derivatives", "equal_forwards", "queries", "unstable", "variants"]

Values = dict[str, Any]

_DIGITS: Values = {"name": "digits", "model": "mlp", "hidden": [32], "test_examples": 397}
_EVALUATOR = {"per_rank": False}
_FORWARDS_OF_A_GRADIENT = 3
"""What a backpropagation counts for: forward, and twice that backward."""


def _run(steps: int, optimizer: Values, algorithm: str = "all-reduce", **oracle: Any) -> Simulation:
    values: Values = {
        "task": _DIGITS,
        "oracle": {"name": "zeroth-order", "batch_size": 64, **oracle},
        "optimizer": optimizer,
        "algorithm": {"name": algorithm},
        "ranks": 1,
        "steps": steps,
    }
    return Simulation(values, evaluator=_EVALUATOR)


def _sgd(lr: float) -> Values:
    return {"name": "sgd", "lr": lr}


FIRST_ORDER = _run(300, _sgd(0.5), name="backprop")
PLAIN = _run(4000, _sgd(0.01))
ADAM = _run(4000, {"name": "adam", "lr": 0.005})


def accuracy(lab: Laboratory) -> Iterator[Claim]:
    """4,000 steps of two losses, 300 of a gradient."""
    found = lab.run({"backpropagation": FIRST_ORDER, "SGD": PLAIN, "Adam": ADAM})
    mean = {name: sample.last("accuracy").mean() for name, sample in found.items()}
    for name in ("SGD", "Adam"):
        claim = f"Two losses a step, 4,000 steps, {name}: accuracy"
        yield at_least(claim, mean[name], 0.90, lab.seeds, _spread(found[name]))
    yield at_least(
        "Backpropagation, 300 steps: accuracy beyond that of SGD",
        mean["backpropagation"] - mean["SGD"],
        0.02,
        lab.seeds,
        f"{mean['backpropagation']:.3f}; in forward passes 900 against 8,000",
    )


def derivatives(lab: Laboratory) -> Iterator[Claim]:
    """Derivatives by forward mode along the same directions as two losses, rate .02."""
    found = lab.run(
        {name: _run(4000, _sgd(0.02), estimate=name) for name in ("forward", "two-sided")}
    )
    forward, losses = (found[name].last("accuracy").mean() for name in found)
    yield at_most(
        "Exact derivatives along the same directions: difference of accuracy",
        abs(forward - losses),
        0.01,
        lab.seeds,
        f"{forward:.3f} and {losses:.3f}",
    )


def variants(lab: Laboratory) -> Iterator[Claim]:
    """Other updates, 4,000 steps."""
    found = lab.run(
        {
            "momentum": _run(4000, {"name": "momentum", "lr": 0.001}),
            "signs": _run(4000, {"name": "sign-sgd", "lr": 0.004}),
            "sign of the slope": _run(4000, _sgd(0.003), coefficient="sign"),
            "conservative, rate .02": _run(4000, _sgd(0.02), algorithm="conservative"),
        }
    )
    for name, sample in found.items():
        yield shown(f"{name}: accuracy", sample.last("accuracy").mean(), lab.seeds, _spread(sample))


def queries(lab: Laboratory) -> Iterator[Claim]:
    """More directions a step at rates that grow with them, 1,000 steps."""
    rates = {1: 0.02, 4: 0.06, 16: 0.2}
    found = lab.run({str(q): _run(1000, _sgd(lr), queries=q) for q, lr in rates.items()})
    one, four, sixteen = (found[str(q)].last("accuracy").mean() for q in rates)
    yield at_least("4 directions a step: accuracy beyond 1", four - one, 0.05, lab.seeds)
    note = f"{one:.3f}, {four:.3f}, {sixteen:.3f}"
    yield at_least("16 directions: accuracy beyond 4", sixteen - four, 0, lab.seeds, note)


def equal_forwards(lab: Laboratory) -> Iterator[Claim]:
    """8,000 losses in all, over 1, 4 and 16 directions a step; and backpropagation with as many."""
    rates = {1: 0.02, 4: 0.06, 16: 0.2}
    steps = {q: 8000 // (2 * q) for q in rates}
    found = lab.run(
        {f"{q} directions": _run(steps[q], _sgd(lr), queries=q) for q, lr in rates.items()}
        | {"backpropagation": _run(8000 // _FORWARDS_OF_A_GRADIENT, _sgd(0.5), name="backprop")}
    )
    for name, sample in found.items():
        accuracy = sample.last("accuracy").mean()
        yield shown(f"8,000 forward passes, {name}: accuracy", accuracy, lab.seeds)


def unstable(lab: Laboratory) -> Iterator[Claim]:
    """Four times the best rate: the noise of the estimate wins."""
    found = lab.run({"fast": _run(4000, _sgd(0.04))})["fast"]
    accuracy = found.last("accuracy").mean()
    yield at_most("Rate .04: accuracy", accuracy, 0.75, lab.seeds, _spread(found))


def _spread(sample: Sample) -> str:
    accuracy = sample.last("accuracy")
    return f"{accuracy.min():.3f} to {accuracy.max():.3f} over the seeds"


PAPER = Paper(
    title="Zeroth-order optimization (arXiv:2402.11592, arXiv:2305.17333)",
    groups={
        "accuracy": accuracy,
        "derivatives": derivatives,
        "variants": variants,
        "queries": queries,
        "equal-forwards": equal_forwards,
        "unstable": unstable,
        "alignment": alignment,
        "schemes": schemes,
    },
    seeds=dict.fromkeys(
        ("accuracy", "derivatives", "variants", "queries", "equal-forwards", "unstable"), 5
    ),
    limits=(
        "A step moves along a random direction: from scratch it takes some sqrt(d) to d times the "
        "steps of backpropagation. Fine-tuning a pretrained model, whose curvature is low-rank, "
        "is what it is for.",
        "The rates are the best of a few on the test examples themselves, so the rows do not rank "
        "the variants.",
    ),
)
