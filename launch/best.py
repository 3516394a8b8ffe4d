"""The best of a run: the checkpoint at which a figure of the evaluations was best."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from gossamer.runtime import Communicator, ConfigError
from gossamer.runtime.checkpoint import Checkpoint, latest
from gossamer.runtime.errors import nearest
from gossamer.runtime.loop import Record

__all__ = ["BEST", "Best", "Save"]

log = logging.getLogger("gossamer")

BEST = "best"
"""Its folder in the run's."""
Save = Callable[[Path, int, Mapping[str, Any]], None]
"""Writes a checkpoint of this step: folder, how many stay, and further facts."""

_LOW = ("loss", "perplexity", "consensus", "grad_norm")


class Best:
    """Keeps the checkpoint with the best value of a figure, the first of equal ones.

    A run that is resumed in its folder goes on from the best before the checkpoint that it resumes
    from, where that is still there: a later one is of steps that are made again.
    """

    def __init__(self, figure: str, folder: Path, comm: Communicator, save: Save) -> None:
        """Look for an earlier best.

        Args:
            figure: of the evaluations; losses and distances are best low, all others high.
            folder: of the run.
            comm: process 0 decides for all.
            save: every process calls it.
        """
        self._figure, self._folder, self._comm, self._save = figure, folder / BEST, comm, save
        self._sign = -1.0 if figure.endswith(_LOW) else 1.0
        self.record: Record | None = None
        found = latest(self._folder) if comm.transport.process == 0 else None
        if found is not None:
            try:
                meta = Checkpoint.open(found).meta
                self.record = meta["record"] if meta.get("figure") == figure else None
            except ConfigError as error:
                log.warning("keep_best: the best so far is forgotten: %s", error)

    def see(self, record: Record) -> None:
        """Save where an evaluation is the best so far; every process calls it.

        Raises:
            ConfigError: the run has no such figure.
        """
        if self._figure not in record:
            raise ConfigError(
                f"keep_best: this run's evaluations have no figure '{self._figure}'"
                f"{nearest(self._figure, record)} (they have {', '.join(sorted(record))})"
            )
        value = record[self._figure]
        best = None if self.record is None else self._sign * self.record[self._figure]
        better = float(math.isfinite(value) and (best is None or self._sign * value > best))
        rows = torch.full((self._comm.local, 1), better, device=self._comm.device)
        if self._comm.broadcast(rows, count=False).item():
            self.record = {k: v for k, v in record.items() if math.isfinite(v)}
            self._save(self._folder, 1, {"figure": self._figure, "record": self.record})
