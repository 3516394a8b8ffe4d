"""What a run writes while it goes: metrics.jsonl, TensorBoard events, a progress line."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gossamer.runtime.errors import CommError, ConfigError
from gossamer.runtime.loop import Record

__all__ = ["OutputError", "Recorder", "check_tensorboard", "to_json", "write_whole", "writing"]

_PLAIN_EVERY_S = 5.0
_TIMES = ("seconds", "seconds_compute", "seconds_communicate")


class OutputError(CommError):
    """A file of the run could not be written; the checkpoints are intact."""


class Recorder:
    """Takes the records of one run on process 0; on the others it takes and drops them.

    Lines are flushed as they come, so that what was logged survives a kill.
    """

    def __init__(
        self, folder: Path, title: str, steps: int, *, leader: bool, tensorboard: bool
    ) -> None:
        self._folder, self._title, self._steps, self._leader = folder, title, steps, leader
        self._file: IO[str] | None = None
        self._board: Any = None
        self._progress: Progress | None = None
        self._spoke = 0.0
        self._wants_board = tensorboard
        self._before = dict.fromkeys(_TIMES, 0.0)
        self.last: Record = {}

    def __enter__(self) -> Recorder:
        if not self._leader:
            return self
        with writing(self._folder / "metrics.jsonl"):
            self._file = (self._folder / "metrics.jsonl").open("a")
        if self._wants_board:
            self._board = _open_tensorboard(self._folder)
        console = Console(stderr=True)
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._progress.start()
            self._task = self._progress.add_task(self._title, total=self._steps, figures="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for stream in (self._file, self._board):
            if stream is not None:
                with contextlib.suppress(OSError):  # lines were flushed, or said to be lost
                    stream.close()
        if self._progress is not None:
            self._progress.stop()

    def log(self, record: Record) -> None:
        """Write one record; times go on from those of the run that is resumed."""
        record = {k: v + self._before[k] if k in _TIMES else v for k, v in record.items()}
        self.last = {**self.last, **record}
        if self._file is None:
            return
        with writing(self._folder / "metrics.jsonl"):
            self._file.write(to_json(record) + "\n")
            self._file.flush()
            if self._board is not None:
                for name, value in record.items():
                    if name != "step":
                        self._board.add_scalar(name, value, record["step"])
        self._show(int(record["step"]))

    def truncate(self, step: int) -> None:
        """Drop the lines after ``step``: a resumed run writes them again."""
        path = self._folder / "metrics.jsonl"
        if not self._leader or not path.exists():
            return
        kept = []
        for line in path.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the line that a kill cut short
                break
            if record["step"] > step:
                break
            kept.append(line + "\n")
            self.last |= {k: math.nan if v is None else v for k, v in record.items()}
        self._before = {name: float(self.last.get(name, 0.0)) for name in _TIMES}
        write_whole(path, "".join(kept))

    def _show(self, step: int) -> None:
        figures = "  ".join(
            f"{name} {self.last[name]:.4g}"
            for name in ("loss", "accuracy", "f1", "grad_norm", "consensus")
            if name in self.last
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=step, figures=figures)
        elif time.monotonic() - self._spoke > _PLAIN_EVERY_S or step == self._steps:
            self._spoke = time.monotonic()
            line = f"{self._title}  step {step}/{self._steps}  {figures}"
            print(line, file=sys.stderr, flush=True)


def write_whole(path: Path, text: str) -> None:
    """Write a file under another name, then rename it: a kill leaves the old one or the new."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say which file could not be written, and what to do.

    Raises:
        OutputError: for any OSError.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); free some space and continue "
            f"with --resume {path.parent}"
        ) from error


def to_json(value: Any, indent: int | None = None) -> str:
    """Return strict JSON: what is not finite is null."""
    return json.dumps(_strict(value), indent=indent, allow_nan=False)


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _strict(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    return value


def check_tensorboard() -> None:
    """Raise ConfigError where TensorBoard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"tensorboard: not installed ({error}); pip install 'gossamer[tensorboard]', or "
            "tensorboard: false"
        ) from error


def _open_tensorboard(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))
