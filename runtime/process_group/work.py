"""Operations of a process group under way: one line of them, and what the caller holds of each."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from gossamer.runtime.errors import CommTimeout

__all__ = ["GroupWork", "Line"]


class GroupWork(dist.Work):
    """What a collective, a send or a receive returns."""

    def __init__(self, future: Future[None], operation: str, tensors: Any) -> None:
        super().__init__()
        self._operation, self._done, self._tensors = operation, future, tensors
        self._torch_future: torch.futures.Future[Any] | None = None

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Return True when the operation is done, or raise its error.

        Args:
            timeout: how long to wait here; zero for as long as the operation itself may take.

        Raises:
            CommTimeout: not done within ``timeout``; it goes on.
            CommError: it failed; names peer and operation.
        """
        seconds = timeout.total_seconds()
        try:
            self._done.result(seconds if seconds > 0 else None)
        except FutureTimeout:
            if self._done.done():  # an error of the operation's own
                raise
            raise CommTimeout(
                f"{self._operation}: not done after waiting {seconds:g} s (gossamer)"
            ) from None
        return True

    def synchronize(self) -> None:
        """As ``wait``: there are no streams on a CPU."""
        self.wait()

    def is_completed(self) -> bool:
        """Say whether the operation is over, well or not."""
        return self._done.done()

    def is_success(self) -> bool:
        """Say whether it is over and went well."""
        return self._done.done() and self._done.exception() is None

    def exception(self) -> BaseException | None:
        """Return its error, once it is over."""
        return self._done.exception() if self._done.done() else None

    def result(self) -> Any:
        """Return the tensors it wrote."""
        self.wait()
        return self._tensors

    def get_future(self) -> torch.futures.Future[Any]:
        """Return a future of the tensors; ``then`` runs where the operation completes."""
        if self._torch_future is None:
            # set_exception() would hand C++ (DistributedDataParallel) the error as a value; only an
            # error that a callback raises is one to it.
            start: torch.futures.Future[Any] = torch.futures.Future()
            self._torch_future = start.then(lambda _: self.result())
            self._done.add_done_callback(lambda _: start.set_result(None))
        return self._torch_future


class Line:
    """Runs operations one after another, in the order they were given, on a thread of its own."""

    def __init__(self, name: str) -> None:
        self._worker = ThreadPoolExecutor(1, name)
        self._last: Future[None] | None = None

    def run(self, body: Callable[[], None], *, inline: bool) -> Future[None]:
        """Start an operation.

        Args:
            body: the operation.
            inline: run it here and now if nothing is under way: the caller waits for it anyway.
        """
        if inline and (self._last is None or self._last.done()):
            done: Future[None] = Future()
            try:
                _without_autograd(body)
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)
            return done
        self._last = self._worker.submit(_without_autograd, body)
        return self._last

    def close(self, *, wait: bool) -> None:
        """Take no more; operations that have not started are dropped. May be called twice."""
        self._worker.shutdown(wait=wait, cancel_futures=True)


def _without_autograd(body: Callable[[], None]) -> None:
    # Not no_grad: tensors made in inference mode can be written in it only, and mode is a thread's.
    with torch.inference_mode():
        body()
