"""The releases of a run: how many there were, with which noise, and the epsilon they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gossamer.algorithms.privacy import accounting
from gossamer.algorithms.privacy.accounting import Segment
from gossamer.algorithms.privacy.noise_strategies import amplified_history
from gossamer.runtime.errors import ConfigError

__all__ = ["Ledger"]

_SEGMENTS = 16
"""How often sigma may change, or noise begin anew, over the resumptions of a run."""


@dataclass
class Ledger:
    """What privacy is counted with, and what was released so far.

    Attributes:
        rates: per rank, the probability of an example and release.
        delta: of the guarantee.
        accountant: how epsilon is counted.
        target: epsilon at the end of the run; None where sigma was given.
        sigma: noise in the sum over the clip norm; that of the releases to come.
        planned: releases of the whole run; None when open-ended.
        bands: of correlated noise, whose releases are counted by ``amplified_history``; 1 where
            they are independent.
        facts: by name, what else epsilon is counted with: public constants of the run.
        history: (sigma, releases), in order; under correlated noise one per stream of it.
    """

    rates: list[float]
    delta: float
    accountant: str
    target: float | None
    sigma: float = 0.0
    planned: int | None = None
    bands: int = 1
    facts: Mapping[str, float] = field(default_factory=dict)
    history: list[tuple[float, int]] = field(default_factory=list)

    @property
    def releases(self) -> int:
        """How many there were."""
        return sum(count for _, count in self.history)

    def calibrated(self, planned: int | None) -> float:
        """Return the sigma that ends at the target after ``planned`` releases.

        Raises:
            ConfigError: the run has no end, or no sigma reaches the target.
        """
        assert self.target is not None
        if planned is None:
            raise ConfigError("oracle.epsilon: needs a number of steps; or noise_multiplier")
        (asked,) = amplified_history(1.0, max(self.rates), planned, self.bands)
        return accounting.calibrate(
            self.target, self.delta, asked.rate, asked.steps, self.accountant
        )

    def require_countable(self) -> None:
        """Refuse now what no accountant can count when it is released.

        Raises:
            ConfigError: names the field and the way out.
        """
        if self.sigma > 0:
            whole = replace(self, history=[(self.sigma, self.planned or 1)])
            accounting.require_countable(whole.segments(whole.worst), self.delta, self.accountant)

    def require_room(self) -> None:
        """Refuse a release that sigma was not found for."""
        if self.target is not None and self.planned is not None and self.releases >= self.planned:
            raise ConfigError(
                f"oracle.epsilon: the algorithm asks for more gradients than the {self.planned} "
                "that sigma was found for; use noise_multiplier"
            )

    def count(self) -> None:
        """Enter one release."""
        if self.history and self.history[-1][0] == self.sigma:
            self.history[-1] = (self.sigma, self.history[-1][1] + 1)
        else:
            self.history.append((self.sigma, 1))

    def begin_anew(self) -> None:
        """Count the releases to come apart, where their noise begins anew (``bands`` > 1).

        Raises:
            ConfigError: the target would be passed: parts of a block's turn count as whole ones.
        """
        if self.bands == 1 or not self.releases:
            return
        if self.target is not None and self.planned is not None:
            parts = [*(count for _, count in self.history), self.planned - self.releases]
            turns, found = sum(map(self._turns, parts)), self._turns(self.planned)
            if turns > found:
                raise ConfigError(
                    f"oracle.epsilon: correlated noise begins anew where a run goes on otherwise, "
                    f"here after {self.releases} gradients, which makes {turns} turns of a block "
                    f"where sigma was found for {found}; resume unchanged and in its folder, go on "
                    f"from a multiple of {self.bands} gradients, or use noise_multiplier"
                )
        if self.history[-1][1] > 0:
            self.history.append((self.sigma, 0))

    def _turns(self, releases: int) -> int:
        """Return in how many of so many releases an example can take part."""
        return -(-releases // self.bands)

    @property
    def worst(self) -> int:
        """The rank whose examples are protected least."""
        return max(range(len(self.rates)), key=self.rates.__getitem__)

    def segments(self, rank: int) -> tuple[Segment, ...]:
        """Return what to account for, of the examples of ``rank``."""
        return self._segments(self.rates[rank], self.history)

    def _segments(self, rate: float, history: Iterable[tuple[float, int]]) -> tuple[Segment, ...]:
        return tuple(
            segment
            for noise, count in history
            for segment in amplified_history(noise, rate, count, self.bands)
            if count > 0
        )

    def spent(self, rank: int) -> float:
        """Return the epsilon spent on the examples of ``rank``."""
        return accounting.spent(self.segments(rank), self.delta, self.accountant)

    def spent_per_rank(self) -> tuple[float, ...]:
        """Return the epsilon spent on the examples of each rank, computed once for each rate."""
        found = {rate: self.spent(self.rates.index(rate)) for rate in set(self.rates)}
        return tuple(found[rate] for rate in self.rates)

    def spent_with(self, noise: Callable[[float], Sequence[float]]) -> float:
        """Return the largest epsilon of a rank where they have other noise than sigma.

        Args:
            noise: sigma -> the noise multiplier of each rank.
        """
        of = {sigma: noise(sigma) for sigma, _ in self.history}
        epsilons = []
        for rate in set(self.rates):
            ranks = [r for r, its in enumerate(self.rates) if its == rate]
            history = [(min(of[sigma][r] for r in ranks), count) for sigma, count in self.history]
            found = accounting.spent(self._segments(rate, history), self.delta, self.accountant)
            epsilons.append(found)
        return max(epsilons)

    def accountant_version(self) -> str:
        """Return who counted, with its version."""
        resolved = accounting.resolve(self.segments(self.worst), self.accountant)
        return accounting.accountant_version(resolved)

    # --- what a resume needs -----------------------------------------------------------------

    def state(self, ranks: range) -> dict[str, Tensor]:
        """Return the history and what it is counted with, a row for each hosted rank."""
        local = len(ranks)
        rows = torch.zeros(_SEGMENTS, 2, dtype=torch.float64)
        for row, (sigma, count) in zip(rows, self.history, strict=False):
            row[0], row[1] = sigma, count
        return {
            "history": rows.expand(local, *rows.shape).clone(),
            "planned": torch.full((local, 1), self.planned or 0, dtype=torch.int64),
            "facts": self._facts(ranks),
        }

    def _facts(self, ranks: range) -> Tensor:
        rest = [self.delta, self.bands, *self.facts.values()]
        return torch.tensor([[self.rates[r], *rest] for r in ranks], dtype=torch.float64)

    def load(self, state: dict[str, Tensor], ranks: range) -> None:
        """Take back what ``state`` returned.

        Raises:
            ConfigError: the checkpoint does not say what was released before, or the releases to
                come would not compose with it, or there were others meanwhile.
        """
        if self.releases:
            raise ConfigError(
                f"resume: {self.releases} private gradients were released before the state was "
                "loaded, which does not count them; load it before the first step, and let an "
                "algorithm take its first gradient in step, not in init"
            )
        if not {"history", "facts"} <= state.keys():
            raise ConfigError(
                "resume: the checkpoint has no history of private releases, so that nobody knows "
                "the epsilon spent; start from its parameters instead, in a new run"
            )
        before, now = state["facts"], self._facts(ranks)
        names = ["rate", "delta", "bands", *self.facts]
        if before.shape != now.shape or not torch.equal(before, now):
            changed = [
                f"{name} ({old} -> {new})"
                for name, old, new in zip(names, before[0].tolist(), now[0].tolist(), strict=False)
                if old != new
            ]
            raise ConfigError(
                f"resume: epsilon is counted with {', '.join(names)}, of which the checkpoint has "
                f"others: {', '.join(changed) or 'on other ranks'}; keep batch_size, delta, the "
                "data, noise_mode, correlation and, under pairwise, the topology, or start a new "
                "run"
            )
        planned = int(state["planned"][0])
        if self.target is not None and planned != (self.planned or 0):
            raise ConfigError(
                f"oracle.epsilon: the noise so far was found for {planned} gradients, this run "
                f"asks for {self.planned}; resume with the same steps, or write noise_multiplier "
                "instead of epsilon"
            )
        rows = state["history"][0].tolist()
        # A stream may have begun with nothing released yet.
        self.history = [(sigma, int(count)) for sigma, count in rows if count > 0 or sigma > 0]
        if self.target is not None and self.history and self.history[-1][0] != self.sigma:
            raise ConfigError(
                f"oracle.epsilon: the releases so far had sigma {self.history[-1][0]:g}, this "
                f"target gives {self.sigma:g}; keep the target, or write noise_multiplier instead"
            )
        if len(self.history) >= _SEGMENTS:
            raise ConfigError(
                f"resume: sigma changed, or noise began anew, {_SEGMENTS} times; start a new run"
            )
