"""The diagonal of W(t), for rules that treat a rank's own value apart."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.runtime import Communicator

__all__ = ["self_weights"]


def self_weights(comm: Communicator, ahead: int = 0) -> Tensor:
    """Return w_ii of the hosted ranks in the round ``ahead`` of this one, (local, 1) float64."""
    own = comm.topology.round(comm.round + ahead).self_weight[comm.ranks.start : comm.ranks.stop]
    return torch.from_numpy(own.copy())[:, None]
