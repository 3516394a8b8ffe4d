"""``moco``: negatives from a queue of embeddings that a slowly moving encoder made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from gossamer.algorithms.contrastive.losses import (
    ContrastiveLoss,
    Others,
    Setting,
    Visit,
    Weights,
)
from gossamer.algorithms.contrastive.owners import Owners
from gossamer.runtime import ConfigError
from gossamer.runtime.rows import combine

__all__ = ["MoCo"]


class MoCo(ContrastiveLoss):
    """Cross-entropy over the positive and a queue of keys (arXiv:1911.05722).

    Keys come from an encoder that follows the trained one as a moving average; those of a batch,
    positives included, enter the queue of every rank after the step. Nothing flows back into them.
    Of pairs, a row is compared with the keys of the other side alone.
    """

    remembers: ClassVar[str | None] = "key encoders and their queues"
    beyond_columns: ClassVar[bool] = True

    name: Literal["moco"] = "moco"
    queue: int = Field(default=65536, ge=1)
    """Keys that are kept; until as many were made the queue is shorter."""
    momentum: float = Field(default=0.999, ge=0, lt=1)
    """Share of the former parameters in the key encoder's."""

    _encoder: Tensor = PrivateAttr()
    _queue: Tensor = PrivateAttr()
    _seen: Tensor = PrivateAttr()

    def setup(self, setting: Setting) -> None:
        """Compare the queue with a step, and start it empty.

        Raises:
            ConfigError: it is shorter than what one step adds.
        """
        super().setup(setting)
        added = 2 * setting.comm.n * setting.local_batch
        if self.queue < added:
            raise ConfigError(
                f"oracle.loss.queue: one step adds {added} keys, got {self.queue}; use at least "
                "that, or smaller batches"
            )
        local, layout, device = setting.comm.local, setting.layout, setting.comm.device
        self._encoder = torch.zeros(local, layout.d, dtype=layout.dtype, device=device)
        width = self.queue * setting.dim
        self._queue = torch.zeros(local, width, dtype=setting.dtype, device=device)
        self._seen = torch.zeros(local, 1, dtype=torch.int64)

    def weigh(self, visit: Visit) -> list[Weights]:
        """Return softmax over each row's own key and the queue."""
        comm, weights, made = self._setting.comm, list[Weights](), list[Tensor]()
        dim, queue, seen = self._setting.dim, self._queue, self._seen
        share = self.momentum if seen.any() else 0.0
        encoder = combine(
            [(share, self._encoder), (1.0 - share, visit.x)],
            out=self._encoder if visit.advances else None,
        )
        for rows in visit.rows:
            i, b = rows.place, len(rows.ids)
            keys = visit.look_at_batch(i, encoder[i])
            kept = queue[i].view(-1, dim)[: int(seen[i])]
            positives = keys.roll(b, 0)  # of the other view
            own = (rows.z * positives).sum(dim=1, keepdim=True)
            scores = torch.cat([own, rows.z @ kept.T], dim=1).mul_(self.beta)
            if self._setting.mode == "pairs":
                side = self._sides(int(seen[i])).to(scores.device)
                for v, half in enumerate(scores[:, 1:].split(b)):
                    half.masked_fill_(side == v, -torch.inf)
            p = torch.softmax(scores, dim=1)
            shares = torch.cat([torch.diag(p[:, 0] - 1.0), p[:, 1:]], dim=1)
            others = [Others(torch.cat([positives, kept]), shares)]
            weights.append(Weights(None, self.beta, attracts=0.0, others=others))
            made.append(keys.flatten())
        if visit.advances:
            b = len(visit.rows[0].ids)
            gathered = comm.all_gather(torch.stack(made)).view(comm.n, 2, b, dim)
            added = gathered.transpose(0, 1).reshape(-1, dim)  # as columns are ordered
            for i, first in enumerate(seen.flatten().tolist()):
                places = (first + torch.arange(len(added))) % self.queue
                queue[i].view(-1, dim)[places.to(queue.device)] = added
            seen += len(added)
        return weights

    def take_over(self, before: Owners, state: Mapping[str, Tensor]) -> bool:
        """Start afresh: queues are of ranks, not of examples."""
        return False

    def _sides(self, seen: int) -> Tensor:
        """Return which side of a pair each key of the queue is of, when it has seen so many."""
        added = 2 * self._setting.comm.n * self._setting.local_batch
        slots = torch.arange(min(seen, self.queue))
        latest = seen - 1 - (seen - 1 - slots) % self.queue
        return latest % added // (added // 2)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the key encoder's parameters, the queues, and how many keys they have seen."""
        return {"encoder": self._encoder, "queue": self._queue, "seen": self._seen}
