"""A private gradient that is not written down yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from gossamer.algorithms.estimates import Directions
from gossamer.runtime import Communicator, RowLayout, combine
from gossamer.runtime.perturb import Probe, release_

__all__ = ["Release"]


@dataclass
class Release:
    """Clipped sums, and what turns them into rows: noise, scale and filter, in one pass.

    These are Directions. A filter adds itself with ``filtered``; then the rows are written once, by
    ``dense``, or by ``add_to_`` in the same pass as the update of x. Until then ``sums`` is what no
    privacy covers: whoever gets a Release calls one of the two before the oracle's next call.

    Attributes:
        layout: of a row.
        sums: (local, d), clipped sums.
        noise: per row the directions of its noise, as ``runtime.perturb.release_`` takes them.
        factors: per row, what the noisy sum is multiplied by.
        out: (local, d), where the rows go.
        weight: of the noisy sum in ``out``, after ``factors``.
        kept: pairs (c, rows): added to it.
        raw: (local, d), gets the noisy sum before the filter; None: it is not kept.
    """

    layout: RowLayout
    sums: Tensor = field(repr=False)  # nobody's to see, as are the keys in noise
    noise: Sequence[Sequence[tuple[int, Probe]]] = field(repr=False)
    factors: Sequence[float]
    out: Tensor
    weight: float = 1.0
    kept: Sequence[tuple[float, Tensor]] = ()
    raw: Tensor | None = None
    _is_written: bool = field(default=False, init=False)

    def filtered(
        self,
        weight: float,
        kept: Sequence[tuple[float, Tensor]],
        out: Tensor,
        raw: Tensor | None = None,
    ) -> Release:
        """Return ``weight`` times this gradient plus kept rows, to be written to ``out``."""
        assert not self._is_written, "the sums are gone"
        assert not self.kept, "one filter at most"
        return replace(self, weight=weight, kept=kept, out=out, raw=raw)

    @property
    def has_room(self) -> bool:
        """Yes: ``out`` is there."""
        return True

    def mean(self, comm: Communicator) -> Tensor | Directions:
        """Return the mean of the rows over ranks, (1, d); one rank's own is not written yet."""
        return self if comm.n == 1 else comm.all_reduce(self.dense(), "mean")

    def columns(self, begin: int, end: int) -> Tensor:
        """Return columns begin..end of ``dense``."""
        return self.dense()[:, begin:end]

    def dense(self) -> Tensor:
        """Return the rows (local, d), written at the first call."""
        if not self._is_written:
            self._write(None)
        return self.out

    def add_to_(self, x: Tensor, scale: float) -> Tensor:
        """Add ``scale`` times the rows to x (local, d)."""
        if self._is_written:
            return combine([(1.0, x), (scale, self.out)], out=x)
        self._write((scale, x))
        return x

    def _write(self, step: tuple[float, Tensor] | None) -> None:
        for i, (terms, factor) in enumerate(zip(self.noise, self.factors, strict=True)):
            release_(
                self.sums[i],
                self.layout,
                terms,
                factor,
                weight=self.weight,
                kept=[(c, rows[i]) for c, rows in self.kept],
                out=self.out[i],
                raw=None if self.raw is None else self.raw[i],
                step=None if step is None else (step[0], step[1][i]),
            )
        self._is_written = True


_: type[Directions] = Release
