"""What torch asks of any group: its names, its timeout, and who moves tensors of which device."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed import distributed_c10d as c10d

from gossamer.runtime.errors import CommError

__all__ = ["NamedGroup"]


class NamedGroup(dist.ProcessGroup):
    """A group that is its own backend for CPU tensors.

    torch's class keeps these facts in C++ backends of devices; a group in Python has none.
    """

    supports_splitting = supports_coalescing = supports_time_estimate = False

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # the form for subclasses
        self._store, self._timeout = store, timeout
        self._name, self._desc = "", ""
        self._other_devices: dict[str, dist.ProcessGroup] = {}

    def getBackendName(self) -> str:
        """Return ``gossamer``."""
        return "gossamer"

    def _set_group_name(self, name: Any) -> None:
        self._name = name

    def _set_group_desc(self, desc: str) -> None:
        self._desc = desc

    @property
    def group_name(self) -> Any:
        """What torch calls this group."""
        return self._name

    @property
    def group_desc(self) -> str:
        """What torch says of this group."""
        return self._desc

    def getGroupName(self) -> str:
        """Return ``group_name``, to C++."""
        return str(self._name)

    def set_timeout(self, timeout: timedelta) -> None:
        """Set the timeout of the operations to come."""
        self._timeout = timeout

    def _get_backend(self, device: torch.device) -> Any:
        group = self._other_devices.get(device.type)
        return self if group is None else group._get_backend(device)

    def supports_tensor_alloc(self, device: torch.device) -> bool:
        """Say that tensors need no memory of the group's own."""
        return False

    def group_of(self, device: torch.device) -> dist.ProcessGroup:
        """Return the group, of the same ranks, that moves tensors of another device.

        Made when it is first asked for, which all ranks do in the same call.
        """
        if device.type not in self._other_devices:
            config = c10d._world.pg_backend_config.get(self, "")
            backends = dict(pair.split(":") for pair in config.split(",") if ":" in pair)
            backend = backends.get(device.type, "gossamer")
            if backend == "gossamer":
                raise CommError(
                    f"backend gossamer moves CPU tensors, got one on {device}; use "
                    f"init_process_group('cpu:gossamer,{device.type}:nccl')"
                )
            # new_group is for all ranks of the run; its form for members alone names the group
            # after how many others a rank is in (torch 2.13), which differs between them.
            ranks = dist.get_process_group_ranks(self)
            group, _ = c10d._new_process_group_helper(
                self.size(),
                self.rank(),
                ranks,
                dist.Backend(f"{device.type}:{backend}"),
                self._store,
                f"{self._name}/{device.type}",  # type: ignore[arg-type]  # a str to the eye
                timeout=self._timeout,
            )
            c10d._world.pg_group_ranks[group] = {r: place for place, r in enumerate(ranks)}
            self._other_devices[device.type] = group
        return self._other_devices[device.type]
