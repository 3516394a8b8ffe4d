"""``dp``: differentially private gradients (DP-SGD, arXiv:1607.00133), on one rank or many.

Each example's gradient is bounded, the sums get noise, and everything after that is free:
filters, optimizers, gossip. What a run says of its privacy is in ``statement``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor

from gossamer.algorithms.privacy import accounting
from gossamer.algorithms.privacy.clipping import AdaptiveClip, AnyClip, ClipKind, make_clip
from gossamer.algorithms.privacy.ledger import Ledger
from gossamer.algorithms.privacy.noise import NoiseMode, SecretNoise
from gossamer.algorithms.privacy.statement import PrivacyStatement
from gossamer.algorithms.problems import DataPlan, Problem, RankBatches
from gossamer.algorithms.protocols import (
    Algorithm,
    Estimate,
    OracleWrapper,
    Origin,
    Sink,
    TrainingFigures,
)
from gossamer.runtime import Communicator, ConfigError, combine

__all__ = ["DP"]


class DP(OracleWrapper):
    """Clips each example's gradient and adds noise to the sum: (epsilon, delta)-DP by sampling.

    With a batch drawn by independent coins of probability q, expected size B, and noise multiplier
    sigma, the estimate is ``(sum_i clip(g_i) + sigma C z) / B``: B is a constant, so an empty batch
    still gets noise and counts. Neighbours differ by one example more or less.

    On several ranks the noise is that of the sum over all of them, where the algorithm uses
    nothing but the mean gradient (``all-reduce``); where ranks exchange anything else, each
    protects its own examples by itself (``local``).
    """

    name: Literal["dp"] = "dp"
    epsilon: float | None = Field(default=None, gt=0)
    """Target at the end of the run; gives sigma. Write this or ``noise_multiplier``."""
    noise_multiplier: float | None = Field(default=None, ge=0)
    """sigma: the noise in the sum, in units of the clip norm."""
    delta: float | None = Field(default=None, gt=0, lt=1)
    """Default: N^-1.1 for N examples."""
    accountant: Literal["prv", "rdp", "gaussian", "gdp"] = "prv"
    """How epsilon is counted; a full batch is always counted exactly."""
    clip: ClipKind = "flat"
    """How an example's gradient is bounded."""
    clip_norm: float = Field(default=1.0, gt=0)
    """C. The automatic kinds only rescale the learning rate with it."""
    clip_gamma: float = Field(default=0.01, gt=0)
    """gamma of auto-s."""
    noise_mode: Literal["auto", "split", "rank0", "replicated", "local"] = "auto"
    """auto: ``split`` where only the mean gradient is used, ``local`` elsewhere."""
    noise_seed: int | None = None
    """Makes noise and coins repeatable, for tests: the run is then NOT PRIVATE, and says so."""
    show_nonprivate: bool = False
    """Log figures of the training examples, which no epsilon covers, as ``nonprivate_...``."""

    _comm: Communicator = PrivateAttr()
    _mode: NoiseMode = PrivateAttr(default="split")
    _noise: SecretNoise = PrivateAttr()
    _clip: AnyClip = PrivateAttr()
    _ledger: Ledger = PrivateAttr()
    _sizes: list[float] = PrivateAttr()  # what each rank's sum is divided by
    _expected: list[float] = PrivateAttr()  # of the hosted ranks
    _examples: int = PrivateAttr(default=0)
    _unit: str = PrivateAttr(default="example")
    _seeded: bool = PrivateAttr(default=False)
    _last: RankBatches | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _check_target(self) -> Self:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("write epsilon or noise_multiplier, one of them")
        if self.accountant == "gdp":
            raise ValueError(
                "accountant: gdp is an approximation that can report a ninth of the true epsilon; "
                "use prv or rdp"
            )
        return self

    # --- before the first step --------------------------------------------------------------

    def adapt(self, algorithm: Algorithm) -> None:
        """Choose where the noise goes by what the algorithm does with gradients.

        Raises:
            ConfigError: a mode that protects the mean only, under an algorithm that shows more.
        """
        self.inner.adapt(algorithm)
        central = algorithm.uses == "mean"
        if self.noise_mode == "auto":
            self._mode = "split" if central else "local"
            return
        if self.noise_mode != "local" and not central:
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
        sizes = [len(shard) for shard in problem.shards]
        if problem.mixes_examples:
            raise ConfigError(
                "task.standardize: the mean and spread of all examples are in each of them, which "
                "dp does not protect; scale by public constants (task.normalize), and leave it out"
            )
        if not sizes:
            raise ConfigError("oracle: dp needs a finite dataset, the task is a stream")
        # A resolved configuration spells the default out: it stands for the coins of dp.
        field = type(self.inner).model_fields.get("sampling")
        if plan.sampling not in ("full", "poisson", field and field.default):
            raise ConfigError(
                f"oracle.sampling: {plan.sampling} batches have no Poisson accounting, which dp "
                "needs; leave it out (coins are tossed for each example), or 'full'"
            )
        self._examples = max(sizes) if self._mode == "local" else sum(sizes)
        delta = accounting.default_delta(self._examples) if self.delta is None else self.delta
        accounting.check_delta(delta, self._examples)
        self._clip = make_clip(
            self.clip, self.clip_norm, self.clip_gamma, len(self.inner.layout.slices)
        )
        if self.clip == "adaptive" and self._mode == "local" and comm.n > 1:
            raise ConfigError(
                "oracle.clip: adaptive counts over all ranks, which local noise does not protect; "
                "use flat or auto-s"
            )
        self._noise = SecretNoise(self._mode, comm, self.noise_seed)
        self._seeded = self.noise_seed is not None
        planned, rates = self._plan(plan, sizes)
        self._ledger = Ledger(rates, delta, self.accountant, self.epsilon)
        return planned

    def _plan(self, plan: DataPlan, sizes: list[int]) -> tuple[DataPlan, list[float]]:
        """Fix what sums are divided by; return how to draw, and every rank's q."""
        comm, total = self._comm, sum(sizes)
        if plan.sampling == "full":
            local = self._mode == "local"
            self._sizes = [float(size) if local else total / comm.n for size in sizes]
            self._expected = [self._sizes[r] for r in comm.ranks]
            return plan, [1.0] * comm.n
        if self._mode == "local":
            rates = [plan.batch_size / size for size in sizes]
        else:
            rates = [plan.batch_size * comm.n / total] * comm.n
        if max(rates) > 1:
            raise ConfigError(
                f"oracle.batch_size: {plan.batch_size} per rank is more than the "
                f"{self._examples} examples hold; use 'sampling: full'"
            )
        self._sizes = [float(plan.batch_size)] * comm.n
        self._expected = self._sizes[: comm.local]
        drawn = DataPlan(
            batch_size=plan.batch_size,
            sampling="poisson",
            indices=plan.indices,
            rate=None if self._mode == "local" else rates[0],
            seed_of=lambda rank: self._noise.coin_seed(rank),  # of the keys at the time
        )
        return drawn, rates

    def start(self, steps: int | None, draws: int) -> None:
        """Find sigma, and compare the ranks' noise; exchanges messages."""
        self.inner.start(steps, draws)
        self._find_sigma(None if steps is None else steps * draws)
        self._noise.agree(self.inner.layout)

    def restart(self, calls: int | None) -> None:
        """Find sigma for the releases to come, of which there is none yet; exchanges messages.

        Raises:
            ConfigError: there were releases, with a sigma found for another number of them.
        """
        self.inner.restart(calls)
        ledger = self._ledger
        if calls == ledger.planned:
            return
        if self.epsilon is not None and ledger.history:
            raise ConfigError(
                f"oracle.epsilon: sigma was found for {ledger.planned} gradients, some of which "
                "are released, and cannot be found anew; use noise_multiplier"
            )
        self._find_sigma(calls)

    def _find_sigma(self, releases: int | None) -> None:
        """Fix the number of releases, and sigma."""
        ledger = self._ledger
        ledger.planned = releases
        if self.noise_multiplier is not None:
            ledger.sigma = self.noise_multiplier
            return
        found = ledger.calibrated(releases)
        row = torch.full((self._comm.local, 1), found, dtype=torch.float64)
        ledger.sigma = float(self._comm.broadcast(row.to(self._comm.device), count=False))

    # --- a step -----------------------------------------------------------------------------

    @property
    def weighting(self) -> Literal["ranks", "examples"]:
        """Examples count alike under central noise; ranks where each protects its own."""
        return "ranks" if self._mode == "local" else "examples"

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
        self._check_release(batch, sink)
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
        comm, layout, bound = self._comm, self.inner.layout, self._clip.sensitivity
        secret_of = self._noise.coin_seed
        found = self.inner.clipped(x, batch, self._clip, combine=points, secret_of=secret_of)
        scales = self._noise.scales(sigma * bound)
        self._noise.add_(found.grad, layout, self._ledger.releases, scales)
        self._ledger.count()
        factors = torch.tensor([[1 / size] for size in self._expected], dtype=torch.float64)
        grad = combine([(factors, found.grad)], out=found.grad)
        # What the optimizer may know: sigma C / B, in a row (the noisiest) and in the mean of all.
        n, whole = comm.n, [(sigma * bound / size) ** 2 for size in self._sizes]
        if self._mode == "local":
            row, mean = max(whole), sum(whole) / n**2
        else:
            mean = whole[0] / n**2
            row = {"split": mean * n, "rank0": whole[0], "replicated": mean}[self._mode]
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
        """Release the gradient and the noisy count that moves C, for the price of one sigma.

        sigma_g^-2 + (2 sigma_b)^-2 = sigma^-2 (arXiv:1905.03871, theorem 1), sigma_b = B / 20.
        """
        assert isinstance(self._clip, AdaptiveClip)
        comm, sigma, expected = self._comm, self._ledger.sigma, self._expected[0] * self._comm.n
        count_std = expected / 20
        rest = sigma**-2 - (2 * count_std) ** -2 if sigma > 0 else math.inf
        if rest <= 0:
            raise ConfigError(
                f"oracle.clip: adaptive counts with noise {count_std:g} for an expected batch of "
                f"{expected:g}, too little for sigma = {sigma:g}; use a larger batch_size"
            )
        number = self._ledger.releases
        estimate = self._release(x, batch, points, rest**-0.5)
        row = torch.zeros(comm.local, 1, dtype=torch.float64)
        row[0] = self._clip.unclipped
        if 0 in comm.ranks:
            row[0] += self._noise.scalar(number) * (count_std if sigma > 0 else 0.0)
        total = comm.all_reduce(row.to(comm.device), "sum")
        self._clip.move(float(total), expected)
        return estimate

    def _check_release(self, batch: RankBatches, sink: Sink | None) -> None:
        if sink is not None:
            raise ConfigError(
                "oracle: dp needs whole gradients to bound them; no per-layer updates"
            )
        if batch is self._last and min(self._ledger.rates) < 1:
            raise ConfigError(
                "oracle: the algorithm takes two gradients of one batch, which the privacy of "
                "Poisson sampling does not count; use an algorithm with one gradient per batch"
            )
        self._last = batch
        self._ledger.require_room()

    # --- what a resume needs, and what the report says ---------------------------------------

    def own_state(self) -> dict[str, Tensor]:
        """Return the secret keys, C, the releases so far and what they depend on."""
        local, norm = self._comm.local, getattr(self._clip, "norm", self.clip_norm)
        return {
            "keys": self._noise.keys.clone(),
            "clip_norm": torch.full((local, 1), norm, dtype=torch.float64),
            **self._ledger.state(local),
            "seeded": torch.full((local, 1), int(self._seeded), dtype=torch.int64),
            "facts": self._facts(),
        }

    def _facts(self) -> Tensor:
        """Return what epsilon is counted with besides sigma: (local, 4) float64."""
        mode = ["split", "rank0", "replicated", "local"].index(self._mode)
        ledger = self._ledger
        rows = [[ledger.rates[r], ledger.delta, self._examples, mode] for r in self._comm.ranks]
        return torch.tensor(rows, dtype=torch.float64)

    def load_own_state(self, state: dict[str, Tensor]) -> None:
        """Go on with the same noise.

        Raises:
            ConfigError: the checkpoint does not say what was released before, or the releases to
                come would not compose with it.
        """
        if not {"history", "keys", "facts"} <= state.keys():
            raise ConfigError(
                "resume: the checkpoint has no history of private releases, so that nobody knows "
                "the epsilon spent; start from its parameters instead, in a new run"
            )
        before, now = state["facts"], self._facts()
        if not torch.equal(before, now):
            raise ConfigError(
                "resume: rate, delta, number of examples and noise_mode are "
                f"{before[0].tolist()} in the checkpoint and {now[0].tolist()} now, so that no one "
                "epsilon holds for both parts; keep batch_size, delta, the data and noise_mode, or "
                "start a new run"
            )
        self._ledger.load(state)
        self._noise.keys = state["keys"].clone()
        self._seeded = self._seeded or bool(state["seeded"][0])
        if isinstance(self._clip, AdaptiveClip):
            self._clip.norm = float(state["clip_norm"][0])

    def branch(self) -> None:
        """Take new secrets: this run may go on otherwise than the one that was saved."""
        self.inner.branch()
        self._noise = SecretNoise(self._mode, self._comm, self.noise_seed)
        self._noise.agree(self.inner.layout)

    def spent(self, rank: int = 0) -> float:
        """Return the epsilon spent so far, on the examples of ``rank`` under local noise."""
        return self._ledger.spent(rank)

    def statement(self) -> dict[str, Any]:
        """Return the privacy statement of the run, under ``privacy``."""
        ledger = self._ledger
        worst, rates = ledger.worst, ledger.rates
        said = PrivacyStatement(
            epsilon=ledger.spent(worst),
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
            ranks=self._comm.n,
            segments=tuple((s.noise_multiplier, s.rate, s.steps) for s in ledger.segments(worst)),
        )
        return {**self.inner.statement(), "privacy": said.as_dict()}
