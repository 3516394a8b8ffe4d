"""Estimates as what makes them: the counters of random directions, and a number for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gossamer.algorithms.protocols import Directions
from gossamer.runtime import Communicator, RowLayout
from gossamer.runtime.perturb import Distribution, Mask, Probe, update_
from gossamer.runtime.rows import empty_rows

__all__ = ["Probes"]


@dataclass(frozen=True)
class Probes:
    """Per hosted rank, sum_k c_k z(seed, step, probe_k): a gradient in eight bytes.

    Attributes:
        comm: the ranks.
        layout: of a row.
        seed: of the directions.
        step: of all of them.
        numbers: per rank of the whole run, which probes it made.
        coefficients: (local, probes) float64.
        distribution: of the elements of z.
        mask: which of them are 0.
    """

    comm: Communicator
    layout: RowLayout
    seed: int
    step: int
    numbers: Sequence[Sequence[int]]
    coefficients: Tensor
    distribution: Distribution = "normal"
    mask: Mask | None = None

    def mean(self) -> Probes | None:
        """Return the mean over ranks; None where some rank's numbers are not finite.

        What is exchanged is one float64 per probe. Coefficients of one direction are added in
        ascending rank, so every rank has the same bits.
        """
        comm = self.comm
        table = comm.all_gather(self.coefficients.to(comm.device)).cpu()
        if not bool(table.isfinite().all()):
            return None
        sums: dict[int, float] = {}
        for numbers, row in zip(self.numbers, table.tolist(), strict=True):
            for number, coefficient in zip(numbers, row, strict=True):
                sums[number] = sums.get(number, 0.0) + coefficient
        means = torch.tensor([total / comm.n for total in sums.values()], dtype=torch.float64)
        rows = means.expand(comm.local, -1)
        return replace(self, numbers=[list(sums)] * comm.n, coefficients=rows)

    def add_to_(self, x: Tensor, scale: float) -> Tensor:
        """Add ``scale`` times the estimates to x (local, d): one read and one write of x."""
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
        rank = self.comm.ranks[i]
        terms = [
            Probe(self.step, number, -scale * coefficient)
            for number, coefficient in zip(
                self.numbers[rank], self.coefficients[i].tolist(), strict=True
            )
        ]
        update_(
            row,
            self.layout,
            self.seed,
            terms,
            distribution=self.distribution,
            mask=self.mask,
            begin=begin,
        )


_: type[Directions] = Probes
