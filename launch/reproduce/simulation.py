"""Runs of one configuration in this process, or many beside each other: figures, no files.

What runs is what ``gossamer run`` runs on the ``stacked`` transport: the same experiment, program
and loop.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.algorithms.estimates import Metrics
from gossamer.algorithms.program import TrainingProgram
from gossamer.launch.config import Experiment, resolve
from gossamer.runtime import Communicator, StackedTransport, row_norm
from gossamer.runtime.loop import LoopOptions, Record, run_loop

__all__ = ["Laboratory", "Probe", "Sample", "Simulation", "Trajectory", "simulate"]

Probe = Callable[[TrainingProgram], Mapping[str, float]]
"""Looks at a program whenever it is evaluated, for figures of one's own."""


@dataclass(frozen=True)
class Simulation:
    """A configuration and what to look at.

    Attributes:
        values: the sections, as in YAML.
        evaluations: how many times over the run, the end included.
        evaluator: options of ``Evaluator``.
        probe: further figures; a function of a module, as it travels to other processes.
    """

    values: Mapping[str, Any]
    evaluations: int = 1
    evaluator: Mapping[str, Any] = field(default_factory=dict)
    probe: Probe | None = None


@dataclass(frozen=True)
class Trajectory:
    """What one run did.

    Attributes:
        records: those with an evaluation, from step 0 to the last.
        sha256: of the final parameters.
    """

    records: tuple[Record, ...]
    sha256: str

    def first(self, figure: str) -> float:
        """Return a figure before the first step."""
        return float(self.records[0][figure])

    def last(self, figure: str) -> float:
        """Return a figure at the end."""
        return float(self.records[-1][figure])

    def second_half(self, figure: str) -> float:
        """Return the mean of a figure over the evaluations in the second half of the run."""
        half = self.records[-1]["step"] / 2
        return float(np.mean([r[figure] for r in self.records if r["step"] > half]))


@dataclass(frozen=True)
class Sample:
    """One configuration over several seeds."""

    trajectories: tuple[Trajectory, ...]

    def first(self, figure: str) -> np.ndarray:
        """Return a figure before the first step, one per seed."""
        return np.array([t.first(figure) for t in self.trajectories])

    def last(self, figure: str) -> np.ndarray:
        """Return a figure at the end, one per seed."""
        return np.array([t.last(figure) for t in self.trajectories])

    def second_half(self, figure: str) -> np.ndarray:
        """Return the mean of a figure over the second half of the run, one per seed."""
        return np.array([t.second_half(figure) for t in self.trajectories])


class Laboratory:
    """Runs simulations over seeds, several at a time.

    Attributes:
        seeds: how many seeds a random experiment gets; they are 0, 1, ...
        progress: called with (ended, all) of a batch whenever a simulation ends.

    Example:
        >>> from gossamer.launch.reproduce.simulation import Laboratory, Simulation
        >>> values = {
        ...     "task": {"name": "digits"},
        ...     "algorithm": {"name": "d-nasa"},
        ...     "ranks": 4,
        ...     "steps": 3,
        ... }
        >>> with Laboratory(seeds=2) as lab:
        ...     found = lab.run({"ring": Simulation(values)})
        >>> found["ring"].last("accuracy").shape
        (2,)
    """

    def __init__(self, seeds: int = 3, jobs: int = 1) -> None:
        """Get ready.

        Args:
            seeds: of each random experiment.
            jobs: processes to run simulations in; 1: this one.
        """
        self.seeds = seeds
        self.progress: Callable[[int, int], None] = lambda ended, total: None
        # spawn: a fork would copy torch's threads in whatever state they are in.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(jobs, mp_context=context) if jobs > 1 else None

    def __enter__(self) -> Laboratory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; may be called twice."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(
        self, simulations: Mapping[str, Simulation], seeds: int | None = None
    ) -> dict[str, Sample]:
        """Run each simulation over the seeds and return what they did, by name.

        Args:
            simulations: by name.
            seeds: how many; 1 where nothing is random. Default: the laboratory's.
        """
        seeds = self.seeds if seeds is None else seeds
        jobs = [(s, seed) for s in simulations.values() for seed in range(seeds)]
        found = []
        for trajectory in self._map(jobs):
            found.append(trajectory)
            self.progress(len(found), len(jobs))
        per_name = [tuple(found[k : k + seeds]) for k in range(0, len(found), seeds)]
        return {name: Sample(t) for name, t in zip(simulations, per_name, strict=True)}

    def _map(self, jobs: Sequence[tuple[Simulation, int]]) -> Iterator[Trajectory]:
        if self._pool is None:
            return map(simulate, *zip(*jobs, strict=True))
        return self._pool.map(simulate, *zip(*jobs, strict=True))


def simulate(simulation: Simulation, seed: int = 0) -> Trajectory:
    """Run all ranks of one configuration in this process.

    The seed also makes the noise of private runs: they repeat, and protect nobody.

    Raises:
        ConfigError: field, value and fix.
        TopologyError: the graph cannot be built.
    """
    config = resolve(_seeded(simulation.values, seed))
    experiment = Experiment(config, config.ranks or 1)
    comm = Communicator(experiment.topology, StackedTransport(), seed=seed, steps=config.steps)
    every = max(1, config.steps // simulation.evaluations)
    options = LoopOptions(config.steps, log_every=every, evaluate_every=every, checkpoint_every=0)
    records: list[Record] = []
    with _threads(config.threads):
        program = _Watched(
            TrainingProgram(
                comm,
                experiment.task.build(comm.n, seed),
                experiment.oracle(),
                experiment.algorithm,
                simulation.evaluator,
            ).start(),
            simulation.probe,
        )
        run_loop(comm, program, options, log=records.append)
        sha256 = program.inner.parameters_sha256()
    comm.close()
    return Trajectory(tuple(records), sha256)


def _seeded(values: Mapping[str, Any], seed: int) -> dict[str, Any]:
    stack = values.get("oracle")
    if isinstance(stack, list):
        stack = [{**s, "noise_seed": seed} if s.get("name") == "dp" else s for s in stack]
        return {**values, "oracle": stack, "seed": seed}
    return {**values, "seed": seed}


class _Watched:
    """A training program that also says how far the mean row went, and what the probe sees."""

    def __init__(self, inner: TrainingProgram, probe: Probe | None) -> None:
        self.inner, self._probe = inner, probe
        self.rounds_per_step = inner.rounds_per_step
        self._start = inner.state.x[:1].clone()

    def step(self) -> Metrics:
        return self.inner.step()

    def evaluate(self) -> Mapping[str, float]:
        mean: Tensor = self.inner.state.x.mean(dim=0, keepdim=True)
        figures = {**self.inner.evaluate(), "travel": row_norm(mean - self._start).item()}
        return figures | dict(self._probe(self.inner)) if self._probe else figures

    def totals(self) -> Mapping[str, int]:
        return self.inner.totals()

    def snapshot(self) -> Any:
        return self.inner.snapshot()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with ``count`` threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
