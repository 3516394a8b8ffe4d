"""What ``gossamer analyze audit`` does: train a file's private run on canaries, and guess."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.algorithms.privacy.audit import Canaries, count_right, epsilon_lower_bound
from gossamer.algorithms.privacy.dp import DP
from gossamer.algorithms.privacy.public import PublicData
from gossamer.algorithms.program import TrainingProgram
from gossamer.launch.comparison import with_overrides
from gossamer.launch.config import Experiment, oracle_layers, resolve
from gossamer.launch.config_file import load_yaml
from gossamer.runtime import Communicator, StackedTransport
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.loop import LoopOptions, run_loop

__all__ = ["Audit", "audit"]


@dataclass(frozen=True)
class Audit:
    """What the guesses prove, beside what the run reports.

    Attributes:
        lower_bound: no smaller epsilon holds, with this confidence.
        reported: epsilon of the run's statement.
        delta: of both.
        right: guesses that were right.
        guesses: made.
        canaries: m.
        confidence: of the lower bound.
    """

    lower_bound: float
    reported: float
    delta: float
    right: int
    guesses: int
    canaries: int
    confidence: float

    @property
    def refuted(self) -> bool:
        """Whether the run leaks more than it reports."""
        return self.lower_bound > self.reported


def audit(
    file: Path,
    settings: list[str],
    *,
    canaries: int = 1000,
    guesses: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> Audit:
    """Train the run that a file describes, on canaries in place of its examples.

    Everything that privacy depends on stays: oracle and its noise, sampling, sizes of the shards,
    algorithm, optimizer, graph, steps. The model is one that gives canaries away as well as any.
    All ranks run in this process, and the mean of their rows is looked at.

    Args:
        file: YAML of one run with oracle ``dp``.
        settings: ``a.b=c``, over it.
        canaries: m, at most the number of examples.
        guesses: about the m canaries; fixed beforehand, or the bound does not hold; None: m / 2.
        confidence: of the lower bound.
        seed: of the canaries' places and coins.

    Raises:
        ConfigError: the file is no single run with ``dp``, or has too few examples.
    """
    values = with_overrides(load_yaml(file), settings)
    if "compare" in values:
        raise ConfigError(f"compare: {file} holds several runs; give a file of one")
    config = resolve(values)
    n = config.ranks or 1
    experiment = Experiment(config, n)
    oracle = experiment.oracle()
    layers = oracle_layers(oracle)
    if not any(isinstance(layer, DP) for layer in layers):
        raise ConfigError("oracle: there is no dp in it to audit; add {name: dp, epsilon: 4}")
    if any(isinstance(layer, PublicData) for layer in layers):
        raise ConfigError("oracle: public data are no canaries; take public out for the audit")
    guesses = canaries // 2 if guesses is None else guesses
    if not 1 <= guesses <= canaries:
        raise ConfigError(f"--guesses: {guesses} must be between 1 and the {canaries} canaries")
    shards = experiment.task.build(n, config.seed).shards
    if not shards:
        raise ConfigError("task: a stream has no examples to hide canaries among")
    hidden = Canaries.hidden_in(shards, canaries, seed)
    comm = Communicator(
        experiment.topology, StackedTransport(), seed=config.seed, steps=config.steps
    )
    program = TrainingProgram(comm, hidden.problem, oracle, experiment.algorithm).start()
    steps = config.steps
    quiet = LoopOptions(steps, log_every=steps, evaluate_every=steps, checkpoint_every=0)
    run_loop(comm, program, quiet, log=lambda record: None)
    (weights,) = program.mean().values()
    said: dict[str, Any] = oracle.statement()["privacy"]
    right = count_right(hidden.scores(weights.flatten()), hidden.included, guesses)
    comm.close()
    reported = next(said[k] for k in ("epsilon", "epsilon_if_secret") if k in said)
    return Audit(
        lower_bound=epsilon_lower_bound(right, guesses, canaries, said["delta"], confidence),
        reported=float("inf") if reported == "infinite" else reported,
        delta=said["delta"],
        right=right,
        guesses=guesses,
        canaries=canaries,
        confidence=confidence,
    )
