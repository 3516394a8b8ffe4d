"""What contrastive learning asks of batches, shards, graphs and encoders."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from torch import nn

from gossamer.algorithms.contrastive.losses import ContrastiveLoss
from gossamer.runtime import Communicator, ConfigError

__all__ = ["local_batch", "parts_of", "refuse_shared_statistics", "require_neighbors"]

log = logging.getLogger(__name__)


def parts_of(shards: int, n: int, batch_size: int | None) -> int:
    """Return how many of the fixed shards a rank owns.

    Args:
        shards: how many there are.
        n: number of ranks.
        batch_size: of a rank; None: whole shards.

    Raises:
        ConfigError: ranks, or examples of a batch, cannot be divided evenly over them.
    """
    if shards % n:
        raise ConfigError(
            f"oracle.shards: must be a multiple of the {n} ranks, got {shards}; use {n}"
        )
    if batch_size is not None and n * batch_size % shards:
        raise ConfigError(
            f"oracle.shards: must be a divisor of the {n * batch_size} examples of all ranks' "
            f"batches, got {shards}; use {n}, or other batches"
        )
    return shards // n


def local_batch(shards: Sequence[np.ndarray], parts: int, batch_size: int | None) -> int:
    """Return the examples of a rank and step, the same on all of them.

    Args:
        shards: all ranks'.
        parts: of them per rank.
        batch_size: of a rank; None: whole shards.

    Raises:
        ConfigError: ranks would give different numbers, some twice in every batch, or one in all.
    """
    sizes = {len(own) for own in shards}
    if batch_size is None:
        if len(sizes) > 1:
            raise ConfigError(
                "oracle.sampling: full takes whole shards, whose sizes differ here, and every "
                "rank must give as many rows; use task.drop_remainder: true, oracle.shards that "
                "divide the examples, or shuffle"
            )
        batch_size = max(sizes) * parts
    elif batch_size // parts > min(sizes):
        raise ConfigError(
            f"oracle.batch_size: {batch_size // parts} examples of a shard of {min(sizes)}, so "
            f"that some would be twice in every batch; use at most {min(sizes) * parts}, or fewer "
            "ranks"
        )
    if len(shards) // parts * batch_size < 2:
        raise ConfigError(
            "oracle.batch_size: a batch of 1 example has nothing to compare it with; use 2 or more"
        )
    return batch_size


def require_neighbors(comm: Communicator, loss: ContrastiveLoss) -> None:
    """Say what a graph that stays does to negatives of neighbours.

    Raises:
        ConfigError: the loss's negatives are of all ranks.
    """
    if loss.beyond_columns:
        raise ConfigError(
            f"oracle.negatives: those of {loss.name} are of all ranks, whoever the neighbors are; "
            "use all"
        )
    graph = comm.topology
    hears_all = graph.round(0).num_messages == comm.n * (comm.n - 1)
    if graph.period == 1 and not hears_all:
        log.warning(
            "negatives of neighbours in %s, which never changes: a rank's examples are contrasted "
            "with those of the same few ranks, not with the whole data set; use topology: "
            "one_peer_exponential, or negatives: all",
            graph.name,
        )


def refuse_shared_statistics(module: nn.Module) -> None:
    """Refuse an encoder whose embeddings depend on the others of a batch.

    Raises:
        ConfigError: it has batch normalisation.
    """
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            raise ConfigError(
                f"task.encoder: {name} normalises by the statistics of a batch, which tell an "
                "example's views apart from others without looking at them, and differ from rank "
                "to rank; use GroupNorm, or none"
            )
