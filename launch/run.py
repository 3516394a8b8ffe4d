"""``gossamer run``: from a configuration to a finished run folder, in every process of the run."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import gossamer
from gossamer.algorithms.program import TrainingProgram
from gossamer.launch.agreement import (
    LateError,
    SilencedError,
    raise_together,
    require_same_configuration,
)
from gossamer.launch.best import Best
from gossamer.launch.comparison import experiments_of, ranks_of, variants_of
from gossamer.launch.config import Experiment, RunConfig
from gossamer.launch.processes import end_with_torchrun
from gossamer.launch.record_log import RecordLog, open_log
from gossamer.launch.recorder import Recorder, check_tensorboard, to_json, write_whole, writing
from gossamer.launch.resume import Resumption, resume_from
from gossamer.launch.run_folder import make_folder, prepare_folder
from gossamer.runtime import Communicator, native
from gossamer.runtime.checkpoint import Checkpoint, save
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.loop import LoopOptions, Terminated, run_loop, terminations, traffic_totals
from gossamer.runtime.peak_memory import peak_memory_mib
from gossamer.runtime.transports import TRANSPORTS, Transport, open_transport
from gossamer.runtime.transports.select import process_index, transport_name, world_size
from gossamer.topologies import TopologyError

__all__ = ["Request", "execute", "execute_in_child", "require_threads", "variants_of"]

DONE = 0
_SPEAK_S = 5.0
"""How long a process that cannot meet the others leaves process 0 to say what is wrong."""
_THREADS_PER_CORE = 4


@dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Attributes:
        values: the sections, overrides applied.
        title: name of the run, for its folder and the log.
        out: where to write; None: the next free folder below ``runs/``.
        resume: a run folder or a checkpoint to go on from.
    """

    values: dict[str, Any]
    title: str
    out: Path | None = None
    resume: Path | None = None


def execute_in_child(request: Request) -> int:
    """Run in a process that was started for it; returns the exit status, prints any failure."""
    from gossamer.launch.status import exit_status

    return exit_status(lambda: execute(request))


def execute(request: Request) -> int:
    """Run everything that ``request`` asks for; every process of the run calls it.

    Raises:
        ConfigError: on process 0; the others raise SilencedError.
        Terminated: SIGTERM; the state was saved.
    """
    start, error = None, None
    try:
        start = _Start.of(request)
    except (ConfigError, TopologyError) as failure:
        if world_size() == 1:
            raise
        error = failure
    end_with_torchrun()
    timeout_s = start.config.timeout_s if start else _timeout_of(request.values)
    transport = _meet(request.values, timeout_s, error)
    try:
        raise_together(transport, error, timeout_s)
        assert start is not None
        checkpoint, experiments = start.checkpoint, start.experiments
        torch.set_num_threads(start.config.threads)
        contents = {name: e.resolved() for name, e in experiments.items()}
        step = {"resume": {"step": checkpoint.meta["step"] if checkpoint else 0}}
        require_same_configuration(transport, contents | step, timeout_s)
        if request.resume is not None and checkpoint is None and transport.process == 0:
            print(f"gossamer: {request.resume} has no checkpoint yet; from step 0", file=sys.stderr)
        root = make_folder(request, transport, timeout_s, checkpoint)
        for name, experiment in experiments.items():
            title = name or request.title
            _run_one(experiment, transport, root / name, title, checkpoint)
    except BaseException as failure:
        _leave(transport, failure)
        raise
    transport.close()
    if transport.process == 0:
        from gossamer.launch.report import finish

        finish(root, [root / name for name in experiments])
    return DONE


@dataclass(frozen=True)
class _Start:
    """What this process finds out by itself, before it meets the others."""

    config: RunConfig
    experiments: dict[str, Experiment]
    checkpoint: Checkpoint | None

    @classmethod
    def of(cls, request: Request) -> _Start:
        runs = variants_of(request.values)
        first = next(iter(runs.values()))
        require_threads(first)
        experiments = experiments_of(runs, {name: ranks_of(c) for name, c in runs.items()})
        transport_name(first.transport)
        checkpoint = resume_from(request.resume) if request.resume else None
        if request.resume is not None and "compare" in request.values:
            raise ConfigError(
                "--resume: a comparison has several runs; resume one, without a FILE: "
                "--resume RUN/NAME"
            )
        return cls(first, experiments, checkpoint)


def require_threads(config: RunConfig) -> None:
    """Refuse more threads than this machine could ever run.

    Raises:
        ConfigError: with the number of its cores.
    """
    cores = os.cpu_count() or 1
    if config.threads > _THREADS_PER_CORE * cores:
        raise ConfigError(
            f"threads: {config.threads} per process on a machine of {cores} cores; use at most "
            f"{_THREADS_PER_CORE * cores}, better {cores} / (processes on it)"
        )


def _timeout_of(values: Mapping[str, Any]) -> float:
    """Return how long to wait for the others with a configuration that is wrong."""
    given = values.get("timeout_s")
    most = RunConfig.model_fields["timeout_s"].default
    usable = isinstance(given, int | float) and math.isfinite(given) and given > 0
    return min(float(given), most) if usable else float(most)  # type: ignore[arg-type]  # checked


def _meet(values: Mapping[str, Any], timeout_s: float, error: Exception | None) -> Transport:
    """Open the transport, also to say an ``error`` together.

    Raises:
        ConfigError: there is no such transport here; or ``error``, where the processes do not meet.
        SilencedError: as above, on all but process 0, which had a while to speak.
    """
    name = values.get("transport")
    try:
        return open_transport(name if name in TRANSPORTS else "auto", timeout_s=timeout_s)
    except Exception as failure:
        wrong = error or failure
        if not isinstance(wrong, ConfigError | TopologyError):
            raise
        if process_index() != 0:
            # A launcher ends all when the first ends; our own gives the others time to speak.
            time.sleep(0 if "GOSSAMER_RENDEZVOUS" in os.environ else _SPEAK_S)
            raise SilencedError from None
        raise wrong from None


def _leave(transport: Transport, error: BaseException) -> None:
    """Close where all processes end together; a lone failure must not wait for the others."""
    if isinstance(error, ConfigError | TopologyError | SilencedError | Terminated):
        transport.close()


def _run_one(
    experiment: Experiment,
    transport: Transport,
    folder: Path,
    title: str,
    checkpoint: Checkpoint | None,
) -> None:
    config = experiment.config
    leader = transport.process == 0
    comm = Communicator(
        experiment.topology,
        transport,
        seed=config.seed,
        steps=config.steps,
        timeout_s=config.timeout_s,
    )
    comm.traffic.tracing = config.trace
    recorder = Recorder(folder, title, config.steps, leader=leader, tensorboard=config.tensorboard)
    program, resumption, records, error = None, None, None, None
    try:  # each by itself: nothing here waits for another process
        if config.tensorboard:
            check_tensorboard()
        problem = experiment.task.build(comm.n, config.seed)
        evaluation = {
            "examples": config.evaluate_examples,
            "gradient": config.evaluate_gradient,
        }
        oracle = experiment.oracle()
        program = TrainingProgram(comm, problem, oracle, experiment.algorithm, evaluation)
        if checkpoint is not None:
            resumption = Resumption(checkpoint, experiment, comm, program, folder)
    except (ConfigError, TopologyError) as failure:
        error = failure
    raise_together(transport, error, config.timeout_s)
    assert program is not None
    try:
        if resumption is None:
            program.start()
        else:
            resumption.apply()
        if leader:
            prepare_folder(folder, experiment, comm.step, recorder)
            records = open_log(folder, experiment, comm, program, checkpoint)
    except (ConfigError, TopologyError) as failure:
        error = failure
    raise_together(transport, error, config.timeout_s)
    try:
        _train(experiment, comm, program, recorder, folder, records)
    except (ConfigError, TopologyError) as failure:
        if transport.processes == 1:
            raise
        raise LateError(str(failure)) from failure  # the others wait for this process


def _train(
    experiment: Experiment,
    comm: Communicator,
    program: TrainingProgram,
    recorder: Recorder,
    folder: Path,
    records: RecordLog | None,
) -> None:
    config = experiment.config
    options = _options(config)

    def save_to(where: Path, keep: int, facts: Mapping[str, Any]) -> None:
        if records is not None:
            records.sync()  # it must reach as far as the checkpoint
        tensors, scalars = program.snapshot()
        meta = {
            **facts,
            "round": comm.round,
            "signature": program.signature(),
            "fixed_sha256": program.fixed_sha256,
            "traffic": traffic_totals(comm),
            "totals": program.totals(),
            "topology": experiment.topology.digest(),
            "configuration": experiment.resolved(),
        }
        save(where, comm, tensors, scalars, program.mean(), meta, keep=keep)

    def save_checkpoint() -> None:
        save_to(folder / "checkpoints", config.keep_checkpoints, {})

    best = Best(config.keep_best, folder, comm, save_to) if config.keep_best else None
    with terminations() as stop, recorder, records or contextlib.nullcontext():
        run_loop(
            comm,
            program,
            options,
            log=recorder.log,
            save=save_checkpoint,
            evaluated=best.see if best else lambda record: None,
            stop=stop,
        )
    if config.trace:
        from gossamer.launch.trace import write_trace

        with writing(folder / "trace.json"):
            write_trace(folder / "trace.json", comm)
    summary = _summary(experiment, comm, program, recorder.last)
    if best is not None:
        summary["best"] = best.record
    if comm.transport.process == 0:
        path = folder / "summary.json"
        with writing(path):
            write_whole(path, to_json(summary, indent=1))


def _options(config: RunConfig) -> LoopOptions:
    log_every = min(config.log_every, config.steps)
    tenth = max(log_every, config.steps // 10 // log_every * log_every)
    return LoopOptions(
        steps=config.steps,
        log_every=log_every,
        evaluate_every=config.evaluate_every or tenth,
        checkpoint_every=config.checkpoint_every,
    )


def _summary(
    experiment: Experiment, comm: Communicator, program: TrainingProgram, last: Mapping[str, Any]
) -> dict[str, Any]:
    topology = experiment.topology
    return {
        "grad_norm": None,  # where nothing backpropagates, or it is hidden
        **last,
        "steps": comm.step,
        "ranks": comm.n,
        "peak_memory_mib": peak_memory_mib(comm),
        "transport": comm.transport.name,
        "processes": comm.transport.processes,
        "parameters": program.layout.size,
        "parameters_sha256": program.parameters_sha256(),
        **({"fixed_sha256": program.fixed_sha256} if program.fixed_sha256 else {}),
        "algorithm": experiment.algorithm.name,
        **(program.oracle.statement() if comm.transport.process == 0 else {}),  # takes seconds
        "topology": {"name": topology.name, "kind": topology.kind, "period": topology.period},
        "versions": {
            "gossamer": gossamer.__version__,
            "python": platform.python_version(),
            **native.build_info(),
            "commit": _commit(),
        },
    }


def _commit() -> str | None:
    """Return the git commit of the source tree, None outside one."""
    source = Path(os.path.realpath(__file__)).parent
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=source, capture_output=True, text=True
    )
    return done.stdout.strip() or None if done.returncode == 0 else None
