"""``dp``: differentially private gradients (DP-SGD, arXiv:1607.00133), on one rank or many.

Each example's gradient is bounded, the sums get noise, and everything after that is free:
filters, optimizers, gossip. What a run says of its privacy is in ``statement``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from pydantic import PrivateAttr
from torch import Tensor

from gossamer.algorithms.estimates import Estimate, Origin, Sink, TrainingFigures
from gossamer.algorithms.privacy import accounting
from gossamer.algorithms.privacy.adaptive import shared_noise
from gossamer.algorithms.privacy.clipping import AdaptiveClip, AnyClip, make_clip
from gossamer.algorithms.privacy.correlated_noise import CorrelatedNoise
from gossamer.algorithms.privacy.dp_options import DPOptions
from gossamer.algorithms.privacy.ledger import Ledger
from gossamer.algorithms.privacy.noise import NoiseMode, SecretNoise
from gossamer.algorithms.privacy.pairwise import PairwiseNoise
from gossamer.algorithms.privacy.release import Release
from gossamer.algorithms.privacy.sampling_plan import SamplingPlan, require_countable
from gossamer.algorithms.privacy.statement import PrivacyStatement
from gossamer.algorithms.problems import DataPlan, Problem, RankBatches
from gossamer.algorithms.protocols import Algorithm
from gossamer.runtime import Communicator, ConfigError

__all__ = ["DP"]

_OWN = ("local", "pairwise")
"""Modes in which each rank protects its own examples by itself."""


class DP(DPOptions):
    """Clips each example's gradient and adds noise to the sum: (epsilon, delta)-DP by sampling.

    With a batch drawn by independent coins of probability q, expected size B, and noise multiplier
    sigma, the estimate is ``(sum_i clip(g_i) + sigma C z) / B``: B is a constant, so an empty batch
    still gets noise and counts. Neighbours differ by one example more or less. Documents count
    alike, however many tokens each has; one of none adds nothing.

    On several ranks the noise is that of the sum over all of them, where the algorithm uses
    nothing but the mean gradient (``all-reduce``); where ranks exchange anything else, each
    protects its own examples by itself (``local``).
    """

    _comm: Communicator = PrivateAttr()
    _mode: NoiseMode = PrivateAttr(default="split")
    _noise: SecretNoise | CorrelatedNoise = PrivateAttr()
    _clip: AnyClip = PrivateAttr()
    _ledger: Ledger = PrivateAttr()
    _sizes: list[float] = PrivateAttr()  # what each rank's sum is divided by
    _expected: list[float] = PrivateAttr()  # of the hosted ranks
    _examples: int = PrivateAttr(default=0)
    _unit: str = PrivateAttr(default="example")
    _sends: str = PrivateAttr(default="")
    _strategy: list[float] = PrivateAttr(default_factory=list)  # of the streams to begin
    _seeded: bool = PrivateAttr(default=False)
    _last: tuple[int, int] | None = PrivateAttr(default=None)  # (step, draw) released last

    # --- before the first step --------------------------------------------------------------

    def adapt(self, algorithm: Algorithm) -> None:
        """Choose where the noise goes by what the algorithm does with gradients.

        Raises:
            ConfigError: a mode that protects the mean only, under an algorithm that shows more.
        """
        self.inner.adapt(algorithm)
        central, self._sends = algorithm.uses == "mean", algorithm.sends
        if self.noise_mode == "auto":
            self._mode = "split" if central else "local"
            return
        if self.noise_mode not in _OWN and not central:
            raise ConfigError(
                f"oracle.noise_mode: {self.noise_mode} protects the mean over all ranks, but "
                f"{algorithm.name} lets neighbours see each rank's own; use local, or algorithm "
                "all-reduce"
            )
        self._mode = self.noise_mode

    def setup(self, comm: Communicator, problem: Problem) -> DataPlan:
        """Set the inner oracle up, and plan coins of one secret probability-q batch per call."""
        self._comm = comm
        # A loss that is not weighed by examples is one per token.
        self._unit = "sequence" if problem.weigh is not Problem.weigh else "example"
        plan = self.inner.setup(comm, problem)
        self.inner.require_clipped()
        require_countable(plan, self.inner, problem)
        sizes = [len(shard) for shard in problem.shards]
        own = self._mode in _OWN
        self._examples = max(sizes) if own else sum(sizes)
        delta = accounting.default_delta(self._examples) if self.delta is None else self.delta
        accounting.check_delta(delta, self._examples)
        self._clip = make_clip(
            self.clip, self.clip_norm, self.clip_gamma, len(self.inner.layout.slices)
        )
        if self.clip == "adaptive" and own and comm.n > 1:
            raise ConfigError(
                "oracle.clip: adaptive counts over all ranks, which local noise does not protect; "
                "use flat or auto-s"
            )
        bands = 1 if self.correlation is None else self.correlation.bands
        # The seeds are those of the noise at the time.
        drawn = SamplingPlan.of(plan, sizes, own, lambda rank: self._noise.coin_seed(rank), bands)
        self._sizes = drawn.divisors
        self._expected = [self._sizes[r] for r in comm.ranks]
        self._noise = self._secret_noise()
        self._seeded = self.noise_seed is not None
        facts = {
            "examples": self._examples,
            "noise_mode": get_args(NoiseMode).index(self._mode),
            "pairwise_multiplier": self.pairwise_multiplier or 0.0,
            "pairs": 0.0 if self._pairs is None else self._pairs.fingerprint(),
        }
        self._ledger = Ledger(
            drawn.rates, delta, self.accountant, self.epsilon, bands=bands, facts=facts
        )
        return drawn.plan

    def _secret_noise(self) -> SecretNoise | CorrelatedNoise:
        """Return noise of new keys."""
        comm, seed = self._comm, self.noise_seed
        white = SecretNoise(self._mode, comm, seed)
        if self.pairwise_multiplier is not None:
            bound = self._clip.sensitivity
            white = PairwiseNoise(comm, seed, self.pairwise_multiplier, bound, self._sizes)
        return white if self.correlation is None else CorrelatedNoise(white, self.correlation)

    def start(self, steps: int | None, draws: int) -> None:
        """Find sigma, and compare the ranks' noise; exchanges messages."""
        self.inner.start(steps, draws)
        self._find_sigma(None if steps is None else steps * draws)
        self._noise.agree(self.inner.layout)

    def restart(self, calls: int | None) -> None:
        """Find sigma for the releases to come, of which there is none yet; exchanges messages.

        Raises:
            ConfigError: there were releases, of noise found for another number of them.
        """
        self.inner.restart(calls)
        ledger = self._ledger
        if calls == ledger.planned:
            return
        if ledger.releases and (self.epsilon is not None or self.correlation is not None):
            raise ConfigError(
                f"oracle.epsilon: noise was found for {ledger.planned} gradients, some of which "
                "are released, and cannot be found anew; use noise_multiplier, without correlation"
            )
        self._find_sigma(calls)

    def _find_sigma(self, releases: int | None) -> None:
        """Fix the number of releases, and sigma."""
        ledger = self._ledger
        ledger.planned = releases
        found = self.noise_multiplier
        strategy = () if self.correlation is None else self.correlation.strategy(releases)
        values = [ledger.calibrated(releases) if found is None else found, *strategy]
        row = torch.tensor([values] * self._comm.local, dtype=torch.float64)
        agreed = self._comm.broadcast(row.to(self._comm.device), count=False)
        ledger.sigma, *self._strategy = agreed[0].tolist()
        if found is not None:
            ledger.require_countable()
        if self.pairwise_multiplier is not None and self.pairwise_multiplier > 1e6 * ledger.sigma:
            raise ConfigError(
                f"oracle.pairwise_multiplier: {self.pairwise_multiplier:g} drowns own noise of "
                f"{ledger.sigma:g} in rounding; use at most a million times as much"
            )
        if isinstance(self._noise, CorrelatedNoise):
            self._noise.begin(self._comm, self.inner.layout, self._strategy)

    # --- a step -----------------------------------------------------------------------------

    @property
    def weighting(self) -> Literal["ranks", "examples"]:
        """Examples count alike under central noise; ranks where each protects its own."""
        return "ranks" if self._mode in _OWN else "examples"

    @property
    def keeps_whole(self) -> str:
        """Why it takes no sink: an example's bound is known when all of its gradient is."""
        return "dp bounds whole gradients of single examples"

    @property
    def training_figures(self) -> TrainingFigures:
        """Hidden, or marked: epsilon does not cover them."""
        return "marked" if self.show_nonprivate else "hidden"

    def __call__(
        self,
        x: Tensor,
        batch: RankBatches,
        *,
        combine: Sequence[tuple[float, Tensor]] | None = None,
        sink: Sink | None = None,
    ) -> Estimate:
        """Release one noisy sum over each rank's batch, over its expected size."""
        if sink is not None:
            raise ConfigError(f"oracle: {self.keeps_whole}; no per-layer updates")
        return self.deferred(x, batch, combine=combine).dense()

    def deferred(
        self,
        x: Tensor,
        batch: RankBatches,
        *,
        combine: Sequence[tuple[float, Tensor]] | None = None,
    ) -> Estimate:
        """Release the same, not written down yet."""
        self._check_release(batch)
        if isinstance(self._clip, AdaptiveClip):
            return self._adaptive(x, batch, combine)
        return self._release(x, batch, combine, self._ledger.sigma)

    def _release(
        self,
        x: Tensor,
        batch: RankBatches,
        points: Sequence[tuple[float, Tensor]] | None,
        sigma: float,
    ) -> Estimate:
        layout, bound = self.inner.layout, self._clip.sensitivity
        secret_of = self._noise.coin_seed
        found = self.inner.clipped(x, batch, self._clip, combine=points, secret_of=secret_of)
        scales = self._noise.scales(sigma * bound)
        noise = self._noise.pending(found.grad, layout, self._ledger.releases, scales)
        self._ledger.count()
        factors = [1 / size for size in self._expected]
        release = Release(layout, found.grad, noise, factors, out=found.grad)
        grad: Tensor | Release = release
        if found.grad.dtype != layout.dtype:
            # In float32 up to here; rows of half precision take what is released already.
            grad = release.dense().to(layout.dtype)
        # What the optimizer may know: the variance in a row, and in the mean of all.
        rows, mean = self._noise.variances(sigma * bound, self._sizes)
        alike = len(set(rows)) == 1
        row = rows[0] if alike else torch.tensor(rows, dtype=torch.float64)[:, None]
        metrics = {}
        if self.show_nonprivate:
            metrics["nonprivate_batch_size"] = found.weight
        return Estimate(
            loss=found.loss,
            grad=grad,
            weight=torch.tensor(self._expected, dtype=torch.float64),
            origin=Origin(noise_var=row),
            mean_origin=Origin(noise_var=mean),
            metrics=metrics,
        )

    def _adaptive(
        self,
        x: Tensor,
        batch: RankBatches,
        points: Sequence[tuple[float, Tensor]] | None,
    ) -> Estimate:
        """Release the gradient and the noisy count that moves C, for the price of one sigma."""
        assert isinstance(self._clip, AdaptiveClip)
        assert isinstance(self._noise, SecretNoise)
        comm, expected = self._comm, self._expected[0] * self._comm.n
        sigma, count_std = shared_noise(self._ledger.sigma, expected)
        number = self._ledger.releases
        estimate = self._release(x, batch, points, sigma)
        row = torch.zeros(comm.local, 1, dtype=torch.float64)
        row[0] = self._clip.unclipped
        if 0 in comm.ranks:
            row[0] += self._noise.scalar(number) * count_std
        total = comm.all_reduce(row.to(comm.device), "sum")
        self._clip.move(float(total), expected)
        return estimate

    def _check_release(self, batch: RankBatches) -> None:
        if min(self._ledger.rates) < 1:
            drawn = batch[0].drawn
            if drawn is None:
                raise ConfigError(
                    "oracle: dp counts batches by the coins that drew them, and this one was put "
                    "together by hand; use those that the step is given"
                )
            if self._last is not None and drawn <= self._last:
                raise ConfigError(
                    f"oracle: the algorithm takes two gradients of one batch, or batches out of "
                    f"order (draw {drawn[1]} of step {drawn[0]} after draw {self._last[1]} of step "
                    f"{self._last[0]}), which the privacy of Poisson sampling does not count; use "
                    "an algorithm with one gradient per batch"
                )
            self._last = drawn
        self._ledger.require_room()
        if isinstance(self._noise, CorrelatedNoise):
            self._noise.take_turn(batch)

    # --- what a resume needs, and what the report says ---------------------------------------

    def own_state(self) -> dict[str, Tensor]:
        """Return the secret keys, C, the releases so far and what they depend on."""
        local, norm = self._comm.local, getattr(self._clip, "norm", self.clip_norm)
        return {
            **self._noise.state(),
            "clip_norm": torch.full((local, 1), norm, dtype=torch.float64),
            **self._ledger.state(self._comm.ranks),
            "seeded": torch.full((local, 1), int(self._seeded), dtype=torch.int64),
        }

    def load_own_state(self, state: dict[str, Tensor]) -> None:
        """Go on with the same noise.

        Raises:
            ConfigError: the releases to come would not compose with those before.
        """
        self._ledger.load(state, self._comm.ranks)
        self._noise.load(state)
        self._last = None
        history = self._ledger.history
        if history and history[-1][0] != self._ledger.sigma:
            self._begin_stream()
        self._seeded = self._seeded or bool(state["seeded"][0])
        if isinstance(self._clip, AdaptiveClip):
            self._clip.norm = float(state["clip_norm"][0])

    def branch(self) -> None:
        """Take new secrets: this run may go on otherwise than the one that was saved."""
        self.inner.branch()
        self._noise = self._secret_noise()
        self._noise.agree(self.inner.layout)
        self._begin_stream()

    def _begin_stream(self) -> None:
        """Take nothing back of correlated noise that was added so far."""
        if isinstance(self._noise, CorrelatedNoise):
            self._ledger.begin_anew()
            self._noise.begin(self._comm, self.inner.layout, self._strategy)

    @property
    def noise_strategy(self) -> tuple[float, ...] | None:
        """K's first column under correlated noise."""
        return self._noise.strategy if isinstance(self._noise, CorrelatedNoise) else None

    @property
    def _pairs(self) -> PairwiseNoise | None:
        """The noise that neighbors share."""
        noise = self._noise
        white = noise.white if isinstance(noise, CorrelatedNoise) else noise
        return white if isinstance(white, PairwiseNoise) else None

    def spent(self, rank: int = 0) -> float:
        """Return the epsilon spent so far, on the examples of ``rank`` under local noise."""
        return self._ledger.spent(rank)

    def statement(self) -> dict[str, Any]:
        """Return the privacy statement of the run, under ``privacy``."""
        ledger = self._ledger
        worst, rates, pairs = ledger.worst, ledger.rates, self._pairs
        each = ledger.spent_per_rank() if self._mode in _OWN and len(set(rates)) > 1 else ()
        alone: float | str | None = None
        if pairs is not None:
            alone = pairs.unknown_against_one or ledger.spent_with(pairs.against_one)
        said = PrivacyStatement(
            epsilon=max(each) if each else ledger.spent(worst),
            epsilon_per_rank=each,
            epsilon_against_one_rank=alone,
            epsilon_target=self.epsilon,
            delta=ledger.delta,
            accountant=ledger.accountant_version(),
            unit=self._unit,
            examples=self._examples,
            sampler="full" if min(rates) == 1 else "poisson",
            noise_multiplier=ledger.sigma,
            rate=rates[worst],
            steps=ledger.releases,
            clip=self.clip,
            clip_norm=getattr(self._clip, "norm", self.clip_norm),
            noise_mode=self._mode,
            noise_seeded=self._seeded,
            shows_nonprivate=self.show_nonprivate,
            pairwise_multiplier=self.pairwise_multiplier,
            ranks=self._comm.n,
            sends=self._sends,
            segments=tuple((s.noise_multiplier, s.rate, s.steps) for s in ledger.segments(worst)),
            correlation=None if self.correlation is None else self.correlation.model_dump(),
        )
        return {**self.inner.statement(), "privacy": said.as_dict()}
