"""Estimates as what makes them: the counters of random directions, and a number for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.algorithms.estimates import Directions
from gossamer.runtime import Communicator, RowLayout
from gossamer.runtime.perturb import Distribution, Mask, Probe, update_
from gossamer.runtime.rows import empty_rows

__all__ = ["Along", "Probes"]


class Along(NamedTuple):
    """A direction of a run.

    Attributes:
        step: 0-based.
        number: of the probe in it, below 2**31.
        tensors: on which z is not 0; None: on all.
    """

    step: int
    number: int
    tensors: frozenset[int] | None = None


@dataclass(frozen=True)
class Probes:
    """Per hosted rank, sum_k c_k z_k: a gradient in eight bytes a direction.

    Attributes:
        comm: the ranks.
        layout: of a row.
        seed: of the directions.
        along: per rank of the whole run, its directions.
        coefficients: (local, directions) float64.
        distribution: of the elements of z.
        mask: which of them are 0.
    """

    comm: Communicator
    layout: RowLayout
    seed: int
    along: Sequence[Sequence[Along]]
    coefficients: Tensor
    distribution: Distribution = "normal"
    mask: Mask | None = None

    @property
    def numbers(self) -> list[list[int]]:
        """Per rank of the whole run, the numbers of its probes."""
        return [[a.number for a in along] for along in self.along]

    @property
    def has_room(self) -> bool:
        """No: a row is what they save."""
        return False

    def mean(self, comm: Communicator) -> Probes | None:
        """Return the mean over ranks; None where some rank's numbers are not finite.

        What is exchanged is one float64 per direction. Coefficients of one direction are added in
        ascending rank, so every rank has the same bits.
        """
        table = comm.all_gather(self.coefficients.to(comm.device)).cpu()
        if not bool(table.isfinite().all()):
            return None
        sums: dict[Along, float] = {}
        for along, row in zip(self.along, table.tolist(), strict=True):
            for direction, coefficient in zip(along, row, strict=True):
                sums[direction] = sums.get(direction, 0.0) + coefficient
        means = torch.tensor([total / comm.n for total in sums.values()], dtype=torch.float64)
        rows = means.expand(comm.local, -1)
        return replace(self, along=[list(sums)] * comm.n, coefficients=rows)

    def add_to_(self, x: Tensor, scale: float) -> Tensor:
        """Add ``scale`` times the estimates to x (local, d): one read and one write of x.

        Directions of disjoint sets of tensors are added set by set.
        """
        for i, row in enumerate(x):
            self._add(row, i, scale, begin=0)
        return x

    def dense(self) -> Tensor:
        """Return the estimates as rows (local, d)."""
        d, dtype = self.layout.d, self.layout.dtype
        return self.add_to_(empty_rows(self.comm.local, d, dtype, self.comm.device), 1.0)

    def columns(self, begin: int, end: int) -> Tensor:
        """Return columns begin..end of ``dense``."""
        shape = (self.comm.local, end - begin)
        out = torch.zeros(shape, dtype=self.layout.dtype, device=self.comm.device)
        for i, row in enumerate(out):
            self._add(row, i, 1.0, begin)
        return out

    def _add(self, row: Tensor, i: int, scale: float, begin: int) -> None:
        along, values = self.along[self.comm.ranks[i]], self.coefficients[i].tolist()
        groups: dict[frozenset[int] | None, list[Probe]] = {}
        for a, coefficient in zip(along, values, strict=True):
            probe = Probe(a.step, a.number, -scale * coefficient)
            groups.setdefault(a.tensors, []).append(probe)
        for tensors, terms in groups.items():
            update_(
                row,
                self.layout,
                self.seed,
                terms,
                distribution=self.distribution,
                mask=self.mask,
                begin=begin,
                tensors=tensors,
            )


_: type[Directions] = Probes
