"""From the command line to running processes: read, check, then start what nothing else started."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from gossamer.launch.comparison import experiments_of, ranks_of, variants_of, with_overrides
from gossamer.launch.config import RunConfig
from gossamer.launch.config_file import load_yaml
from gossamer.launch.resume import resume_from
from gossamer.launch.run import Request, execute, execute_in_child, require_threads
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.transports.select import detect_launcher

__all__ = ["start_run"]


def start_run(
    file: Path | None,
    settings: list[str],
    options: dict[str, Any],
    out: Path | None,
    resume: Path | None,
) -> int:
    """Run ``file``; starts local processes when nothing launched this one and several are asked.

    Args:
        file: YAML; None: the configuration of the run that is resumed.
        settings: overrides, ``a.b=c``.
        options: fields given as options of their own; None where not given.
        out: folder to write.
        resume: run folder or checkpoint to go on from.

    Raises:
        ConfigError: what is wrong, before any process starts.
    """
    values = with_overrides(load_yaml(_file_of(file, resume)), settings, options)
    title = file.stem if file is not None else "resumed"
    request = Request(values, title, out, resume)
    if detect_launcher() != "none":
        return execute(request)
    runs = variants_of(values)
    first = next(iter(runs.values()))
    count = _process_count(first)
    if count == 1:
        return execute(request)
    require_threads(first)
    # All that one process can find wrong is found here, before there are several.
    experiments = experiments_of(runs, {k: c.ranks or count for k, c in runs.items()})
    for experiment in experiments.values():
        experiment.task.build(experiment.n, experiment.config.seed)
    if resume is not None:
        resume_from(resume)
    if first.transport == "mpi":
        from gossamer.launch.processes import run_mpi

        return run_mpi(count, sys.argv[1:])
    from gossamer.launch.processes import run_processes

    return run_processes(count, execute_in_child, request)


def _file_of(file: Path | None, resume: Path | None) -> Path:
    if file is not None:
        return file
    if resume is None:
        raise ConfigError("file: missing; write 'gossamer run FILE'")
    checkpoint = resume_from(resume)
    folder = resume if checkpoint is None else checkpoint.folder.parent.parent
    if not (folder / "config.yaml").is_file():
        raise ConfigError(
            f"file: {resume} has no config.yaml beside its checkpoints; give the run's YAML: "
            f"gossamer run FILE --resume {resume}"
        )
    return folder / "config.yaml"


def _process_count(config: RunConfig) -> int:
    if config.transport == "stacked" or (config.transport == "auto" and config.processes is None):
        if config.processes not in (None, 1):
            raise ConfigError(
                f"processes: transport stacked is one process, got {config.processes}; "
                "use transport: native, gloo or mpi, or processes: 1"
            )
        return 1
    count = config.processes or ranks_of(config)
    if config.ranks is not None and count > config.ranks:
        raise ConfigError(
            f"processes: {count} processes for {config.ranks} ranks; at most one per rank"
        )
    return count
