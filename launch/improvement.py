"""What ``gossamer analyze improvement`` computes: a file's problem, and the budget it names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from gossamer.algorithms.privacy.accounting import check_delta, default_delta
from gossamer.algorithms.privacy.clipping import make_clip
from gossamer.algorithms.privacy.dp import DP
from gossamer.algorithms.privacy.improvement import Advice, Budget, Terms, advise
from gossamer.algorithms.privacy.improvement_terms import estimate_terms
from gossamer.algorithms.privacy.public import PublicData
from gossamer.algorithms.privacy.public_split import split_public
from gossamer.algorithms.problems import Problem
from gossamer.algorithms.protocols import Oracle
from gossamer.launch.comparison import with_overrides
from gossamer.launch.config import Experiment, oracle_layers, resolve
from gossamer.launch.config_file import load_yaml
from gossamer.runtime.checkpoint import Checkpoint
from gossamer.runtime.errors import ConfigError

__all__ = ["Analysis", "analyze"]


@dataclass(frozen=True)
class Analysis:
    """What was found.

    Attributes:
        terms: at the point that was looked at.
        budget: the privacy asked for.
        advice: for the two.
        source: which examples the terms come from, and whether they may be shown.
    """

    terms: Terms
    budget: Budget
    advice: Advice
    source: str


def analyze(
    file: Path,
    settings: list[str],
    *,
    epsilon: float | None = None,
    delta: float | None = None,
    epochs: float | None = None,
    at: Path | None = None,
    probes: int = 32,
    examples: int = 2048,
) -> Analysis:
    """Estimate the terms for the run that a file describes.

    The run's public examples are looked at where it has an oracle ``public``, which may be shown to
    anyone; else all its training examples.

    Args:
        file: YAML of one run.
        settings: ``a.b=c``, over it.
        epsilon: of the budget; None: that of ``dp``.
        delta: of the budget; None: that of ``dp``, or N^-1.1.
        epochs: of the budget; None: as many as the run makes.
        at: a run or checkpoint to look at, in the mean of its rows; None: the start.
        probes: random vectors for each trace.
        examples: at most so many are looked at.

    Raises:
        ConfigError: the file is no single run, names no epsilon, or has no dataset to sample from.
    """
    values = with_overrides(load_yaml(file), settings)
    if "compare" in values:
        raise ConfigError(f"compare: {file} holds several runs; give a file of one")
    config = resolve(values)
    n = config.ranks or 1
    experiment = Experiment(config, n)
    layers = oracle_layers(experiment.oracle())
    problem = experiment.task.build(n, config.seed)
    if not problem.shards:
        raise ConfigError("task: a stream has no number of examples, which a budget needs")
    private, places = _parts(problem, layers, config.seed)
    dp = next((layer for layer in layers if isinstance(layer, DP)), None)
    epsilon = epsilon if epsilon is not None or dp is None else dp.epsilon
    if epsilon is None:
        raise ConfigError("--epsilon: the file's oracle names none; add --epsilon 4")
    if delta is None:
        delta = (dp.delta if dp else None) or default_delta(private)
    check_delta(delta, private)
    if epochs is None:
        size = getattr(layers[0], "batch_size", None)
        full = getattr(layers[0], "sampling", None) == "full"
        if size is None and not full:
            raise ConfigError("--epochs: the oracle has no batch_size to tell it from; add it")
        batch = private if full or size is None else size * n
        calls = config.steps * experiment.algorithm.batches_per_step
        epochs = _private_share(layers) * calls * batch / private
    tensors = sum(p.requires_grad for p in problem.module.parameters())
    clip = make_clip(dp.clip, dp.clip_norm, dp.clip_gamma, tensors) if dp else None
    terms = estimate_terms(
        problem,
        places=np.concatenate(problem.shards) if places is None else places,
        parameters=_parameters(at),
        clip=clip,
        probes=probes,
        examples=examples,
        seed=config.seed,
    )
    budget = Budget(epsilon=epsilon, delta=delta, epochs=epochs, examples=private)
    source = "From private examples, in the clear: no epsilon covers these figures; keep them"
    if places is not None:
        source = f"From {terms.examples} public examples: these figures may be shown"
    return Analysis(terms, budget, advise(terms, budget), source)


def _parts(problem: Problem, layers: list[Oracle], seed: int) -> tuple[int, np.ndarray | None]:
    """Return the number of private examples, and the places of the public ones that train."""
    public = next((layer for layer in layers if isinstance(layer, PublicData)), None)
    if public is None:
        return sum(map(len, problem.shards)), None
    split = split_public(problem.shards, seed, public.fraction, public.indices, public.held_out)
    return split.sizes[0], np.sort(np.concatenate(split.training))


def _private_share(layers: list[Oracle]) -> float:
    """Return the share of the steps that is private, as far as the file says."""
    public = next((layer for layer in layers if isinstance(layer, PublicData)), None)
    if public is None or public.mix != "switch" or public.switch == "patience":
        return 1.0
    return 1.0 - public.switch


def _parameters(at: Path | None) -> Mapping[str, Tensor] | None:
    return None if at is None else Checkpoint.open(at).mean()
