"""The most memory that a process of a run has held."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch

from gossamer.runtime.collectives import RankGroup

__all__ = ["peak_memory_mib"]


def peak_memory_mib(comm: RankGroup) -> float:
    """Return the maximum over processes of the most memory held at once, in MiB; all call it.

    On a GPU what torch had allocated there, else what of the process was resident, the
    interpreter and shared pages included. Since the process began: of several runs in one process
    a later one's figure is at least an earlier one's.
    """
    if comm.device.type == "cuda":
        most = float(torch.cuda.max_memory_allocated(comm.device))
    else:
        most = float(_most_resident())
    row = torch.full((comm.local, 1), most / 2**20, dtype=torch.float64, device=comm.device)
    return float(comm.all_reduce(row, "max", count=False))


def _most_resident() -> int:
    """Return bytes."""
    # Not ru_maxrss where this is to be had: that begins with what the parent held.
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if found is not None:
        return int(found[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
