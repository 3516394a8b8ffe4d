"""``records.zo``: what a run whose gradients are numbers is replayed from, 16 bytes each.

The file is a length (u64), a header in JSON, padded with blanks, and the records as they were
applied, in order: (step u32, probe u32, coefficient f64), little-endian. An exported file says in
its header what the run came to, and ends with the SHA-256 of all before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gossamer.algorithms.estimates import Directions
from gossamer.algorithms.program import TrainingProgram
from gossamer.algorithms.zeroth_order.probes import Probes
from gossamer.algorithms.zeroth_order.records import RECORD, make_records
from gossamer.launch.config import Experiment
from gossamer.launch.recorder import writing
from gossamer.runtime import Communicator, ConfigError
from gossamer.runtime.checkpoint import Checkpoint

__all__ = ["NAME", "RecordLog", "open_log", "pack", "sealed", "unpack", "unsealed"]

NAME = "records.zo"

_FORMAT = 1
_ALIGNMENT = 16
_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 1 << 24
_REPLAYED_FROM = ("format", "ranks", "delay", "recipe", "tensors", "dtype", "device", "optimizer")
"""Fields that a run cannot change on the way; ``steps`` where the rate follows it."""


class RecordLog:
    """Appends what is applied; process 0 has it. A context that closes the file."""

    def __init__(self, path: Path, header: Mapping[str, Any], step: int, source: Path) -> None:
        """Begin the file, or go on with that of a run at ``step``, its later records dropped.

        Args:
            path: where to write.
            header: what a replay needs.
            step: the run's.
            source: the log of the run that goes on; ``path`` where that is the same.

        Raises:
            ConfigError: there is no log of the steps before, or of another method.
        """
        self._path = path
        self._file: BinaryIO | None = None
        kept = np.empty(0, RECORD)
        if step > 0:
            if not source.exists():
                raise ConfigError(f"{source} is missing, without which the run has no beginning")
            before, kept = unpack(source.read_bytes(), source)
            header = _continued(before, header)
            kept = kept[kept["step"].astype(np.int64) + header["delay"] < step]
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("wb") as file:
            file.write(pack(header, kept))
            file.flush()
            os.fsync(file.fileno())  # what a checkpoint counts on stays
        partial.replace(path)

    def __enter__(self) -> RecordLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # what counts was synced, or said to be lost
                self._file.close()

    def append(self, mean: Directions) -> None:
        """Take what all ranks apply now."""
        assert isinstance(mean, Probes), type(mean)
        step = mean.along[0][0].step
        records = make_records(step, mean.numbers[0], mean.coefficients[0].numpy())
        with writing(self._path):
            if self._file is None:
                self._file = self._path.open("ab")
            self._file.write(records.tobytes())

    def sync(self) -> None:
        """Bring all to the disk: a checkpoint of this step is about to be written."""
        if self._file is not None:
            with writing(self._path):
                self._file.flush()
                os.fsync(self._file.fileno())


def open_log(
    folder: Path,
    experiment: Experiment,
    comm: Communicator,
    program: TrainingProgram,
    checkpoint: Checkpoint | None,
) -> RecordLog | None:
    """Return the log of a run whose updates are numbers that all ranks share; None for others.

    Process 0 calls it, with the program at its first step. A run that goes on otherwise than it
    began has no log: what there is of one is renamed, and a line says why.
    """
    header = _header(experiment, comm, program)
    if header is None:
        return None
    path = folder / NAME
    source = path if checkpoint is None else checkpoint.folder.parent.parent / NAME
    try:
        log = RecordLog(path, header, comm.step, source)
    except ConfigError as reason:
        print(f"gossamer: {path} is not written: {reason}", file=sys.stderr)
        if path.exists():
            path.replace(path.with_name(f"{NAME}.until-{comm.step}"))
        return None
    except OSError as error:
        raise ConfigError(
            f"--out: cannot write {path} ({error.strerror}); free some space, or name another"
        ) from error
    experiment.algorithm.watch(log.append)
    return log


def pack(header: Mapping[str, Any], records: NDArray[np.void]) -> bytes:
    """Return the bytes of a log."""
    text = json.dumps(header).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text + records.tobytes()


def unpack(content: bytes, path: Path) -> tuple[dict[str, Any], NDArray[np.void]]:
    """Return header and records; half a record that a kill left at the end is dropped.

    Raises:
        ConfigError: it does not begin with a header.
    """
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    begin = _LENGTH_BYTES + length
    try:
        if not 0 < length <= min(len(content) - _LENGTH_BYTES, _MOST_HEADER_BYTES):
            raise ValueError(f"a header of {length} bytes in a file of {len(content)}")
        header = json.loads(content[_LENGTH_BYTES:begin])
        if not isinstance(header, dict) or header.get("format") != _FORMAT:
            raise ValueError(f"no header of format {_FORMAT}")
    except ValueError as error:
        raise ConfigError(f"{path}: is no log of records ({error}); name another file") from error
    count = (len(content) - begin) // RECORD.itemsize
    return header, np.frombuffer(content, RECORD, count, begin)


def _header(
    experiment: Experiment, comm: Communicator, program: TrainingProgram
) -> dict[str, Any] | None:
    """Return what a replay needs; None: the run's updates are no numbers that all ranks share.

    Args:
        experiment: the run.
        comm: its ranks.
        program: started, at x0 or at a checkpoint.
    """
    delay = experiment.algorithm.mean_delay(comm.topology)
    if program.oracle.recipe is None or delay is None:
        return None
    assert experiment.optimizer is not None, "an algorithm that applies a mean has one"
    configuration = json.loads(json.dumps(experiment.resolved(), default=str))
    return {
        "format": _FORMAT,
        "ranks": comm.n,
        "steps": experiment.config.steps,
        "delay": delay,
        "recipe": program.oracle.recipe,
        "tensors": program.signature(),
        "dtype": str(program.layout.dtype).removeprefix("torch."),
        "device": comm.device.type,
        "optimizer": configuration["optimizer"],
        "base_sha256": program.layout.digest(program.state.x[0]).hex(),
        "configuration": configuration,
    }


def _continued(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return the header of a log that goes on.

    Raises:
        ConfigError: its beginning was made otherwise than what comes.
    """
    fields = list(_REPLAYED_FROM)
    if now["optimizer"].get("schedule") in ("linear", "cosine"):
        fields.append("steps")
    changed = [name for name in fields if before.get(name) != now[name]]
    if changed:
        raise ConfigError(f"the run goes on with another {', '.join(changed)}")
    return {**before, "steps": now["steps"]}


def sealed(content: bytes) -> bytes:
    """Return the bytes with their SHA-256 behind them."""
    return content + hashlib.sha256(content).digest()


def unsealed(content: bytes, path: Path) -> bytes:
    """Return what ``sealed`` was given.

    Raises:
        ConfigError: the bytes are not those that were written.
    """
    size = hashlib.sha256().digest_size
    if len(content) <= size or sealed(content[:-size]) != content:
        raise ConfigError(
            f"{path}: its SHA-256 is not the one written at its end: it was cut short or changed; "
            "export it again"
        )
    return content[:-size]
