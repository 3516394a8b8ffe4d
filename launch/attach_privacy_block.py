"""The block ``privacy`` of ``gossamer.attach``."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from gossamer.algorithms.privacy.noise import NoiseMode
from gossamer.algorithms.protocols import Algorithm
from gossamer.runtime import ConfigError
from gossamer.runtime.component import Component

__all__ = ["PrivacyBlock"]


class PrivacyBlock(Component):
    """What a loop of one's own says of its data and its privacy; DPOptimizers say some of it."""

    examples: int = Field(ge=2)
    """N: those that this rank's batches are drawn from; a public constant. Ranks share none."""
    sample_rate: float = Field(gt=0, le=1)
    """q: probability that an example is in the batch of a step."""
    sampler: Literal["poisson", "full", "shuffle"] = "shuffle"
    """How the loop draws, which it answers for: ``poisson``, each example by its own coin (Opacus'
    DPDataLoader, or ``optimizer.gossamer.privacy.draw``); ``full``, all of them; ``shuffle``:
    epsilon is then no guarantee. Coins must be secret, and independent on every rank: a loader that
    draws from torch's generator needs a seed from the operating system on each."""
    steps: int | None = Field(default=None, ge=1)
    """T, of the whole run; needed with ``epsilon``, which holds for so many and no more."""
    epsilon: float | None = Field(default=None, gt=0)
    """Target after ``steps``; gives sigma. Write this or ``noise_multiplier``."""
    noise_multiplier: float | None = Field(default=None, ge=0)
    """sigma: the noise in the sum, in units of the clip norm."""
    delta: float | None = Field(default=None, gt=0, lt=1)
    """Default: N^-1.1 for N examples."""
    accountant: Literal["prv", "rdp", "gaussian"] = "prv"
    """How epsilon is counted."""
    clip: Literal["flat", "auto-s", "auto-v", "per-layer", "reparametrised", "global"] = "flat"
    """How an example's gradient is bounded."""
    clip_norm: float = Field(default=1.0, gt=0)
    """C."""
    clip_gamma: float = Field(default=0.01, gt=0)
    """gamma of auto-s."""
    noise_mode: Literal["auto", "split", "rank0", "replicated", "local"] = "auto"
    """auto: ``split`` where only the mean gradient is used (all-reduce), ``local`` elsewhere."""
    noise_seed: int | None = None
    """Makes noise and coins repeatable, for tests: NOT PRIVATE, and says so."""
    loss_reduction: Literal["mean", "sum"] = "mean"
    """How the loop's loss goes over a batch; the gradient is divided by the expected batch, or not
    at all."""
    unit: str = "example"
    """What one example is: ``document``, ``sequence of 512 tokens``."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("write epsilon or noise_multiplier, one of them")
        if self.epsilon is not None and self.steps is None:
            raise ValueError("epsilon: needs steps, how many the run makes; or noise_multiplier")
        if (self.sampler == "full") != (self.sample_rate == 1):
            raise ValueError(
                "sampler: full means sample_rate 1, and no other does; correct one of the two"
            )
        return self

    def mode(self, algorithm: Algorithm, every: int) -> NoiseMode:
        """Return where the noise goes under the algorithm.

        Raises:
            ConfigError: a mode that protects the mean only, where more is shown.
        """
        central = algorithm.uses == "mean" and every == 1
        if self.noise_mode == "auto":
            return "split" if central else "local"
        if self.noise_mode != "local" and not central:
            why = f"every={every}" if algorithm.uses == "mean" else algorithm.name
            raise ConfigError(
                f"attach: privacy.noise_mode: {self.noise_mode} protects the mean of gradients "
                f"over all ranks, but with {why} ranks see more of each other; use local, or "
                "all-reduce at every step"
            )
        return self.noise_mode
