"""Checkpoints: safetensors and JSON, complete or absent.

A checkpoint is a folder ``step-000001000`` with one file of rows per process, the mean over ranks
as a plain state dict (``mean.safetensors``), and ``checkpoint.json``. It is written under a
temporary name, synced, then renamed: a kill at any instant leaves the last complete one. Any number
of processes can read it, since a tensor's rows are found by rank.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gossamer.runtime.collectives import RankGroup
from gossamer.runtime.errors import CommError, ConfigError
from gossamer.runtime.state import Scalar

__all__ = ["Checkpoint", "CheckpointError", "discard_after", "latest", "save"]

_FORMAT = 1
_PREFIX = "step-"
_MEAN = "mean.safetensors"


class CheckpointError(CommError):
    """A checkpoint could not be written; the ones before it are intact."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        folder: where it lies.
        meta: step, round, n, the numbers of the state, and what the writer added.
        files: (first rank, one past the last, file) per writing process.
    """

    folder: Path
    meta: dict[str, Any]
    files: tuple[tuple[int, int, Path], ...]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read what lies in ``folder``, a checkpoint or a run folder (its latest is taken).

        Raises:
            ConfigError: nothing there, or a file is missing or cut short.
        """
        if not (folder / "checkpoint.json").is_file():
            found = latest(folder / "checkpoints") or latest(folder)
            if found is None:
                raise ConfigError(
                    f"resume: no complete checkpoint in {folder}; name a run folder that has "
                    "checkpoints/step-..., or start without --resume"
                )
            folder = found
        try:
            meta = json.loads((folder / "checkpoint.json").read_text())
            files = tuple((e["first"], e["last"], folder / e["file"]) for e in meta["files"])
            sizes = {folder / entry["file"]: entry["bytes"] for entry in meta["files"]}
            sizes[folder / _MEAN] = meta["mean_bytes"]
            missing = {"step", "n", "scalars"} - meta.keys()
            if missing:
                raise KeyError(*missing)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else error
            raise ConfigError(
                f"resume: {folder / 'checkpoint.json'} is broken ({reason}); {_way_out(folder)}"
            ) from error
        for path, size in sizes.items():
            if not path.is_file():
                raise ConfigError(f"resume: {path} is missing; {_way_out(folder)}")
            if path.stat().st_size != size:
                raise ConfigError(
                    f"resume: {path} has {path.stat().st_size} bytes, {size} were written: it was "
                    f"cut short; {_way_out(folder)}"
                )
        return cls(folder, meta, files)

    def rows(self, ranks: range) -> dict[str, Tensor]:
        """Return every tensor's rows of ``ranks``, (len(ranks), ...)."""
        parts: dict[str, list[Tensor]] = {}
        for first, last, path in self.files:
            low, high = max(first, ranks.start), min(last, ranks.stop)
            if low >= high:
                continue
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 - not a dict
                        rows = file.get_slice(name)[low - first : high - first]
                        parts.setdefault(name, []).append(rows)
            except SafetensorError as error:
                raise ConfigError(
                    f"resume: {path} is broken ({error}); {_way_out(self.folder)}"
                ) from error
        return {name: torch.cat(rows) for name, rows in parts.items()}

    def mean(self) -> dict[str, Tensor]:
        """Return the mean over ranks as a state dict of the module."""
        path = self.folder / _MEAN
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ConfigError(
                f"resume: {path} is broken ({error}); {_way_out(self.folder)}"
            ) from error


def save(
    folder: Path,
    comm: RankGroup,
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Scalar],
    mean: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    keep: int,
) -> Path:
    """Write a checkpoint of this step; every process calls it.

    Args:
        folder: ``checkpoints`` of the run, on a file system all processes see.
        comm: the ranks.
        tensors: rows of the hosted ranks, (local, ...) each.
        scalars: numbers, the same on every process.
        mean: the mean over ranks, written by process 0.
        meta: further JSON, the same on every process.
        keep: how many checkpoints stay.

    Raises:
        CheckpointError: some process could not write (a full disk, say); raised on all of them,
            the temporary files are removed and the earlier checkpoints intact.
    """
    final = folder / f"{_PREFIX}{comm.step:09d}"
    partial = folder / f".{final.name}.partial"
    process, leader = comm.transport.process, comm.transport.process == 0
    name = f"rows-{process:05d}.safetensors"
    failure: OSError | None = None
    try:
        if leader:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    except OSError as error:
        failure = error
    comm.barrier()
    try:
        if failure is None:
            rows = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
            _write(partial / name, rows)
            if leader:
                _write(partial / _MEAN, dict(mean))
    except (OSError, SafetensorError) as error:
        failure = OSError(str(error))
    _agree(comm, failure, partial)
    sizes = torch.full((comm.local, 1), (partial / name).stat().st_size, dtype=torch.int64)
    all_sizes = comm.all_gather(sizes.to(comm.device), count=False)[:, 0].tolist()
    if leader:
        try:
            _finish(final, partial, comm, all_sizes, scalars, meta)
        except OSError as error:
            failure = error
    _agree(comm, failure, partial)
    if leader:
        _prune(folder, keep)
    return final


def latest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in ``folder``, or None."""
    found = _complete(folder)
    return found[-1] if found else None


def discard_after(folder: Path, step: int) -> None:
    """Remove the checkpoints in ``folder`` after ``step``: a run that goes on from there is new.

    Process 0 calls it, newest first: a kill in between leaves a row of checkpoints without a gap.
    """
    for path in reversed(_complete(folder)):
        if int(path.name.removeprefix(_PREFIX)) > step:
            _remove(path)


def _complete(folder: Path) -> list[Path]:
    found = [p.parent for p in folder.glob(f"{_PREFIX}*/checkpoint.json")]
    found = [path for path in found if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def _remove(path: Path) -> None:
    """Remove a checkpoint; renamed first, so that none is ever seen half removed."""
    stale = path.with_name(f".{path.name}.partial")
    shutil.rmtree(stale, ignore_errors=True)
    with contextlib.suppress(OSError):  # what cannot be removed stays, and is whole
        path.rename(stale)
    shutil.rmtree(stale, ignore_errors=True)


def _way_out(folder: Path) -> str:
    """Say what to do about a broken checkpoint."""
    before = [p for p in _complete(folder.parent) if p.name < folder.name]
    if before:
        return f"use the one before: --resume {before[-1]}"
    return "name another checkpoint, or start without --resume"


def _finish(
    final: Path,
    partial: Path,
    comm: RankGroup,
    sizes: list[int],
    scalars: Mapping[str, Scalar],
    meta: Mapping[str, Any],
) -> None:
    spans = itertools.pairwise(comm.placement.starts.tolist())
    files = [
        {"first": a, "last": b, "file": f"rows-{p:05d}.safetensors", "bytes": sizes[a]}
        for p, (a, b) in enumerate(spans)
    ]
    content = {"format": _FORMAT, "step": comm.step, "n": comm.n, **meta}
    content |= {"scalars": dict(scalars), "files": files}
    content["mean_bytes"] = (partial / _MEAN).stat().st_size
    path = partial / "checkpoint.json"
    path.write_text(json.dumps(content, indent=1))
    _sync([path, partial])
    if final.exists():  # left by another run of this folder
        aside = final.with_name(f".{final.name}.aside.partial")
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    partial.rename(final)
    _sync([final.parent])


def _agree(comm: RankGroup, failure: OSError | None, partial: Path) -> None:
    if comm.agree(failure is None):
        return
    if comm.transport.process == 0:
        shutil.rmtree(partial, ignore_errors=True)
    reason = failure or "another process could not write"
    raise CheckpointError(
        f"checkpoint of step {comm.step}: {reason}; the earlier checkpoints in {partial.parent} "
        "are intact: free some space and continue with --resume"
    ) from failure


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({k: t.contiguous().cpu() for k, t in tensors.items()}, path)
    _sync([path])


def _sync(paths: Iterable[Path]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _prune(folder: Path, keep: int) -> None:
    complete = _complete(folder)
    for old in complete[: max(0, len(complete) - keep)]:
        _remove(old)
    for stale in folder.glob(f".{_PREFIX}*.partial"):
        shutil.rmtree(stale, ignore_errors=True)
