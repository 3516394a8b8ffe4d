"""``gossamer submit``: a checked configuration becomes a batch job for SLURM, PBS or LSF.

The job's folder holds ``job.sh``, its log, and the run in a folder of the job's name. The script
goes on from the latest checkpoint when it is started again, by the scheduler or by hand.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Literal

from gossamer.launch.comparison import variants_of, with_overrides
from gossamer.launch.config import Experiment, RunConfig
from gossamer.launch.config_file import load_yaml
from gossamer.runtime.errors import ConfigError, nearest

__all__ = ["Job", "job_script", "submit"]

Scheduler = Literal["slurm", "pbs", "lsf"]

_SCRIPT = Template(
    """\
#!/bin/bash
$directives

export PATH=$bin:"$$PATH"
cd $cwd || exit 1
$environment
run=$run
command=(gossamer run $file$settings)
$start
$launch "$${command[@]}"
"""
)
_RESUMABLE = """\
if compgen -G "$run/checkpoints/step-*/checkpoint.json" > /dev/null; then
  command+=(--resume "$run")  # started again: go on from the latest checkpoint
else
  rm -rf "$run"  # an earlier start that ended before its first checkpoint
  command+=(--out "$run")
fi"""
_COMPARISON = 'command+=(--out "$run")  # several runs: not started again by the scheduler'
_MEETING_PLACE = """\
export MASTER_ADDR=$(head -n 1 {hosts})
export MASTER_PORT=$((20000 + {number} % 20000))"""


@dataclass(frozen=True)
class Job:
    """What to ask a scheduler for.

    Attributes:
        file: the YAML file.
        scheduler: whose script to write.
        nodes: machines.
        ranks_per_node: processes on each; one rank each unless the file asks for more ranks.
        time: limit as HH:MM:SS; None: the scheduler's.
        queue: partition or queue; None: the default one.
        account: account or project to charge.
        gpus_per_node: GPUs to reserve on each node, one for each process.
        name: of the job; None: the file's.
        out: folder of the job; None: the next free one below ``runs/``.
        settings: overrides, ``a.b=c``.
    """

    file: Path
    scheduler: Scheduler
    nodes: int
    ranks_per_node: int
    time: str | None = None
    queue: str | None = None
    account: str | None = None
    gpus_per_node: int = 0
    name: str | None = None
    out: Path | None = None
    settings: Sequence[str] = ()

    @property
    def processes(self) -> int:
        """Processes in all."""
        return self.nodes * self.ranks_per_node

    @property
    def title(self) -> str:
        """The job's name."""
        return self.name or self.file.stem


def submit(job: Job, *, dry_run: bool = False) -> None:
    """Check the configuration, write the job's script and hand it to the scheduler.

    Args:
        job: what to run and where.
        dry_run: print the script; write and submit nothing.

    Raises:
        ConfigError: a field or option is wrong, or the scheduler is not here or refuses the job.
    """
    runs = _check(job)
    folder = _choose_folder(job)
    script = job_script(job, folder, next(iter(runs.values())), resumable=len(runs) == 1)
    if dry_run:
        print(script, end="")
        return
    command = _COMMANDS[job.scheduler]
    if shutil.which(command) is None:
        raise ConfigError(
            f"--scheduler: {job.scheduler} needs '{command}', which is not on PATH; call this on a "
            "login node, or see the script with --dry-run"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.sh"
    path.write_text(script)
    path.chmod(0o755)
    with path.open() as file:  # bsub reads the script from its input, the others by name
        by_input = job.scheduler == "lsf"
        done = subprocess.run(
            [command] if by_input else [command, str(path)],
            stdin=file if by_input else subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    if done.returncode != 0:
        raise ConfigError(f"--scheduler: {command} refused {path}: {done.stderr.strip()}")
    print(f"{done.stdout.strip()}\nScript: {path}")


def job_script(job: Job, folder: Path, config: RunConfig, *, resumable: bool) -> str:
    """Return the batch script.

    Args:
        job: what to run and where.
        folder: of the job.
        config: of the run, or of the first of a comparison.
        resumable: whether it is one run, which can go on from its checkpoint.
    """
    folder = folder.resolve()
    settings = [word for setting in job.settings for word in ("-s", setting)]
    if job.gpus_per_node and job.scheduler != "slurm" and config.transport == "auto":
        settings += ["--transport", "nccl"]  # under mpirun, auto means mpi
    directives = _DIRECTIVES[job.scheduler](job, folder, config, resumable)
    return _SCRIPT.substitute(
        directives="\n".join(directives),
        bin=shlex.quote(str(Path(sys.executable).parent)),
        cwd=shlex.quote(str(Path.cwd())),
        environment=_environment(job, config),
        run=shlex.quote(str(folder / job.title)),
        file=shlex.quote(str(job.file.resolve())),
        settings="".join(f" {shlex.quote(word)}" for word in settings),
        start=_RESUMABLE if resumable else _COMPARISON,
        launch={
            "slurm": "srun --kill-on-bad-exit=1",
            "pbs": f"mpiexec -n {job.processes}",
            "lsf": f"mpirun -n {job.processes}",
        }[job.scheduler],
    )


# --- what each scheduler wants ------------------------------------------------------------------


def _slurm(job: Job, folder: Path, config: RunConfig, resumable: bool) -> list[str]:
    options = {
        "job-name": job.title,
        "nodes": job.nodes,
        "ntasks-per-node": job.ranks_per_node,
        "cpus-per-task": config.threads,
        "gpus-per-node": job.gpus_per_node or None,
        "time": job.time,
        "partition": job.queue,
        "account": job.account,
        "signal": "TERM@60",  # to the processes, a minute before the limit: the run saves and ends
        "open-mode": "append",
        "output": f'"{folder}/job-%j.log"',
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None]
    return [*lines, "#SBATCH --requeue" if resumable else "#SBATCH --no-requeue"]


def _pbs(job: Job, folder: Path, config: RunConfig, resumable: bool) -> list[str]:
    cores = job.ranks_per_node * config.threads
    select = f"select={job.nodes}:ncpus={cores}:mpiprocs={job.ranks_per_node}"
    if job.gpus_per_node:
        select += f":ngpus={job.gpus_per_node}"
    options = [
        ("-N", job.title),
        ("-l", select),
        ("-l", "place=scatter"),
        ("-l", f"walltime={job.time}" if job.time else None),
        ("-q", job.queue),
        ("-A", job.account),
        ("-r", "y" if resumable else "n"),
        ("-j", "oe"),
        ("-o", f"{folder}/job.log"),
    ]
    return [f"#PBS {option} {value}" for option, value in options if value is not None]


def _lsf(job: Job, folder: Path, config: RunConfig, resumable: bool) -> list[str]:
    options = [
        ("-J", job.title),
        ("-n", job.processes),
        ("-R", f'"span[ptile={job.ranks_per_node}]"'),
        ("-R", f'"affinity[core({config.threads})]"' if config.threads > 1 else None),
        ("-gpu", f'"num={job.gpus_per_node}"' if job.gpus_per_node else None),
        ("-W", _minutes(job.time) if job.time else None),
        ("-wa", "TERM"),  # and when: a minute before the limit, so that the run saves and ends
        ("-wt", "1"),
        ("-q", job.queue),
        ("-P", job.account),
        ("-r" if resumable else "-rn", ""),
        ("-o", f'"{folder}/job-%J.log"'),
    ]
    return [f"#BSUB {option} {value}".rstrip() for option, value in options if value is not None]


_Directives = Callable[[Job, Path, RunConfig, bool], list[str]]
_DIRECTIVES: dict[Scheduler, _Directives] = {"slurm": _slurm, "pbs": _pbs, "lsf": _lsf}
_COMMANDS: dict[Scheduler, str] = {"slurm": "sbatch", "pbs": "qsub", "lsf": "bsub"}


def _minutes(time: str) -> str:
    """Return HH:MM for HH:MM:SS, rounded up."""
    hours, minutes, seconds = (int(part) for part in time.split(":"))
    total = 60 * hours + minutes + (seconds > 0)
    return f"{total // 60}:{total % 60:02d}"


def _environment(job: Job, config: RunConfig) -> str:
    """Return the variables that processes need and the scheduler does not set."""
    if job.scheduler == "slurm":
        # Since SLURM 22.05 srun does not take it from the job.
        return f"export SRUN_CPUS_PER_TASK={config.threads}"
    if job.scheduler == "pbs":
        return _MEETING_PLACE.format(hosts='"$PBS_NODEFILE"', number="${PBS_JOBID%%[.[]*}")
    return _MEETING_PLACE.format(hosts='"$LSB_DJOB_HOSTFILE"', number="LSB_JOBID")


# --- checks -------------------------------------------------------------------------------------


def _check(job: Job) -> dict[str, RunConfig]:
    """Return the runs of the file; what needs the data is checked on the nodes, where it is."""
    if job.scheduler not in _DIRECTIVES:
        raise ConfigError(f"--scheduler: no '{job.scheduler}'{nearest(job.scheduler, _DIRECTIVES)}")
    for option, count in (("nodes", job.nodes), ("ranks-per-node", job.ranks_per_node)):
        if count < 1:
            raise ConfigError(f"--{option}: must be at least 1, got {count}")
    if job.time is not None and not re.fullmatch(r"\d{1,4}:[0-5]\d:[0-5]\d", job.time):
        raise ConfigError(f"--time: write HH:MM:SS, for example 04:00:00, got '{job.time}'")
    for option in ("title", "queue", "account"):
        value = getattr(job, option)
        if value is not None and not re.fullmatch(r"[\w.,:@/+-]+", value):
            name = "name" if option == "title" else option
            raise ConfigError(f"--{name}: letters, digits and ._- only, got '{value}'")
    if job.gpus_per_node and job.gpus_per_node < job.ranks_per_node:
        raise ConfigError(
            f"--gpus-per-node: {job.ranks_per_node} processes on a node need a GPU each, got "
            f"{job.gpus_per_node}; use --ranks-per-node {job.gpus_per_node}"
        )
    runs = variants_of(with_overrides(load_yaml(job.file), list(job.settings)))
    for config in runs.values():
        n = config.ranks or job.processes
        if n < job.processes:
            raise ConfigError(
                f"ranks: {n} ranks cannot fill {job.processes} processes ({job.nodes} nodes x "
                f"{job.ranks_per_node}); remove 'ranks', or ask for fewer"
            )
        if config.transport == "stacked" and job.processes > 1:
            raise ConfigError(
                f"transport: stacked is one process, this job has {job.processes}; use auto"
            )
        Experiment(config, n)
    return runs


def _choose_folder(job: Job) -> Path:
    if job.out is None:
        taken = (re.fullmatch(r".*-(\d+)", p.name) for p in Path("runs").glob(f"{job.title}-*"))
        number = 1 + max((int(match[1]) for match in taken if match), default=0)
        return Path("runs") / f"{job.title}-{number:03d}"
    if job.out.exists() and (not job.out.is_dir() or any(job.out.iterdir())):
        raise ConfigError(
            f"--out: {job.out} is in use; name another folder, or submit its job.sh again"
        )
    return job.out
