"""The most bytes that tensors take during a piece of work, also of tensors without storage."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

__all__ = ["LiveBytes"]


class LiveBytes(TorchDispatchMode):
    """Counts what operations inside it allocate, each storage once, until it is freed.

    Attributes:
        now: bytes alive of those allocated inside.
        peak: the most of them at any time.
    """

    def __init__(self) -> None:
        """Start at nothing."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self._seen: dict[int, Any] = {}

    def ignore(self, tensors: Iterable[Tensor]) -> LiveBytes:
        """Leave out what these tensors lie in; returns itself."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._seen[storage._cdata] = storage  # alive, so that its address is not another's
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operation and count what it returns."""
        found = func(*args, **(kwargs or {}))
        for tensor in tree_iter(found):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return found

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen[key] = weakref.ref(storage, self._freed(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _freed(self, key: int, size: int) -> Any:
        def free(_: object) -> None:
            self.now -= size
            self._seen.pop(key, None)

        return free
