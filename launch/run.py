"""``gossamer run``: from a configuration to a finished run folder, in every process of the run."""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

import gossamer
from gossamer.algorithms.program import TrainingProgram
from gossamer.launch.agreement import SilencedError, raise_together, share_text
from gossamer.launch.config import Experiment, RunConfig, merge, resolve
from gossamer.launch.processes import end_with_torchrun
from gossamer.launch.recorder import Recorder, check_tensorboard, write_whole
from gossamer.runtime import Communicator, native
from gossamer.runtime.checkpoint import Checkpoint, discard_after, save
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.loop import LoopOptions, Terminated, run_loop, terminations
from gossamer.runtime.transports import Transport, open_transport
from gossamer.runtime.transports.select import process_index, transport_name, world_size
from gossamer.topologies import TopologyError

__all__ = [
    "Request",
    "execute",
    "execute_in_child",
    "experiments_of",
    "ranks_of",
    "resume_from",
    "variants_of",
]

DONE = 0
_SHARED = ("transport", "processes", "threads", "timeout_s")
"""Fields that one start has once, however many runs it compares."""


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


def variants_of(values: Mapping[str, Any]) -> dict[str, RunConfig]:
    """Return the runs of a file by name; one without ``compare`` has the name ''.

    Raises:
        ConfigError: a field is wrong.
    """
    common = {k: v for k, v in values.items() if k != "compare"}
    compare = values.get("compare")
    if compare is None:
        return {"": resolve(common)}
    if (
        not isinstance(compare, Mapping)
        or not compare
        or not all(isinstance(v, Mapping) for v in compare.values())
    ):
        raise ConfigError(
            "compare: must be 'name: {fields that differ}', for example "
            f"{{dsgd: {{algorithm: {{name: dsgd}}}}}}, got {compare!r}"
        )
    runs = {}
    for name, change in compare.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", name):
            raise ConfigError(
                f"compare: {name!r} names a folder; use letters, digits, '-', '_', '+' and '.'"
            )
        for key in _SHARED:
            if key in change:
                raise ConfigError(
                    f"compare.{name}.{key}: all runs of a file share it; write '{key}: "
                    f"{change[key]}' outside compare"
                )
        try:
            runs[name] = resolve(merge(common, change))
        except ConfigError as error:
            raise ConfigError(f"compare.{name}: {error}") from None
    return runs


def experiments_of(
    runs: Mapping[str, RunConfig], ranks: Mapping[str, int]
) -> dict[str, Experiment]:
    """Return the runs with their names looked up and their graphs built.

    Raises:
        ConfigError: names the run of a comparison, field, value and fix.
    """
    experiments = {}
    for name, config in runs.items():
        try:
            experiments[name] = Experiment(config, ranks[name])
        except (ConfigError, TopologyError) as error:
            if not name:
                raise
            raise ConfigError(f"compare.{name}: {error}") from error
    return experiments


def resume_from(folder: Path) -> Checkpoint | None:
    """Open the checkpoint to go on from; None: that run was ended before its first one.

    Raises:
        ConfigError: ``folder`` is no run and no checkpoint, or a file is missing or cut short.
    """
    begun = (folder / "config.yaml").is_file() and not (folder / "summary.json").exists()
    if begun and not any((folder / "checkpoints").glob("step-*")):
        return None
    return Checkpoint.open(folder)


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
    try:
        runs = variants_of(request.values)
        first = next(iter(runs.values()))
        experiments = experiments_of(runs, {name: ranks_of(c) for name, c in runs.items()})
        transport_name(first.transport)
        checkpoint = resume_from(request.resume) if request.resume else None
        if request.resume is not None and "compare" in request.values:
            raise ConfigError(
                "--resume: a comparison has several runs; resume one, without a FILE: "
                "--resume RUN/NAME"
            )
    except (ConfigError, TopologyError):
        if process_index() != 0:  # every process reads the same file and meets the same error
            raise SilencedError from None
        raise
    if request.resume is not None and checkpoint is None and process_index() == 0:
        print(f"gossamer: {request.resume} has no checkpoint yet; from step 0", file=sys.stderr)
    torch.set_num_threads(first.threads)
    end_with_torchrun()
    transport = open_transport(first.transport, timeout_s=first.timeout_s)
    try:
        root = _make_folder(request, transport, first.timeout_s, checkpoint)
        summaries = {}
        for name, experiment in experiments.items():
            title = name or request.title
            summaries[name] = _run_one(experiment, transport, root / name, title, checkpoint)
    except BaseException as error:
        _leave(transport, error)
        raise
    transport.close()
    if transport.process == 0:
        from gossamer.launch.report import finish

        finish(root, [root / name for name in experiments])
    return DONE


def _leave(transport: Transport, error: BaseException) -> None:
    """Close where all processes end together; a lone failure must not wait for the others."""
    if isinstance(error, ConfigError | TopologyError | SilencedError | Terminated):
        transport.close()


def ranks_of(config: RunConfig) -> int:
    """Return n: the field, or one rank per process."""
    launched = world_size()
    if config.ranks is None:
        return launched if launched > 1 else (config.processes or 1)
    if launched > config.ranks:
        raise ConfigError(
            f"ranks: {config.ranks} ranks cannot fill the {launched} processes that were "
            f"launched; set ranks: {launched}, or launch {config.ranks}"
        )
    return config.ranks


def _make_folder(
    request: Request, transport: Transport, timeout_s: float, checkpoint: Checkpoint | None
) -> Path:
    """Choose and make the run's folder on process 0, and tell the others."""
    chosen, error = "", None
    if transport.process == 0:
        try:
            chosen = str(_choose_folder(request, checkpoint))
        except ConfigError as failure:
            error = failure
        except OSError as failure:
            where = request.out or Path("runs").absolute()
            error = ConfigError(
                f"--out: cannot make {where} ({failure.strerror}); name a folder you may write"
            )
    raise_together(transport, error, timeout_s)
    if transport.processes == 1:
        return Path(chosen)
    return Path(share_text(transport, chosen, timeout_s)[0])


def _choose_folder(request: Request, checkpoint: Checkpoint | None) -> Path:
    going_on = _run_to_go_on(request, checkpoint)
    if request.out is None:
        return going_on or _next_folder(Path("runs"), request.title)
    folder = request.out
    if going_on is not None and folder.exists() and folder.samefile(going_on):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"--out: {folder} is in use; name another folder, or continue that run with "
            f"--resume {folder}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _run_to_go_on(request: Request, checkpoint: Checkpoint | None) -> Path | None:
    """Return the run folder that ``--resume`` continues; None: what comes is a run of its own."""
    if checkpoint is None:
        return request.resume
    if checkpoint.folder.parent.name != "checkpoints":
        return None
    same_ranks = checkpoint.meta["n"] == ranks_of(resolve(_without_compare(request.values)))
    return checkpoint.folder.parent.parent if same_ranks else None


def _next_folder(parent: Path, title: str) -> Path:
    """Make and return ``parent/TITLE-001``, or the first number after those taken."""
    names = [re.fullmatch(rf"{re.escape(title)}-(\d+)", p.name) for p in parent.glob("*")]
    number = 1 + max((int(match[1]) for match in names if match), default=0)
    while True:
        folder = parent / f"{title}-{number:03d}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # another run started at the same time
            number += 1
        else:
            return folder


def _without_compare(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k != "compare"}


def _run_one(
    experiment: Experiment,
    transport: Transport,
    folder: Path,
    title: str,
    checkpoint: Checkpoint | None,
) -> dict[str, Any]:
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
    program, error = None, None
    recorder = Recorder(folder, title, config.steps, leader=leader, tensorboard=config.tensorboard)
    try:
        if config.tensorboard:
            check_tensorboard()
        program = _build(experiment, comm, checkpoint, folder)
        if leader:
            _prepare(folder, experiment, comm.step, recorder)
    except (ConfigError, TopologyError) as failure:
        error = failure
    raise_together(transport, error, config.timeout_s)
    assert program is not None
    options = _options(config)

    def save_checkpoint() -> None:
        tensors, scalars = program.snapshot()
        meta = {"round": comm.round, "signature": program.signature(), "traffic": _traffic(comm)}
        where = folder / "checkpoints"
        save(where, comm, tensors, scalars, program.mean(), meta, keep=config.keep_checkpoints)

    with terminations() as stop, recorder:
        run_loop(comm, program, options, log=recorder.log, save=save_checkpoint, stop=stop)
    if config.trace:
        from gossamer.launch.trace import write_trace

        write_trace(folder / "trace.json", comm)
    summary = _summary(experiment, comm, program, recorder.last)
    if leader:
        write_whole(folder / "summary.json", json.dumps(summary, indent=1))
    return summary


def _prepare(folder: Path, experiment: Experiment, step: int, recorder: Recorder) -> None:
    """Write the configuration, and drop what a run that goes on from ``step`` makes anew."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        resolved = yaml.safe_dump(experiment.resolved(), sort_keys=False)
        write_whole(folder / "config.yaml", resolved)
        (folder / "summary.json").unlink(missing_ok=True)
        discard_after(folder / "checkpoints", step)
        recorder.truncate(step if step > 0 else -1)
    except OSError as error:
        raise ConfigError(
            f"--out: cannot write {folder} ({error.strerror}); free some space, or name another"
        ) from error


def _build(
    experiment: Experiment, comm: Communicator, checkpoint: Checkpoint | None, folder: Path
) -> TrainingProgram:
    config = experiment.config
    problem = experiment.task.build(comm.n, config.seed)
    evaluation = {"examples": config.evaluate_examples}
    elsewhere = checkpoint is not None and checkpoint.meta["n"] != comm.n

    def program_from(start: dict[str, torch.Tensor] | None) -> TrainingProgram:
        oracle = experiment.oracle()
        return TrainingProgram(comm, problem, oracle, experiment.algorithm, evaluation, start)

    program = program_from(None)
    if checkpoint is None:
        return program
    here = checkpoint.meta.get("signature"), program.signature()
    if here[0] != here[1]:
        raise ConfigError(
            f"--resume: {checkpoint.folder} holds another model than 'task' describes: "
            f"{_first_difference(*here)}; use the config.yaml of its run"
        )
    _require_steps_left(checkpoint, config.steps, folder)
    if elsewhere:
        program = program_from(checkpoint.mean())
    comm.step = checkpoint.meta["step"]
    comm.round = checkpoint.meta.get("round", comm.step * program.rounds_per_step)
    if elsewhere:
        if comm.transport.process == 0:
            print(
                f"gossamer: resuming {comm.n} ranks from the mean of {checkpoint.meta['n']}; "
                "what else the algorithm kept starts afresh",
                file=sys.stderr,
            )
        return program
    rows = checkpoint.rows(comm.ranks)
    _require_same_state(checkpoint, rows, program)
    program.restore(rows, checkpoint.meta["scalars"])
    if comm.transport.process == 0:  # the totals so far are process 0's; sums stay right
        traffic = checkpoint.meta.get("traffic", {})
        comm.traffic.bytes_sent[0] += traffic.get("bytes_sent", 0)
        comm.traffic.messages_sent[0] += traffic.get("messages_sent", 0)
    return program


def _require_steps_left(checkpoint: Checkpoint, steps: int, folder: Path) -> None:
    """Refuse a run that is over; one killed between its last checkpoint and its summary is not."""
    step = checkpoint.meta["step"]
    in_place = folder.resolve() == checkpoint.folder.resolve().parent.parent
    unfinished = in_place and not (folder / "summary.json").exists()
    if step > steps or (step == steps and not unfinished):
        raise ConfigError(
            f"steps: {checkpoint.folder} is at step {step} already, got {steps}; set more steps, "
            f"for example -s steps={2 * step}"
        )


def _require_same_state(
    checkpoint: Checkpoint, rows: Mapping[str, torch.Tensor], program: TrainingProgram
) -> None:
    """Refuse a checkpoint that holds more or less than this algorithm and oracle keep."""
    expected, numbers = program.snapshot()
    # What is None in one may be a tensor in the other: made at the first step, say.
    unset = {f"state/{name}" for name, value in numbers.items() if value is None}
    unset |= {f"state/{k}" for k, value in checkpoint.meta["scalars"].items() if value is None}
    for name in [*(expected.keys() - rows.keys()), *(rows.keys() - expected.keys())]:
        if name in unset:
            continue
        verb = "lacks" if name in expected else "also holds"
        raise ConfigError(
            f"--resume: {checkpoint.folder} {verb} '{name}': it was written with another "
            "algorithm, optimizer, oracle or model; use the config.yaml of its run"
        )
    for name, tensor in expected.items():
        if name in rows and tensor.shape != rows[name].shape:
            raise ConfigError(
                f"--resume: '{name}' is {tuple(rows[name].shape)} in {checkpoint.folder} and "
                f"{tuple(tensor.shape)} in this run; use the config.yaml of its run"
            )


def _first_difference(theirs: Any, ours: list[list[Any]]) -> str:
    """Say where two lists of [name, shape] part."""
    for a, b in itertools.zip_longest(theirs or [], ours):
        if a != b:
            spelled = [f"{x[0]} {tuple(x[1])}" if x else "nothing" for x in (a, b)]
            return f"{spelled[0]} there, {spelled[1]} here"
    return "it does not say which"


def _options(config: RunConfig) -> LoopOptions:
    log_every = min(config.log_every, config.steps)
    tenth = max(log_every, config.steps // 10 // log_every * log_every)
    return LoopOptions(
        steps=config.steps,
        log_every=log_every,
        evaluate_every=config.evaluate_every or tenth,
        checkpoint_every=config.checkpoint_every,
    )


def _traffic(comm: Communicator) -> dict[str, int]:
    counts = torch.stack(
        [
            torch.from_numpy(comm.traffic.bytes_sent),
            torch.from_numpy(comm.traffic.messages_sent),
        ],
        dim=1,
    ).to(comm.device)
    total = comm.all_reduce(counts, "sum", count=False)[0].tolist()
    return {"bytes_sent": total[0], "messages_sent": total[1]}


def _summary(
    experiment: Experiment, comm: Communicator, program: TrainingProgram, last: Mapping[str, Any]
) -> dict[str, Any]:
    topology = experiment.topology
    return {
        **last,
        "steps": comm.step,
        "ranks": comm.n,
        "transport": comm.transport.name,
        "processes": comm.transport.processes,
        "parameters": program.layout.size,
        "parameters_sha256": program.parameters_sha256(),
        "algorithm": experiment.algorithm.name,
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
