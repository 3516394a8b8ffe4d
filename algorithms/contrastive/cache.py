"""``negcache`` and ``full``: negatives of the whole training set, by old embeddings or new ones."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from gossamer.algorithms.contrastive.losses import (
    ContrastiveLoss,
    Keys,
    Others,
    Rows,
    Setting,
    Visit,
    Weights,
    last_of_each,
)

__all__ = ["Full", "NegCache"]


def _all_keys(setting: Setting, rank: int) -> Keys:
    """Return the keys (k,) of what rank ``rank`` owns, in the order of its tables."""
    ids = torch.from_numpy(setting.owners.ids[rank]).repeat_interleave(setting.per_example)
    return 2 * ids + torch.arange(len(ids)) % setting.per_example


def _repels(setting: Setting, keys: Keys, ids: Tensor) -> Tensor:
    """Return bool (2b, k): which keys are negatives of the rows of the examples ``ids`` (b,)."""
    valid = (keys[None] // 2 != ids[:, None]).repeat(2, 1)
    if setting.mode == "pairs":
        side = torch.arange(2).repeat_interleave(len(ids))
        valid &= keys[None] % 2 != side[:, None]
    return valid


class Full(ContrastiveLoss):
    """The gradient of (1) itself: a softmax over all others, encoded anew at every step.

    For small problems, and to measure the others by. Of ``infinite`` views the others are encoded
    as they are.
    """

    beyond_columns: ClassVar[bool] = True

    name: Literal["full"] = "full"

    def weigh(self, visit: Visit) -> list[Weights]:
        """Return softmax over everything."""
        setting = self._setting
        keys = torch.cat([_all_keys(setting, rank) for rank in range(setting.comm.n)])
        asked = keys.to(setting.comm.device)
        number, found = visit.recall([asked] * setting.comm.local, True)
        weights = []
        for rows, z in zip(visit.rows, found, strict=True):
            scores = self.beta * (rows.z @ z.T)
            valid = _repels(setting, keys, rows.ids).to(z.device)
            softmax = torch.softmax(scores.masked_fill_(~valid, -torch.inf), dim=1)
            weights.append(Weights(None, self.beta, others=[Others(z, softmax, number)]))
        return weights


class NegCache(ContrastiveLoss):
    """One negative per row, drawn by a softmax over old embeddings of all others (Gumbel).

    The owner of the example drawn encodes it anew and gets its gradient. A step's own embeddings,
    and the oldest ``refresh`` of all, replace those in the cache. Positive and negative weigh
    1 - p, p the positive's softmax against the cache.
    """

    remembers: ClassVar[str | None] = "old embeddings"
    beyond_columns: ClassVar[bool] = True

    name: Literal["negcache"] = "negcache"
    refresh: float = Field(default=0.01024, ge=0, le=1)
    """Share of the cache that is encoded anew at each step, on average: of every shard the oldest
    entries."""

    _embeddings: Tensor = PrivateAttr()
    _made: Tensor = PrivateAttr()

    def setup(self, setting: Setting) -> None:
        """Start without any embedding, which the first visit makes."""
        super().setup(setting)
        self._embeddings = setting.table(0.0, width=setting.dim)
        self._made = setting.table(-1, torch.int64)

    def weigh(self, visit: Visit) -> list[Weights]:
        """Draw, and return 1 - p for what was drawn."""
        keys, log_sums = self._drawn(visit)
        different = [torch.unique(k) for k in keys]
        number, found = visit.recall(different, True)
        weights = []
        for rows, key, log_sum, d, z in zip(
            visit.rows, keys, log_sums, different, found, strict=True
        ):
            every = torch.arange(len(key))
            positive = self.beta * rows.cosines[every, rows.positives]
            share = 1.0 - torch.sigmoid(positive - log_sum)
            of_z = share.new_zeros(len(key), len(z))
            of_z[every, torch.searchsorted(d, key)] = share
            others = [Others(z, of_z, number)]
            weights.append(Weights(None, self.beta, attracts=share, others=others))
        if visit.advances:
            for rows in visit.rows:
                self._renew(visit, rows)
        return weights

    def _drawn(self, visit: Visit) -> tuple[list[Keys], list[Tensor]]:
        """Return the keys (2b,) drawn for each hosted rank's rows, and the cache's log-sums (2b,).

        Each rank looks through its own part of the cache for the rows of all; the greatest of the
        parts' maxima is that of the whole.
        """
        setting, comm = self._setting, self._setting.comm
        offers = []
        for rows in visit.rows:
            keys, z = _all_keys(setting, comm.ranks[rows.place]), self._cache(visit, rows)
            scores = self.beta * (z @ rows.columns.z.T)
            valid = _repels(setting, keys, rows.columns.ids.cpu()).T.to(z.device)
            scores = scores.masked_fill(~valid, -torch.inf).double()
            stream = comm.seed.stream("gumbel", keys.tolist(), visit.step, visit.draw)
            uniforms = stream.uniform_(torch.empty(scores.shape)).double().to(z.device)
            best = (scores - uniforms.log_().neg_().log_()).max(dim=0)
            key = keys.to(z.device)[best.indices].double()
            offers.append(torch.cat([best.values, key, torch.logsumexp(scores, dim=0)]))
        table = comm.all_gather(torch.stack(offers)).view(comm.n, 3, -1)
        drawn = table[:, 1].gather(0, table[:, 0].argmax(dim=0, keepdim=True))[0].long()
        log_sums = torch.logsumexp(table[:, 2], dim=0).to(setting.dtype)
        own = [self._own_columns(rows) for rows in visit.rows]
        return [drawn[k] for k in own], [log_sums[k] for k in own]

    def _own_columns(self, rows: Rows) -> Tensor:
        first = torch.arange(rows.columns.own.start, rows.columns.own.stop)
        return torch.cat([first, first + len(rows.columns.ids)])

    def _cache(self, visit: Visit, rows: Rows) -> Tensor:
        """Return the rank's part of the cache (entries, dim); made at the first visit."""
        keys = self._keys_of(rows)
        cache = self._embeddings[rows.place].view(-1, self._setting.dim)[: len(keys)]
        if (self._made[rows.place] < 0).all():
            cache.copy_(visit.look(rows.place, keys))
        return cache

    def _keys_of(self, rows: Rows) -> Keys:
        return _all_keys(self._setting, self._setting.comm.ranks[rows.place])

    def _renew(self, visit: Visit, rows: Rows) -> None:
        """Put the oldest entries' embeddings of now, and the batch's own, into the cache."""
        cache, made = self._cache(visit, rows), self._made[rows.place]
        keys = self._keys_of(rows)
        oldest = self._oldest(visit, rows.place)
        if len(oldest):
            cache[oldest] = visit.look(rows.place, keys[oldest.cpu()])
        last = last_of_each(rows.ids)
        if self._setting.per_example == 2:
            last = torch.cat([last, last + len(rows.ids)])
        slots = self._setting.slots(rows)[last]
        cache[slots] = rows.z[last]
        made[oldest], made[slots] = visit.step, visit.step

    def _oldest(self, visit: Visit, place: int) -> Tensor:
        """Return the entries whose turn it is: shard by shard, whoever owns how many of them."""
        setting = self._setting
        sizes = [k * setting.per_example for k in setting.owners.sizes[setting.comm.ranks[place]]]
        oldest, first = [], 0
        for size, made in zip(sizes, self._made[place][: sum(sizes)].split(sizes), strict=True):
            before, after = (int(self.refresh * size * t) for t in (visit.step, visit.step + 1))
            oldest.append(first + torch.argsort(made, stable=True)[: after - before])
            first += size
        return torch.cat(oldest)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the cache and its ages."""
        return {"cache": self._embeddings, "made": self._made}
