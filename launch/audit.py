"""What ``gossamer analyze audit`` does: a file's private oracle, over canaries."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

import torch

from gossamer.algorithms.privacy.audit import Guesses, canaries, epsilon_at_least, guess
from gossamer.algorithms.privacy.dp import DP
from gossamer.algorithms.program import TrainingProgram
from gossamer.launch.comparison import with_overrides
from gossamer.launch.config import Experiment, load_yaml, oracle_layers, resolve
from gossamer.runtime import Communicator, ConfigError, StackedTransport

__all__ = ["Audit", "audit"]


@dataclass(frozen=True)
class Audit:
    """What canaries found out.

    Attributes:
        reported: epsilon, as the run states it, over the canaries that were in.
        found: epsilon is at least this, with the confidence asked for.
        delta: of both.
        guesses: what ``found`` was made of.
    """

    reported: float
    found: float
    delta: float
    guesses: Guesses

    @property
    def is_refuted(self) -> bool:
        """Whether the report is too small."""
        return self.found > self.reported


def audit(file: Path, settings: list[str], *, count: int, made: int, confidence: float) -> Audit:
    """Run a file's oracle, optimizer and steps on canaries in place of its task.

    Every canary is a coordinate of its own, so that its gradient is as long as the bound allows;
    who is in is drawn from the operating system's entropy. The score is how far the released model
    moved against the gradient.

    Args:
        file: YAML of one run; its oracle holds dp, its algorithm uses the mean gradient alone.
        settings: ``a.b=c``, over it.
        count: canaries; about half of them are examples, whose number changes rate and sigma.
        made: guesses among them.
        confidence: of the bound.

    Raises:
        ConfigError: the file is no single private run of that kind, or there are too few canaries.
    """
    values = with_overrides(load_yaml(file), settings)
    if "compare" in values:
        raise ConfigError(f"compare: {file} holds several runs; give a file of one")
    if not 2 <= made <= count:
        raise ConfigError(f"--guesses: {made} of {count} canaries cannot be guessed; use 2 to all")
    config = resolve(values)
    n = config.ranks or 1
    experiment = Experiment(config, n)
    oracle, algorithm = experiment.oracle(), experiment.algorithm
    dp = next((layer for layer in oracle_layers(oracle) if isinstance(layer, DP)), None)
    if dp is None:
        raise ConfigError("oracle: holds no dp, which an audit is of; add {name: dp, epsilon: 1}")
    if algorithm.uses != "mean":
        raise ConfigError(
            f"algorithm: {algorithm.name} shows ranks each other's rows, and this audit reads the "
            "released model only; use -s algorithm.name=all-reduce"
        )
    coins = torch.Generator().manual_seed(secrets.randbits(63))
    included = torch.rand(count, generator=coins) < 0.5
    comm = Communicator(
        experiment.topology, StackedTransport(), seed=config.seed, steps=config.steps
    )
    problem = canaries(included, n, dp.clip_norm)
    program = TrainingProgram(comm, problem, oracle, algorithm).start()
    for _ in range(config.steps):
        program.step()
        comm.step += 1
        comm.round += algorithm.rounds_per_step
    said = oracle.statement()["privacy"]
    reported = next(said[key] for key in ("epsilon", "epsilon_if_secret") if key in said)
    scores = -program.layout.values(program.state.x[0])
    guesses = guess(scores, included, made)
    found = epsilon_at_least(guesses, said["delta"], confidence)
    return Audit(
        float("inf") if reported == "infinite" else reported, found, said["delta"], guesses
    )
