"""Operations that progress while the caller computes: on a thread, and on a GPU in a stream."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

if TYPE_CHECKING:
    from gossamer.runtime.collectives import RankGroup

__all__ = ["Background", "Pending", "Work"]

T = TypeVar("T")


class Pending(Generic[T]):
    """An operation that was handed to ``Background``."""

    def __init__(self, future: Future[tuple[T, torch.cuda.Event | None]]) -> None:
        self._future = future

    def result(self) -> T:
        """Return the result, or raise the error; what the caller queues next comes after it."""
        result, over = self._future.result()
        if over is not None:
            over.wait()  # the current stream does
        return result

    def settle(self) -> None:
        """As ``result``, but leave an error to those who ask for the result."""
        if self._future.exception() is None:
            self.result()

    def done(self) -> bool:
        """Say whether ``result`` would return at once."""
        return self._future.done()

    def add_done_callback(self, callback: Callable[[], object]) -> None:
        """Call ``callback`` when the operation is over, on the thread that it runs on."""
        self._future.add_done_callback(lambda _: callback())


class Background:
    """A thread on which operations run one after another; on a GPU, a stream of their own.

    An operation on a GPU begins when all that the caller's stream held at ``submit`` is done, and
    computation that the caller queues meanwhile does not wait for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._worker = ThreadPoolExecutor(1, "gossamer-comm")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def submit(self, operation: Callable[..., T], *arguments: Any) -> Pending[T]:
        """Start ``operation(*arguments)`` when those before it are over."""
        ready = None
        if self._stream is not None:
            ready = torch.cuda.current_stream(self._device).record_event()
        return Pending(self._worker.submit(self._run, ready, operation, *arguments))

    def close(self) -> None:
        """Return when all operations are over."""
        self._worker.shutdown(wait=True)

    def _run(
        self, ready: torch.cuda.Event | None, operation: Callable[..., T], *arguments: Any
    ) -> tuple[T, torch.cuda.Event | None]:
        if self._stream is None or ready is None:
            return operation(*arguments), None
        with torch.cuda.stream(self._stream):  # the thread's current GPU and stream
            self._stream.wait_event(ready)
            return operation(*arguments), self._stream.record_event()


class Work(Generic[T]):
    """What an asynchronous call returns; ``wait`` gives its result or raises its error."""

    def __init__(self, pending: Pending[T], group: RankGroup, name: str) -> None:
        self._pending, self._group, self._name = pending, group, name

    def wait(self) -> T:
        """Return the result of the operation; may be called again.

        On a GPU the current stream waits for it, not the caller.
        """
        group = self._group
        with group.traffic.span("wait", f"wait for {self._name}", group.step):
            return self._pending.result()

    def done(self) -> bool:
        """Say whether ``wait`` would return at once."""
        return self._pending.done()

    def add_done_callback(self, callback: Callable[[], object]) -> None:
        """Call ``callback`` when the operation is over, on the thread that it runs on."""
        self._pending.add_done_callback(callback)
