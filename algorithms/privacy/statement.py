"""What a private run must say about its privacy, in its summary and its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from gossamer.algorithms.privacy.noise import NoiseMode

__all__ = ["PrivacyStatement"]


_KEPT = {
    "checkpoint": (
        "sampling and noise keyed from the operating system's entropy; the keys are in the "
        "checkpoint (mode 0600) alone and must not be published"
    ),
    "state": (
        "noise keyed from the operating system's entropy; the keys are in what state_dict() "
        "returns, whose file nobody else may read. The loop draws the batches: epsilon holds if "
        "its draws are independent on every rank and secret"
    ),
}


@dataclass(frozen=True)
class PrivacyStatement:
    """The privacy of a run, as plain data.

    Attributes:
        epsilon: spent so far; infinite without noise.
        epsilon_target: what the noise was calibrated for; None where it was given itself.
        delta: of the guarantee.
        accountant: with its version: ``PRV, opacus 1.6.0``.
        unit: what one example is: ``example``, ``document``, ``sequence of 512 tokens``.
        examples: N, a public constant.
        sampler: ``poisson`` or ``full``; under ``shuffle`` the figures are no guarantee.
        noise_multiplier: of the current segment (sigma).
        rate: sampling probability of an example and step (q).
        steps: taken so far (T), all segments.
        clip: the rule that bounds an example's gradient.
        clip_norm: bound on it (C).
        noise_mode: where the noise is added; decides the trust model.
        pairwise_multiplier: noise shared by two neighbors, over the clip norm (``pairwise``).
        noise_seeded: whether the configuration gave the noise a seed, now or before a resume.
        shows_nonprivate: whether the log holds figures of the training examples.
        ranks: n.
        epsilon_per_rank: where ranks answer each for their own examples (``local``,
            ``pairwise``) and differ; ``epsilon`` is then the largest.
        epsilon_against_one_rank: under ``pairwise``, against a rank that colludes with no other;
            text: why it was not computed.
        sends: what leaves a rank in a step, in words.
        segments: what was accounted for, as (noise_multiplier, rate, steps); shown where it is not
            the run's own figures.
        filter: what runs behind the noise, as configured, with ``rho_inf``; None without.
        correlation: the strategy of correlated noise, as configured; None for independent noise.
        neighbors: which two data sets the guarantee makes alike.
        keys_kept: in the run's ``checkpoint``, or in the ``state`` of a loop that draws by itself.
    """

    epsilon: float
    delta: float
    accountant: str
    unit: str
    examples: int
    sampler: Literal["poisson", "full", "shuffle"]
    noise_multiplier: float
    rate: float
    steps: int
    clip: str
    clip_norm: float
    noise_mode: NoiseMode
    pairwise_multiplier: float | None = None
    noise_seeded: bool = False
    shows_nonprivate: bool = False
    epsilon_target: float | None = None
    ranks: int = 1
    epsilon_per_rank: tuple[float, ...] = ()
    epsilon_against_one_rank: float | str | None = None
    sends: str = "what its algorithm exchanges"
    segments: tuple[tuple[float, float, int], ...] = ()
    filter: Mapping[str, Any] | None = None
    correlation: Mapping[str, Any] | None = None
    neighbors: str = "add or remove one"
    keys_kept: Literal["checkpoint", "state"] = "checkpoint"

    _TRUST: ClassVar[Mapping[NoiseMode, str]] = {
        "split": (
            "Only the model is protected, and only from those outside: each of the {n} ranks adds "
            "1/{n} of the noise variance before its message leaves, so that whoever reads a "
            "single rank's messages meets too little noise. All ranks and the network between "
            "them are trusted, unless the sum is formed by secure aggregation."
        ),
        "rank0": (
            "Only the model is protected, and only from those outside: rank 0 adds all of the "
            "noise, the messages of the other ranks are clear. All ranks and the network between "
            "them are trusted."
        ),
        "replicated": (
            "Only the model is protected, and only from those outside: the noise is the same on "
            "every rank, so that each could take it off any message again. All ranks and the "
            "network between them are trusted."
        ),
        "local": (
            "Each rank adds the whole noise to its own sum before any message leaves: what it "
            "sends, and all that is made of it, is protected from the other ranks and from "
            "eavesdroppers. The guarantee is each rank's own, for its own examples; no rank has to "
            "trust another."
        ),
        "pairwise": (
            "Each rank adds noise of its own, and noise shared with each neighbor that cancels in "
            "the average, before any message leaves. The guarantee counts its own noise alone, "
            "which holds against all other ranks together and eavesdroppers; the shared noise "
            "protects further against those who do not share it (epsilon against one rank: that "
            "of a rank which sees every message and colludes with none). The guarantee is each "
            "rank's own, for its own examples."
        ),
    }

    @property
    def trust(self) -> str:
        """Whom the guarantee holds against, and who is trusted."""
        if self.ranks == 1:
            return (
                "One rank holds all examples and adds the noise; the model is protected from those "
                "outside, the rank itself is trusted."
            )
        return self._TRUST[self.noise_mode].format(n=self.ranks)

    _SEEN: ClassVar[Mapping[NoiseMode, str]] = {
        "split": (
            "the sum of its clipped gradients with 1/{n} of the noise variance; the means that "
            "come back have all of it"
        ),
        "rank0": (
            "the sum of its clipped gradients, clear but for rank 0's; the means that come back "
            "have all of the noise"
        ),
        "replicated": (
            "the sum of its clipped gradients, clear; the noise is known to every rank, so that "
            "the means are clear to them too"
        ),
        "local": (
            "made of its gradients after the whole noise (noise_multiplier times the bound on an "
            "example, in each element of a sum) was added to them. Whoever sees every message in "
            "all steps has the stated epsilon and no more"
        ),
        "pairwise": (
            "made of its gradients after its own noise (noise_multiplier times the bound on an "
            "example, in each element of a sum) and the noise shared with its neighbors were added "
            "to them. A neighbor can take off what it shares with the sender, and nothing else; "
            "whoever sees every message in all steps and knows all shared noise has the stated "
            "epsilon and no more"
        ),
    }

    @property
    def neighbors_see(self) -> str | None:
        """What leaves a rank, and how it is protected; None where there is one rank."""
        if self.ranks == 1:
            return None
        seen = self._SEEN[self.noise_mode].format(n=self.ranks)
        return f"In each step a rank sends {self.sends}: {seen}."

    @property
    def reservations(self) -> tuple[str, ...]:
        """Why the figures are no (epsilon, delta) guarantee; empty where they are one."""
        said = []
        if self.noise_seeded:
            said.append(
                "NOT PRIVATE: noise_seed was given, and who knows it can take the noise off; leave "
                "it out for a private run"
            )
        if not self.noise_multiplier > 0 or self.epsilon == float("inf"):
            said.append("NOT PRIVATE: no noise was added in some steps")
        if self.shows_nonprivate:
            said.append(
                "NOT PRIVATE as a whole: the log holds figures of the training examples (named "
                "nonprivate_...), which epsilon does not cover; epsilon is that of the model"
            )
        if self.sampler == "shuffle":
            said.append(
                "accounting: shuffled-approx: the batches were shuffled, the figures are those of "
                "Poisson sampling and no (epsilon, delta) guarantee"
            )
        return tuple(said)

    def as_dict(self) -> dict[str, Any]:
        """Return what is shown, by heading, in the order to show it; ready for JSON.

        Epsilon stands under ``epsilon`` only where it is a guarantee, else under
        ``epsilon_if_secret`` (seeded noise) or ``epsilon_approx`` (shuffled batches).
        """
        if self.sampler == "shuffle":
            epsilon_key = "epsilon_approx"
        elif self.noise_seeded:
            epsilon_key = "epsilon_if_secret"
        else:
            epsilon_key = "epsilon"
        shown: dict[str, Any] = {
            "private": not self.reservations,
            "reservations": list(self.reservations),
            epsilon_key: _spelled(self.epsilon),
            f"{epsilon_key}_per_rank": [_spelled(e) for e in self.epsilon_per_rank] or None,
            f"{epsilon_key}_against_one_rank": _spelled(self.epsilon_against_one_rank),
            "epsilon_target": self.epsilon_target,
            "delta": self.delta,
            "accountant": self.accountant,
            "neighbors": self.neighbors,
            "unit": self.unit,
            "examples": self.examples,
            "sampler": self.sampler,
            "noise_multiplier": self.noise_multiplier,
            "pairwise_multiplier": self.pairwise_multiplier,
            "rate": self.rate,
            "steps": self.steps,
            "clip": self.clip,
            "clip_norm": self.clip_norm,
            "noise_mode": self.noise_mode,
            "trust": self.trust,
            "neighbors_see": self.neighbors_see,
            "filter": None if self.filter is None else dict(self.filter),
            "correlation": None if self.correlation is None else dict(self.correlation),
            "seeds": (
                "noise seeded by the configuration" if self.noise_seeded else _KEPT[self.keys_kept]
            ),
        }
        if len(self.segments) > 1 or self.correlation is not None:
            shown["segments"] = [
                {"noise_multiplier": noise, "rate": rate, "steps": steps}
                for noise, rate, steps in self.segments
            ]
        return {heading: value for heading, value in shown.items() if value is not None}


def _spelled(epsilon: float | str | None) -> float | str | None:
    # Strict JSON has no infinity, and null would read as nothing spent.
    return "infinite" if epsilon == float("inf") else epsilon
