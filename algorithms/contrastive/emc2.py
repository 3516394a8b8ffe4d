"""``emc2``: one Metropolis-Hastings chain per anchor draws its negatives (arXiv:2404.10575)."""

from __future__ import annotations

from dataclasses import dataclass
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
from gossamer.runtime.native.chains import Moves, chain_moves

__all__ = ["EMC2"]


class EMC2(ContrastiveLoss):
    """Negatives by a chain whose stationary law is the softmax over all others.

    A chain's state is a negative c and its score s_c = beta <z_a, z_c>. Each column of the batch is
    a proposal, uniform over the others as batches are: it is taken iff log U < s_new - s_c. After
    ``burn_in`` of them, the states that follow are the negatives, with equal weights. Chains live
    with their anchor's owner from visit to visit; U is counted by (step, example, view, column), so
    that nothing depends on how many ranks there are.
    """

    remembers: ClassVar[str | None] = "chains"

    name: Literal["emc2"] = "emc2"
    burn_in: float = Field(default=0.5, ge=0, lt=1)
    """Share of a visit's proposals before the first recorded state."""
    burn_in_until: int | None = Field(default=None, ge=1)
    """Step from which on ``burn_in`` is 0; None: never."""
    score: Literal["stale", "fresh"] = "stale"
    """Of the state carried in from an earlier visit: as it was stored, with former parameters and
    views; or of its embedding now, which its owner makes anew."""
    held: Literal["recompute", "drop"] = "recompute"
    """A state carried in that still stands when states are recorded: its owner encodes it and
    gets its gradient; or it repels nobody."""
    compat: Literal["none", "official"] = "none"
    """``official``: count as the released code does. Of ``finite`` views the first recorded state
    is left out, but not of the divisor; of ``infinite`` ones columns are counted where proposals
    should be; and the burn-in is subtracted from a held state's records once more."""

    _keys: Tensor = PrivateAttr()
    _scores: Tensor = PrivateAttr()
    _since: Tensor = PrivateAttr()

    def setup(self, setting: Setting) -> None:
        """Start every chain empty."""
        super().setup(setting)
        self._keys = setting.table(-1, torch.int64)
        self._scores = setting.table(-torch.inf, torch.float32)
        self._since = setting.table(0, torch.int32)

    def uniforms(self, visit: Visit, rows: Rows) -> Tensor:
        """Return U (2b, 2B) in (0, 1), by example, view and column."""
        b, width = len(rows.ids), rows.cosines.shape[1]
        random = self._setting.comm.seed
        stream = random.stream("chain", rows.ids.tolist(), visit.step, visit.draw)
        drawn = torch.empty(2 * b, width)
        for view, half in enumerate(drawn.split(b)):
            stream.uniform_(half, begin=view * width)
        return drawn

    def weigh(self, visit: Visit) -> list[Weights]:
        """Move the chains and return the shares of their states."""
        slots = [self._setting.slots(rows) for rows in visit.rows]
        keys = [self._keys[r.place][s] for r, s in zip(visit.rows, slots, strict=True)]
        found: list[_Recalled] | None = None
        if self.score == "fresh":
            found = _recall(visit, keys, gradient=self.held == "recompute")
            scores = [
                torch.where(k >= 0, self.beta * f.dots(r.z), -torch.inf)
                for r, k, f in zip(visit.rows, keys, found, strict=True)
            ]
        else:
            scores = [self._scores[r.place][s] for r, s in zip(visit.rows, slots, strict=True)]
        walks = [
            self._walk(visit, *each) for each in zip(visit.rows, slots, keys, scores, strict=True)
        ]
        weights = [Weights(walk.share, self.beta, figures=walk.figures) for walk in walks]
        if self.held == "recompute":
            used = [w.keys.masked_fill(w.held_share == 0, -1) for w in walks]
            found = _recall(visit, used, gradient=True) if found is None else found
            for weight, walk, key, recalled in zip(weights, walks, used, found, strict=True):
                weight.others += recalled.others(torch.where(key >= 0, walk.held_share, 0.0))
        if visit.advances:
            for walk in walks:
                self._store(visit, walk)
        return weights

    def _walk(self, visit: Visit, rows: Rows, slots: Tensor, keys: Keys, scores: Tensor) -> _Walk:
        """Offer each row the columns of the batch, one by one."""
        mode = self._setting.mode
        width = rows.cosines.shape[1]
        proposed = rows.negatives
        is_over = self.burn_in_until is not None and visit.step >= self.burn_in_until
        share = 0.0 if is_over else self.burn_in
        burnt = (proposed.double() * share + 1e-9).floor().int()  # .53 of 100 are 53
        as_released = self.compat == "official"
        moves = chain_moves(
            self.beta * rows.cosines.float(),
            self.uniforms(visit, rows).log_().neg_().to(rows.z.device),
            rows.ids.to(rows.z.device),
            rows.columns.ids,
            scores.float(),
            burn_in=burnt + 1 if as_released and mode != "infinite" else burnt,
            raw=as_released and mode == "infinite",
            carry=self.score if mode == "infinite" else None,
            columns=(range(width // 2, width), range(width // 2)) if mode == "pairs" else None,
        )
        # A row that nothing can be offered has no weight.
        states = (proposed - burnt).clamp_min(1).to(rows.z.dtype)
        held = moves.held - burnt if as_released else moves.held
        held_share = held.clamp_min(0) / states
        return _Walk(
            rows=rows,
            slots=slots,
            keys=keys,
            moves=moves,
            share=moves.counts.to(states.dtype).div_(states[:, None]),
            held_share=held_share,
            figures={
                "acceptance": float(moves.accepted.sum() / proposed.sum().clamp_min(1)),
                "held_share": float(held_share.mean()),
                "chain_age": self._age(visit, rows, slots, keys),
            },
        )

    def _age(self, visit: Visit, rows: Rows, slots: Tensor, keys: Keys) -> float:
        """Return for how many steps the states carried in have stood, on average; 0: none has."""
        standing = keys >= 0
        ages = (visit.step - self._since[rows.place][slots]) * standing
        return float(ages.sum() / standing.sum().clamp_min(1))

    def _store(self, visit: Visit, walk: _Walk) -> None:
        """Keep the states; of an example that stands in the batch twice, the last one's."""
        rows, b = walk.rows, len(walk.rows.ids)
        last = last_of_each(rows.ids)
        final = last + b if self._setting.mode == "infinite" else torch.cat([last, last + b])
        final = final.to(rows.z.device)
        state, score = walk.moves.state[final], walk.moves.score[final]
        examples = len(rows.columns.ids)
        key = 2 * rows.columns.ids[state % examples]
        if self._setting.mode != "infinite":
            key = key + state // examples
        moved, slots = state >= 0, walk.slots[final]
        place = rows.place
        self._keys[place, slots] = torch.where(moved, key, walk.keys[final])
        self._scores[place, slots] = score
        self._since[place, slots[moved]] = visit.step

    def state_dict(self) -> dict[str, Tensor]:
        """Return the chains' states, their scores, and when they were taken."""
        return {"keys": self._keys, "scores": self._scores, "since": self._since}


@dataclass(frozen=True)
class _Walk:
    """One rank's chains in one visit.

    Attributes:
        rows: their anchors.
        slots: where each row's state is kept.
        keys: of the states carried in; -1: the chain was empty.
        moves: what the chains did.
        share: (2b, 2B), of the recorded states, each column's.
        held_share: (2b,), that of the state carried in.
        figures: for the log.
    """

    rows: Rows
    slots: Tensor
    keys: Keys
    moves: Moves
    share: Tensor
    held_share: Tensor
    figures: dict[str, float]


@dataclass(frozen=True)
class _Recalled:
    """Embeddings of one rank's held states.

    Attributes:
        z: (k, dim), of different keys.
        place: int64 (2b,), which of them a row's is; any, where it holds none.
        number: of the visit's recall.
    """

    z: Tensor
    place: Tensor
    number: int

    def dots(self, rows: Tensor) -> Tensor:
        """Return <row, its state's embedding>, (2b,); zeros if there is none at all."""
        if not len(self.z):
            return rows.new_zeros(len(rows))
        return (rows * self.z[self.place]).sum(dim=1)

    def others(self, share: Tensor) -> list[Others]:
        """Return the embeddings with each row's ``share`` (2b,) of its own one."""
        if not len(self.z):
            return []
        weights = share.new_zeros(len(share), len(self.z))
        weights[torch.arange(len(share)), self.place] = share
        return [Others(self.z, weights, self.number)]


def _recall(visit: Visit, keys: list[Keys], *, gradient: bool) -> list[_Recalled]:
    """Have the states of each rank's rows, keys (2b,) or -1, encoded by their owners."""
    different = [torch.unique(k[k >= 0]) for k in keys]
    number, found = visit.recall(different, gradient)
    return [
        _Recalled(z, torch.searchsorted(d, k.clamp_min(0)).clamp_max(max(len(d) - 1, 0)), number)
        for z, d, k in zip(found, different, keys, strict=True)
    ]
