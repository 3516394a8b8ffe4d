"""What may be written of ``dp``, and what does not go together."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from gossamer.algorithms.oracles.wrapper import OracleWrapper
from gossamer.algorithms.privacy.clipping import ClipKind
from gossamer.algorithms.privacy.correlated_noise import Correlation
from gossamer.algorithms.protocols import Oracle

__all__ = ["DPOptions"]


class DPOptions(OracleWrapper):
    """The fields of ``dp``."""

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
    noise_mode: Literal["auto", "split", "rank0", "replicated", "local", "pairwise"] = "auto"
    """auto: ``split`` where only the mean gradient is used, ``local`` elsewhere; ``pairwise``:
    ``local``, and noise shared with each neighbor that cancels in the mean (DECOR)."""
    pairwise_multiplier: float | None = Field(default=None, gt=0)
    """Noise shared by two neighbors, in units of the clip norm; not counted in epsilon."""
    correlation: Correlation | None = None
    """Noise that later steps partly take back: {name: banded, bands: 8}; None: independent."""
    noise_seed: int | None = None
    """Makes noise and coins repeatable, for tests: the run is then NOT PRIVATE, and says so."""
    show_nonprivate: bool = False
    """Log figures of the training examples, which no epsilon covers, as ``nonprivate_...``."""

    @field_validator("inner")
    @classmethod
    def _check_inner(cls, inner: Oracle) -> Oracle:
        if isinstance(inner, OracleWrapper) and type(inner).clipped is Oracle.clipped:
            raise ValueError(
                f"dp bounds the gradients of single examples, of which {inner.name} hands on none; "
                f"what processes gradients stands behind dp: oracle: [..., dp, {inner.name}]"
            )
        return inner

    @model_validator(mode="after")
    def _check_target(self) -> Self:
        if (self.noise_mode == "pairwise") != (self.pairwise_multiplier is not None):
            raise ValueError(
                "noise_mode: pairwise and pairwise_multiplier go together; write both, or neither"
            )
        if self.correlation is not None and self.clip == "adaptive":
            raise ValueError(
                "clip: adaptive moves C, and correlated noise takes back what was added for the C "
                "of former steps; use flat or auto-s"
            )
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("write epsilon or noise_multiplier, one of them")
        if self.accountant == "gdp":
            raise ValueError(
                "accountant: gdp is an approximation that can report a ninth of the true epsilon; "
                "use prv or rdp"
            )
        return self
