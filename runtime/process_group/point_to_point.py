"""Sends and receives of a process group: each goes on by itself, whatever else is under way."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future

import torch
from torch import Tensor

from gossamer.runtime.errors import CommError
from gossamer.runtime.native import Exchange
from gossamer.runtime.shared_memory import SharedMemory

__all__ = ["PointToPoint"]

_SHORTEST_PAUSE_S = 20e-6
_LONGEST_PAUSE_S = 1e-3


class _Transfer:
    def __init__(
        self, exchange: Exchange, tensors: tuple[Tensor, Tensor], tag: int, operation: str
    ) -> None:
        self.exchange, self.operation, self.tag = exchange, operation, tag
        self.header, self.payload = tensors  # the exchange knows their addresses only
        self.target: Tensor | None = None
        self.done: Future[None] = Future()
        self.timeout_s, self.deadline = 0.0, 0.0


class PointToPoint:
    """Messages between pairs of processes, in the order they are sent.

    Transfers start at once, in the caller, and what cannot be moved yet is moved by a thread that
    looks from time to time: two processes that both send first, or do other things between, do not
    wait for each other.
    """

    def __init__(self, shared: SharedMemory) -> None:
        """Use ``shared`` for nothing else: a transfer must not wait for a collective."""
        self._shared = shared
        self._pending: list[_Transfer] = []
        self._changed = threading.Condition()
        self._mover: threading.Thread | None = None
        self._closed = False

    def send(
        self, peer: int, x: Tensor, tag: int, operation: str, timeout_s: float
    ) -> Future[None]:
        """Start to send ``x``, contiguous; it must stay as it is until the future is done."""
        header = torch.tensor([tag])
        exchange = self._shared.exchange([(peer, header), (peer, x)], [])
        return self._start(_Transfer(exchange, (header, x), tag, operation), timeout_s)

    def receive(
        self, peer: int, out: Tensor, tag: int, operation: str, timeout_s: float
    ) -> Future[None]:
        """Start to receive into ``out``; the next message from ``peer`` must have this tag."""
        header = torch.zeros(1, dtype=torch.int64)
        payload = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype)
        exchange = self._shared.exchange([], [(peer, header), (peer, payload)])
        transfer = _Transfer(exchange, (header, payload), tag, operation)
        transfer.target = None if payload is out else out
        return self._start(transfer, timeout_s)

    def close(self) -> None:
        """Stop moving what is under way; may be called twice."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._mover is not None:
            self._mover.join()

    def _start(self, transfer: _Transfer, timeout_s: float) -> Future[None]:
        transfer.timeout_s, transfer.deadline = timeout_s, time.monotonic() + timeout_s
        if not self._moved(transfer):
            with self._changed:
                self._pending.append(transfer)
                self._changed.notify()
                if self._mover is None:
                    # A daemon: it never blocks outside of Python, so it may be left at exit.
                    self._mover = threading.Thread(target=self._move, name="p2p", daemon=True)
                    self._mover.start()
        return transfer.done

    def _move(self) -> None:
        pause = _SHORTEST_PAUSE_S
        while True:
            with self._changed:
                while not self._pending and not self._closed:
                    pause = _SHORTEST_PAUSE_S
                    self._changed.wait()
                if self._closed:
                    return
                under_way = list(self._pending)
            over = {id(transfer) for transfer in under_way if self._moved(transfer)}
            if over:
                pause = _SHORTEST_PAUSE_S
                with self._changed:
                    self._pending = [t for t in self._pending if id(t) not in over]
                continue
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _moved(self, transfer: _Transfer) -> bool:
        """Move a transfer on; complete its future if it is over."""
        status = transfer.exchange.test()
        if status is None:
            if time.monotonic() < transfer.deadline:
                return False
            status = transfer.exchange.wait(0.0)
        try:
            self._shared.check(status, transfer.operation, transfer.timeout_s)
            self._finish(transfer)
        except CommError as error:
            transfer.done.set_exception(error)
        else:
            transfer.done.set_result(None)
        return True

    def _finish(self, transfer: _Transfer) -> None:
        sent = int(transfer.header)
        if sent != transfer.tag:
            raise CommError(
                f"{transfer.operation}: the next message has tag {sent}, not {transfer.tag} "
                "(gossamer); messages between two ranks arrive in the order they are sent: receive "
                "them in that order"
            )
        if transfer.target is not None:
            with torch.inference_mode():
                transfer.target.copy_(transfer.payload)
