"""Fresh processes for a benchmark: what they measure, as JSON, and what they hold in memory."""

from __future__ import annotations

import ctypes
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gossamer.launch.processes import run_processes
from gossamer.runtime import ConfigError

__all__ = ["held_by", "peak_of", "started"]

_M_MMAP_THRESHOLD = -3  # of malloc.h


def started(bench: str, n: int, target: Callable[..., int], *arguments: Any) -> Any:
    """Return what ``target(*arguments, file)`` in n processes wrote to the file as JSON.

    Raises:
        ConfigError: they failed.
    """
    with tempfile.TemporaryDirectory(prefix="gossamer-") as folder:
        result = Path(folder) / "result.json"
        status = run_processes(n, _told, target, *arguments, str(result))
        if status != 0:
            raise ConfigError(f"bench {bench}: the {n} processes ended with status {status}")
        return json.loads(result.read_text())


def _told(target: Callable[..., int], *arguments: Any) -> int:
    """Run the target; an error of ours is one message."""
    try:
        return target(*arguments)
    except ConfigError as error:
        print(f"gossamer: {error}")
        return 2


def peak_of(work: Callable[[], object]) -> float:
    """Return how many bytes more than now are resident when ``work`` needs most."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def held_by(build: Callable[[], Callable[[], object]]) -> float:
    """Return how many bytes more than now are resident when what ``build`` returns needs most.

    What building alone needs does not count. Every allocation of 64 KiB or more is given back to
    the system when it is freed, so that what is resident is what is in use.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    before = _resident("VmRSS")
    work = build()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    work()
    return _resident("VmHWM") - before


def _resident(key: str) -> float:
    """Return bytes of /proc/self/status: VmRSS now, VmHWM at the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024.0 * int(line.split()[1])
    raise AssertionError(f"no {key} in /proc/self/status")
