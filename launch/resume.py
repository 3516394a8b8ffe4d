"""Going on from a checkpoint: what fits, what changed, what is refused."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gossamer.algorithms.conditions import needs_static
from gossamer.algorithms.program import TrainingProgram
from gossamer.launch.best import BEST
from gossamer.launch.config import Experiment
from gossamer.runtime import Communicator
from gossamer.runtime.checkpoint import Checkpoint, latest
from gossamer.runtime.errors import ConfigError

__all__ = ["Resumption", "resume_from"]

_FREE = frozenset(
    {
        "steps",
        "transport",
        "processes",
        "timeout_s",
        "log_every",
        "evaluate_every",
        "evaluate_examples",
        "evaluate_gradient",
        "checkpoint_every",
        "keep_checkpoints",
        "keep_best",
        "trace",
        "tensorboard",
    }
)
"""Fields that a resumed run may change without a word."""


def resume_from(folder: Path) -> Checkpoint | None:
    """Open the checkpoint to go on from; None: that run was ended before its first one.

    Raises:
        ConfigError: ``folder`` is no run and no checkpoint, or a file is missing or cut short.
    """
    begun = (folder / "config.yaml").is_file() and not (folder / "summary.json").exists()
    if begun and not any((folder / "checkpoints").glob("step-*")):
        if latest(folder / BEST) is not None:
            raise ConfigError(
                f"--resume: {folder} was ended before its first checkpoint but for the best one, "
                f"which a new start would remove; go on from it with --resume {folder / BEST}, or "
                "start without --resume, in another folder"
            )
        return None
    return Checkpoint.open(folder)


class Resumption:
    """A checkpoint read by this process, checked against the run that goes on from it.

    Nothing is said to other processes until ``apply``, so that what one finds wrong all can agree
    on before.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        experiment: Experiment,
        comm: Communicator,
        program: TrainingProgram,
        folder: Path,
    ) -> None:
        """Check and read.

        Args:
            checkpoint: opened.
            experiment: the run that goes on.
            comm: its ranks; moved to the checkpoint's step by ``apply``.
            program: not started.
            folder: of the run that goes on.

        Raises:
            ConfigError: another model, a graph the state does not fit, no steps left, broken files.
        """
        self._checkpoint, self._comm, self._program = checkpoint, comm, program
        self._folder = folder
        self._elsewhere = checkpoint.meta["n"] != comm.n
        here = checkpoint.meta.get("signature"), program.signature()
        if here[0] != here[1]:
            raise ConfigError(
                f"--resume: {checkpoint.folder} holds another model than 'task' describes: "
                f"{_first_difference(*here)}; use the config.yaml of its run"
            )
        require_steps_left(checkpoint, experiment.config.steps, folder)
        if self._elsewhere and program.oracle.training_figures != "open":
            raise ConfigError(
                f"ranks: {checkpoint.folder} is of a private run on {checkpoint.meta['n']} ranks, "
                f"whose keys and spent epsilon {comm.n} ranks cannot go on with; resume with "
                f"ranks: {checkpoint.meta['n']}"
            )
        if self._elsewhere and program.problem.restarts is not None:
            raise ConfigError(
                f"ranks: {checkpoint.folder} is of {checkpoint.meta['n']} ranks with weights that "
                "parameters were merged into, which the mean of the parameters lacks; resume with "
                f"ranks: {checkpoint.meta['n']}"
            )
        self._mean: dict[str, torch.Tensor] | None = None
        self._rows: dict[str, torch.Tensor] = {}
        if self._elsewhere:
            self._mean = checkpoint.mean()
            if program.oracle.remembers:
                self._rows = checkpoint.rows(range(checkpoint.meta["n"]), "oracle/")
        else:
            _require_same_graph(checkpoint, experiment)
            self._rows = checkpoint.rows(comm.ranks)
        self._changes = changed_fields(checkpoint, experiment)
        # Steps after the checkpoint may have been seen. Made again with other rates (of a schedule
        # that knows the end), or with sums that round otherwise, they need other secrets.
        before, now = checkpoint.meta.get("configuration", {}), experiment.resolved()
        self._redoes_otherwise = comm.device.type != "cpu" or any(
            before.get(name) != now.get(name) for name in ("steps", "transport")
        )

    def apply(self) -> None:
        """Start the program where the checkpoint stands.

        Raises:
            ConfigError: the algorithm or oracle keeps another state; every process finds the same.
        """
        checkpoint, comm, program = self._checkpoint, self._comm, self._program
        program.start(self._mean, resumed=True)
        fixed = checkpoint.meta.get("fixed_sha256", program.fixed_sha256)
        if fixed != program.fixed_sha256:
            raise ConfigError(
                f"--resume: {checkpoint.folder} was written beside other tensors that are not "
                "trained (frozen parameters, supports of sparse matrices), for which its own were "
                "found; use the config.yaml of its run, its seed and model included"
            )
        comm.step = checkpoint.meta["step"]
        comm.round = checkpoint.meta.get("round", comm.step * program.rounds_per_step)
        program.count_on(checkpoint.meta.get("totals", {}))
        leader = comm.transport.process == 0
        if not self._elsewhere:
            require_same_state(checkpoint, self._rows, program)
            program.restore(self._rows, checkpoint.meta["scalars"])
            in_place = self._folder.resolve() == checkpoint.folder.resolve().parent.parent
            if self._changes or not in_place or self._redoes_otherwise:
                program.oracle.branch()
        if leader and self._changes:
            print(f"gossamer: resuming with another {self._changes}", file=sys.stderr)
        if self._elsewhere:
            remembered, goes_on = program.oracle.remembers, False
            if remembered:
                state = {k.removeprefix("oracle/"): rows for k, rows in self._rows.items()}
                goes_on = program.oracle.take_over(state)
            if leader:
                print(
                    f"gossamer: resuming {comm.n} ranks from the mean of {checkpoint.meta['n']}; "
                    "what else the algorithm kept starts afresh"
                    + _with_memories(remembered, goes_on),
                    file=sys.stderr,
                )
                if getattr(program.problem.train, "sequential", False):
                    # Step t is found by its number, and takes more or fewer texts than it did.
                    does = "skips" if comm.n > checkpoint.meta["n"] else "repeats"
                    print(
                        f"gossamer: the stream {does} texts, for it is read as if all steps so far "
                        f"had been of {comm.n} ranks",
                        file=sys.stderr,
                    )
            return
        if leader:  # the totals so far are process 0's; sums stay right
            traffic = checkpoint.meta.get("traffic", {})
            comm.traffic.bytes_sent[0] += traffic.get("bytes_sent", 0)
            comm.traffic.messages_sent[0] += traffic.get("messages_sent", 0)


def _with_memories(remembered: str | None, goes_on: bool) -> str:
    if remembered is None:
        return ""
    if goes_on:
        return f", but for the {remembered} of examples, which go on"
    return f", and so do the {remembered} of examples"


def changed_fields(checkpoint: Checkpoint, experiment: Experiment) -> str:
    """Return every field that is not as in the checkpoint's run, with both values; '' for none."""
    before = _flat(checkpoint.meta.get("configuration", {}))
    resolved = json.loads(json.dumps(experiment.resolved(), default=str))  # tuples become lists
    now = _flat(resolved) if before else {}
    spelled = []
    for name in [*now, *sorted(before.keys() - now.keys())]:
        kind, old, new = name.partition(".")[0], before.get(name), now.get(name)
        renamed = before.get(f"{kind}.name") != now.get(f"{kind}.name") and name != f"{kind}.name"
        if old != new and kind not in _FREE and not renamed:
            spelled.append(f"{name} ({_spelled(old)} -> {_spelled(new)})")
    return ", ".join(spelled)


def _spelled(value: Any) -> str:
    return "unset" if value is None else str(value)


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _require_same_graph(checkpoint: Checkpoint, experiment: Experiment) -> None:
    """Refuse another W where the algorithm's state is tied to the one it was made with."""
    before = checkpoint.meta.get("topology")
    tied = experiment.algorithm.follows_graph or needs_static(experiment.algorithm)
    if before in (None, experiment.topology.digest()) or not tied:
        return
    raise ConfigError(
        f"topology: {experiment.algorithm.name} needs the same graph from its first step on, and "
        f"{checkpoint.folder} was written on another than {experiment.topology.name}; resume with "
        "the topology of its config.yaml, or take another algorithm, such as dsgd, in a new run"
    )


def require_steps_left(checkpoint: Checkpoint, steps: int, folder: Path) -> None:
    """Refuse a run that is over; one killed between its last checkpoint and its summary is not."""
    step = checkpoint.meta["step"]
    in_place = folder.resolve() == checkpoint.folder.resolve().parent.parent
    unfinished = in_place and not (folder / "summary.json").exists()
    if step > steps or (step == steps and not unfinished):
        raise ConfigError(
            f"steps: {checkpoint.folder} is at step {step} already, got {steps}; set more steps, "
            f"for example -s steps={2 * step}"
        )


def require_same_state(
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
