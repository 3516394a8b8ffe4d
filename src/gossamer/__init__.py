"""Gossamer: a communication runtime for decentralized and data-parallel training."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gossamer.algorithms.low_rank import sltrain
    from gossamer.algorithms.problems import Task
    from gossamer.algorithms.protocols import Algorithm, Optimizer, Oracle
    from gossamer.launch.attach import attach, init
    from gossamer.launch.gossip_hook import GossipState, gossip_hook
    from gossamer.runtime import Communicator, combine, row_norm
    from gossamer.topologies import Topology

__version__ = "0.1.0"

__all__ = [
    "Algorithm",
    "Communicator",
    "GossipState",
    "Optimizer",
    "Oracle",
    "Task",
    "Topology",
    "__version__",
    "attach",
    "combine",
    "gossip_hook",
    "init",
    "row_norm",
    "sltrain",
]

# Imported when asked for: `gossamer topology list` need not wait for torch.
_HOME = {
    "Algorithm": "gossamer.algorithms.protocols",
    "Communicator": "gossamer.runtime",
    "GossipState": "gossamer.launch.gossip_hook",
    "Optimizer": "gossamer.algorithms.protocols",
    "Oracle": "gossamer.algorithms.protocols",
    "Task": "gossamer.algorithms.problems",
    "Topology": "gossamer.topologies",
    "attach": "gossamer.launch.attach",
    "combine": "gossamer.runtime",
    "gossip_hook": "gossamer.launch.gossip_hook",
    "init": "gossamer.launch.attach",
    "row_norm": "gossamer.runtime",
    "sltrain": "gossamer.algorithms.low_rank",
}


def register_backend() -> None:
    """Make ``torch.distributed.init_process_group("gossamer")`` work.

    torch calls it when it is imported (the entry point ``torch.backends``), so it must stay cheap
    and cannot fail. With TORCH_DEVICE_BACKEND_AUTOLOAD=0, importing ``gossamer.runtime`` calls it.
    """
    import torch.distributed as dist

    def create(options: Any, own_options: Any) -> Any:
        from gossamer.runtime.process_group import create

        return create(options, own_options)

    if dist.is_available():
        dist.Backend.register_backend("gossamer", create, extended_api=True, devices=["cpu"])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gossamer' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
