"""Exit statuses: 0 done, 2 the configuration is wrong, 143 saved and ended, 1 anything else."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

__all__ = ["exit_status"]


def exit_status(action: Callable[[], int]) -> int:
    """Run ``action`` and return the exit status; a failure is printed, and ends an MPI world."""
    try:
        return action()
    except KeyboardInterrupt:
        print("gossamer: interrupted", file=sys.stderr, flush=True)
        return _abort()
    except Exception as error:
        return _failed(error)


def _failed(error: Exception) -> int:
    # Imported here: these bring torch along, for which the help need not wait.
    from gossamer.launch.agreement import LateError, SilencedError
    from gossamer.runtime.errors import CommError, ConfigError
    from gossamer.runtime.loop import Terminated
    from gossamer.runtime.transports.select import process_index
    from gossamer.topologies import TopologyError

    if isinstance(error, SilencedError):
        return 2
    if isinstance(error, ConfigError | TopologyError):
        print(f"gossamer: error: {error}", file=sys.stderr, flush=True)
        return 2
    if isinstance(error, Terminated):
        if process_index() == 0:
            print(f"gossamer: {error}", file=sys.stderr, flush=True)
        return 143
    if isinstance(error, CommError | LateError):
        print(f"gossamer: process {process_index()}: {error}", file=sys.stderr, flush=True)
        if os.environ.get("GOSSAMER_TRACEBACK"):
            traceback.print_exception(error)
        return _abort()
    print(f"gossamer: process {process_index()} failed", file=sys.stderr)
    traceback.print_exception(error)
    return _abort()


def _abort() -> int:
    """End every process of an MPI world; elsewhere the launcher or the parent ends the others."""
    from gossamer.launch.processes import end_siblings
    from gossamer.runtime.transports.select import detect_launcher, world_size

    sys.stdout.flush()
    sys.stderr.flush()
    if detect_launcher() == "mpi" and world_size() > 1 and "mpi4py.MPI" in sys.modules:
        sys.modules["mpi4py.MPI"].COMM_WORLD.Abort(1)
    if world_size() > 1:
        if "GOSSAMER_RENDEZVOUS" not in os.environ:  # else the parent is ours, and watches
            end_siblings()
        os._exit(1)  # destructors of a broken process group may wait for ever
    return 1
