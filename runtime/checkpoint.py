"""Checkpoints: safetensors and JSON, complete or absent.

A checkpoint is a folder ``step-000001000`` with one file of rows per process, the mean over ranks
as a plain state dict (``mean.safetensors``), and ``checkpoint.json``. It is written under a
temporary name, synced, then renamed: a kill at any instant leaves the last complete one. Any number
of processes can read it, since a tensor's rows are found by rank.
"""

from __future__ import annotations

import contextlib
import hashlib
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

_FORMAT = 2
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
            _check_types(meta)
            files = tuple((e["first"], e["last"], folder / e["file"]) for e in meta["files"])
            sizes = {folder / e["file"]: e["bytes"] for e in [*meta["files"], meta["mean"]]}
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

    def rows(self, ranks: range, under: str = "") -> dict[str, Tensor]:
        """Return every tensor's rows of ``ranks``, (len(ranks), ...), if its name begins so."""
        parts: dict[str, list[Tensor]] = {}
        for first, last, path in self.files:
            low, high = max(first, ranks.start), min(last, ranks.stop)
            if low >= high:
                continue
            self._verify(path)
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 - not a dict
                        if not name.startswith(under):
                            continue
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
        self._verify(path)
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ConfigError(
                f"resume: {path} is broken ({error}); {_way_out(self.folder)}"
            ) from error

    def _verify(self, path: Path) -> None:
        """Refuse a file whose bytes are not those that were written."""
        entries = [*self.meta["files"], self.meta["mean"]]
        written = next(e["sha256"] for e in entries if e["file"] == path.name)
        if _sha256(path).hex() != written:
            raise ConfigError(
                f"resume: {path} is broken (its SHA-256 is not the one written down); "
                f"{_way_out(self.folder)}"
            )


def _check_types(meta: Any) -> None:
    """Raise ValueError or KeyError where ``checkpoint.json`` is not what ``save`` writes."""
    if not isinstance(meta, dict):
        raise ValueError(f"a {type(meta).__name__} where the fields belong")
    if meta["format"] != _FORMAT:
        raise ValueError(f"format {meta['format']!r}, this version reads {_FORMAT}")
    least = {"step": 0, "n": 1, "round": 0, "topology": 0}
    _check_counts({k: v for k, v in meta.items() if k in least} | _pick(meta, "step", "n"), least)
    for name in ("scalars", "traffic", "configuration"):
        if not isinstance(meta.get(name, {}), dict):
            raise ValueError(f"{name} is {meta[name]!r}")
    _check_counts(meta.get("traffic", {}), {})
    scalars, signature = meta["scalars"], meta.get("signature", [])
    for name, value in scalars.items():
        if not isinstance(value, Scalar | None):
            raise ValueError(f"scalars.{name} is {value!r}")
    if not isinstance(signature, list) or not all(
        isinstance(s, list) and len(s) == 2 and isinstance(s[1], list) for s in signature
    ):
        raise ValueError("signature is no list of [name, shape]")
    if not isinstance(meta["files"], list) or not meta["files"]:
        raise ValueError(f"files is {meta['files']!r}")
    end = 0
    for entry in [*meta["files"], meta["mean"]]:
        if not isinstance(entry, dict):
            raise ValueError(f"a file's entry is {entry!r}")
        _check_counts(_pick(entry, "bytes"), {})
        for key in ("file", "sha256"):
            if not isinstance(entry[key], str) or Path(entry[key]).name != entry[key]:
                raise ValueError(f"{key} of a file is {entry[key]!r}")
    for entry in meta["files"]:
        _check_counts(_pick(entry, "first", "last"), {})
        if entry["first"] != end or entry["last"] <= end:
            raise ValueError(f"the rows of {entry['file']} do not follow those before")
        end = entry["last"]
    if end != meta["n"]:
        raise ValueError(f"the files hold {end} of {meta['n']} rows")


def _pick(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: values[name] for name in names}


def _check_counts(values: Mapping[str, Any], least: Mapping[str, int]) -> None:
    for name, value in values.items():
        if type(value) is not int or value < least.get(name, 0):
            raise ValueError(f"{name} is {value!r}")


def _sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


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
    written = [*(partial / name).stat().st_size.to_bytes(8, "little"), *_sha256(partial / name)]
    local = torch.tensor([written] * comm.local, dtype=torch.uint8)
    entries = comm.all_gather(local.to(comm.device), count=False).tolist()
    if leader:
        try:
            _finish(final, partial, comm, entries, scalars, meta)
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

    What a kill left half written or half removed goes too.

    Process 0 calls it, newest first: a kill in between leaves a row of checkpoints without a gap.
    """
    for path in reversed(_complete(folder)):
        if int(path.name.removeprefix(_PREFIX)) > step:
            _remove(path)
    _sweep(folder)


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
    entries: list[list[int]],
    scalars: Mapping[str, Scalar],
    meta: Mapping[str, Any],
) -> None:
    spans = itertools.pairwise(comm.placement.starts.tolist())
    files = [
        {
            "first": a,
            "last": b,
            "file": f"rows-{p:05d}.safetensors",
            "bytes": int.from_bytes(entries[a][:8], "little"),
            "sha256": bytes(entries[a][8:]).hex(),
        }
        for p, (a, b) in enumerate(spans)
    ]
    content = {"format": _FORMAT, "step": comm.step, "n": comm.n, **meta}
    content |= {"scalars": dict(scalars), "files": files}
    mean = partial / _MEAN
    content["mean"] = {"file": _MEAN, "bytes": mean.stat().st_size, "sha256": _sha256(mean).hex()}
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
    path.touch(mode=0o600)  # before anything is in it: a private run's keys are
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
    _sweep(folder)


def _sweep(folder: Path) -> None:
    """Remove what a kill left half written or half removed."""
    for stale in folder.glob(f".{_PREFIX}*.partial"):
        shutil.rmtree(stale, ignore_errors=True)
