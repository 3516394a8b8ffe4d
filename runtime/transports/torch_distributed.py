"""``gloo`` and ``nccl``: torch.distributed point to point, one process group of our own."""

from __future__ import annotations

import os
import re
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from gossamer.runtime.errors import CommError, CommTimeout, ConfigError, PeerLost
from gossamer.runtime.shared_memory import SharedMemory
from gossamer.runtime.transports.base import Pending, Transfers

__all__ = ["GlooTransport", "NcclTransport", "TorchTransport"]


class _Works:
    def __init__(self, works: list[tuple[int, Any]], operation: str, backend: str) -> None:
        self._works, self._operation, self._backend = works, operation, backend

    def wait(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for peer, work in self._works:
            left = max(deadline - time.monotonic(), 0.001)
            try:
                if self._backend == "nccl":
                    work.wait()  # orders the current stream; the watchdog bounds the time
                else:
                    work.wait(timedelta(seconds=left))
            except RuntimeError as error:
                raise _explain(error, peer, self._operation, timeout_s, self._backend) from error


def _explain(
    error: RuntimeError, peer: int, operation: str, timeout_s: float, backend: str
) -> CommError:
    text = str(error).splitlines()[0]
    if re.search("[Tt]imed out|[Tt]imeout", text):
        return CommTimeout(
            f"{operation}: no answer from process {peer} within {timeout_s:g} s ({backend})"
        )
    if re.search("[Cc]onnection|peer|[Rr]eset|[Bb]roken pipe|SIG", text):
        return PeerLost(f"{operation}: process {peer} is gone ({backend}: {text})")
    return CommError(f"{operation}: with process {peer}: {backend}: {text}")


class TorchTransport:
    """The processes of a torch.distributed job (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    GOSSAMER_RENDEZVOUS, where set, is the meeting place instead (``file://...``, ``tcp://...``).

    Joins the default process group when the program has one, else makes it. Transfers go through a
    group of their own, so that they never mix with the user's collectives.
    """

    name = "gloo"
    shared: SharedMemory | None = None

    def __init__(self, timeout_s: float, meeting: TorchTransport | None = None) -> None:
        """Join the others.

        Args:
            timeout_s: for starting, and for each operation where the backend has no other bound.
            meeting: a transport whose process group this one goes on with, and closes.
        """
        self._timeout = timedelta(seconds=timeout_s)
        taken_over = meeting is not None and meeting._owns_default
        self._owns_default: bool = not dist.is_initialized() or taken_over
        try:
            if not dist.is_initialized():
                dist.init_process_group(
                    self.name,
                    init_method=os.environ.get("GOSSAMER_RENDEZVOUS"),
                    rank=int(os.environ["RANK"]),
                    world_size=int(os.environ["WORLD_SIZE"]),
                    timeout=self._timeout,
                    device_id=self._device() if self.name == "nccl" else None,
                )
            self._group = dist.new_group(backend=self.name, timeout=self._timeout)
        except RuntimeError as error:  # a DistStoreError where some never came
            raise CommError(
                f"start: the {os.environ.get('WORLD_SIZE', '?')} processes did not all meet within "
                f"{timeout_s:g} s ({self.name}: {str(error).splitlines()[0]}); see whether one of "
                "them failed, or set a longer timeout_s"
            ) from error
        self.process = dist.get_rank()
        self.processes = dist.get_world_size()
        self.device = self._device()
        self._closed = False

    def _device(self) -> torch.device:
        return torch.device("cpu")

    def exchange(self, sends: Transfers, receives: Transfers, operation: str) -> Pending:
        """Post every receive, then every send."""
        works = []
        try:
            for peer, tensor in receives:
                works.append((peer, dist.irecv(tensor, peer, group=self._group)))
            for peer, tensor in sends:
                works.append((peer, dist.isend(tensor, peer, group=self._group)))
        except RuntimeError as error:
            raise _explain(
                error, peer, operation, self._timeout.total_seconds(), self.name
            ) from error
        return _Works(works, operation, self.name)

    def close(self) -> None:
        """Leave the group; the default group too when it was made here."""
        if self._closed:
            return
        self._closed = True
        if self._owns_default:
            dist.destroy_process_group()
        else:
            dist.destroy_process_group(self._group)

    def abort(self, status: int) -> None:
        """End this process; the launcher ends the others."""
        os._exit(status)


class GlooTransport(TorchTransport):
    """TCP between processes, on CPU tensors."""


class NcclTransport(TorchTransport):
    """NCCL between GPUs; one GPU per process (LOCAL_RANK).

    A wait orders the stream and returns; what bounds it is NCCL's own watchdog, which names neither
    the peer nor the operation.
    """

    name = "nccl"

    def __init__(self, timeout_s: float, meeting: TorchTransport | None = None) -> None:
        device = self._device()
        if torch.cuda.device_count() <= device.index:
            raise ConfigError(
                f"transport: nccl needs a GPU per process, this is local process {device.index} "
                f"and there are {torch.cuda.device_count()}; use transport: gloo"
            )
        torch.cuda.set_device(device)  # batched transfers use the current device
        super().__init__(timeout_s, meeting)

    def _device(self) -> torch.device:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

    def exchange(self, sends: Transfers, receives: Transfers, operation: str) -> Pending:
        """Post all transfers as one batch: unbatched ones make a communicator per pair."""
        operations = [dist.P2POp(dist.irecv, t, peer, self._group) for peer, t in receives]
        operations += [dist.P2POp(dist.isend, t, peer, self._group) for peer, t in sends]
        if not operations:  # an empty batch raises IndexError
            return _Works([], operation, self.name)
        peers = sorted({peer for peer, _ in (*receives, *sends)})
        works = dist.batch_isend_irecv(operations)
        return _Works([(peers[0], work) for work in works], operation, self.name)
