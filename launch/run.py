"""``gossamer run``: from a configuration to a finished run folder, in every process of the run."""

from __future__ import annotations

import json
import os
import platform
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
from gossamer.launch.recorder import Recorder
from gossamer.runtime import Communicator, native
from gossamer.runtime.checkpoint import Checkpoint, save
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.loop import LoopOptions, Terminated, run_loop, terminations
from gossamer.runtime.transports import Transport, open_transport
from gossamer.runtime.transports.select import process_index, world_size
from gossamer.topologies import TopologyError

__all__ = ["Request", "execute", "execute_in_child", "variants_of"]

DONE, FAILED, BAD_CONFIG, TERMINATED = 0, 1, 2, 143


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
    if not (isinstance(compare, Mapping) and all(isinstance(v, Mapping) for v in compare.values())):
        raise ConfigError("compare: must be 'name: {fields that differ}', for example dsgd: {...}")
    runs = {}
    for name, change in compare.items():
        try:
            runs[str(name)] = resolve(merge(common, change))
        except ConfigError as error:
            raise ConfigError(f"compare.{name}: {error}") from None
    return runs


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
        experiments = {name: Experiment(c, ranks_of(c)) for name, c in runs.items()}
        checkpoint = Checkpoint.open(request.resume) if request.resume else None
        if checkpoint is not None and len(runs) > 1:
            raise ConfigError("--resume: a comparison has several runs; resume one without compare")
    except (ConfigError, TopologyError):
        if process_index() != 0:  # every process reads the same file and meets the same error
            raise SilencedError from None
        raise
    torch.set_num_threads(first.threads)
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
        except (ConfigError, OSError) as failure:
            error = failure
    raise_together(transport, error, timeout_s)
    if transport.processes == 1:
        return Path(chosen)
    return Path(share_text(transport, chosen, timeout_s)[0])


def _choose_folder(request: Request, checkpoint: Checkpoint | None) -> Path:
    folder = request.out
    if folder is None and checkpoint is not None and checkpoint.folder.parent.name == "checkpoints":
        run = checkpoint.folder.parent.parent
        if checkpoint.meta["n"] == ranks_of(resolve(_without_compare(request.values))):
            return run  # the same run goes on
    if folder is None:
        taken = [p.name for p in Path("runs").glob(f"{request.title}-*")]
        number = 1 + max((int(t.rsplit("-", 1)[1]) for t in taken if t[-3:].isdigit()), default=0)
        folder = Path("runs") / f"{request.title}-{number:03d}"
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"--out: {folder} is in use; name another folder, or continue that run with "
            f"--resume {folder}"
        )
    folder.mkdir(parents=True, exist_ok=True)
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
    try:
        program = _build(experiment, comm, checkpoint)
        if leader:
            folder.mkdir(parents=True, exist_ok=True)
            resolved = yaml.safe_dump(experiment.resolved(), sort_keys=False)
            (folder / "config.yaml").write_text(resolved)
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

    with (
        terminations() as stop,
        Recorder(
            folder, title, config.steps, leader=leader, tensorboard=config.tensorboard
        ) as recorder,
    ):
        recorder.truncate(comm.step)
        run_loop(comm, program, options, log=recorder.log, save=save_checkpoint, stop=stop)
    if config.trace:
        from gossamer.launch.trace import write_trace

        write_trace(folder / "trace.json", comm)
    summary = _summary(experiment, comm, program, recorder.last)
    if leader:
        (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary


def _build(
    experiment: Experiment, comm: Communicator, checkpoint: Checkpoint | None
) -> TrainingProgram:
    config = experiment.config
    problem = experiment.task.build(comm.n, config.seed)
    evaluation = {"examples": config.evaluate_examples}
    elsewhere = checkpoint is not None and checkpoint.meta["n"] != comm.n
    program = TrainingProgram(
        comm,
        problem,
        experiment.oracle(),
        experiment.algorithm,
        evaluation,
        start=checkpoint.mean() if checkpoint is not None and elsewhere else None,
    )
    if checkpoint is None:
        return program
    if checkpoint.meta["signature"] != program.signature():
        raise ConfigError(
            f"--resume: {checkpoint.folder} holds another model "
            f"({len(checkpoint.meta['signature'])} tensors, this one has "
            f"{len(program.signature())}, or their names or shapes differ); use its config.yaml"
        )
    if checkpoint.meta["step"] >= config.steps:
        raise ConfigError(
            f"steps: {checkpoint.folder} is at step {checkpoint.meta['step']} already; "
            f"set steps above it, got {config.steps}"
        )
    comm.step, comm.round = checkpoint.meta["step"], checkpoint.meta["round"]
    if elsewhere:
        if comm.transport.process == 0:
            print(
                f"gossamer: resuming {comm.n} ranks from the mean of {checkpoint.meta['n']}; "
                "what else the algorithm kept starts afresh",
                file=sys.stderr,
            )
        return program
    program.restore(checkpoint.rows(comm.ranks), checkpoint.meta["scalars"])
    if comm.transport.process == 0:  # the totals so far are process 0's; sums stay right
        comm.traffic.bytes_sent[0] += checkpoint.meta["traffic"]["bytes_sent"]
        comm.traffic.messages_sent[0] += checkpoint.meta["traffic"]["messages_sent"]
    return program


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
