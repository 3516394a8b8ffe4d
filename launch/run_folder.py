"""Where a run writes: its folder, chosen and made once for all processes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from gossamer.launch.agreement import raise_together, share_text
from gossamer.launch.best import BEST
from gossamer.launch.comparison import ranks_of, variants_of
from gossamer.launch.config import Experiment
from gossamer.launch.recorder import Recorder, write_whole
from gossamer.runtime.checkpoint import Checkpoint, discard_after
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.transports import Transport

if TYPE_CHECKING:
    from gossamer.launch.run import Request

__all__ = ["make_folder", "prepare_folder"]


def make_folder(
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
    same_ranks = checkpoint.meta["n"] == ranks_of(next(iter(variants_of(request.values).values())))
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


def prepare_folder(folder: Path, experiment: Experiment, step: int, recorder: Recorder) -> None:
    """Write the configuration, and drop what a run that goes on from ``step`` makes anew."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        resolved = yaml.safe_dump(experiment.resolved(), sort_keys=False)
        write_whole(folder / "config.yaml", resolved)
        (folder / "summary.json").unlink(missing_ok=True)
        discard_after(folder / "checkpoints", step)
        discard_after(folder / BEST, step)
        recorder.truncate(step if step > 0 else -1)
    except OSError as error:
        raise ConfigError(
            f"--out: cannot write {folder} ({error.strerror}); free some space, or name another"
        ) from error
