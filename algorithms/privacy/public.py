"""``public``: some of the examples are public, and train without noise (arXiv:2402.18752)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, PrivateAttr, field_validator, model_validator
from torch import Tensor

from gossamer.algorithms.estimates import Estimate, Origin, Sink
from gossamer.algorithms.oracles.wrapper import OracleWrapper
from gossamer.algorithms.privacy.dp import DP
from gossamer.algorithms.privacy.public_schedule import Mix, Patience, mean_loss, public_weight
from gossamer.algorithms.privacy.public_split import PublicSplit, split_public
from gossamer.algorithms.problems import Batch, DataPlan, Problem, RankBatches
from gossamer.algorithms.protocols import Oracle
from gossamer.algorithms.sampling import Sampler
from gossamer.runtime import Communicator, ConfigError
from gossamer.runtime import combine as weighted
from gossamer.runtime.random import derive_key
from gossamer.runtime.rows import empty_rows

__all__ = ["PublicData"]


class PublicData(OracleWrapper):
    """Splits the training set in public P and private Q: P trains as it is, Q through ``dp``.

    ``mix: switch`` is continual pre-training (DP-CPT, arXiv:2402.18752): P alone first, then Q
    alone. While P trains no private gradient is taken and nothing is released; at the switch sigma
    is found for the steps that remain, filters inside start anew, and so do first moments of the
    optimizer (second moments, step counts and the learning rate go on). When to switch depends on
    public examples alone, so it costs no privacy. The other mixes are baselines: alpha_t g_P +
    (1 - alpha_t) g_Q, see ``public_weight``.

    P and Q are disjoint; epsilon, delta, rate and the expected batch are those of Q. Outermost, or
    below a filter, which then filters both kinds of gradients and starts anew at the switch. Under
    ``dpmd`` keep filters of correlated noise inside: its size changes from step to step, which none
    outside expects.

    A public step costs a gradient of the oracle inside ``dp``; the batch that was drawn from Q for
    this step is not looked at. Under ``patience`` all ranks exchange two numbers an evaluation.
    """

    name: Literal["public"] = "public"
    fraction: float | None = Field(default=None, gt=0, lt=1)
    """Share of the training examples that is public. Write this, or a file of ``indices``."""
    indices: str | None = None
    """Which are public; None: chosen by the run's seed, ``first``: the first ones, else a file of
    places in the training set: one a line, or a .npy array."""
    mix: Mix = "switch"
    """How public and private gradients go together."""
    switch: Literal["patience"] | Annotated[float, Field(gt=0, lt=1)] = "patience"
    """When: ``patience``, once the loss on held-out public examples stops falling; or after this
    share of the steps."""
    patience: int = Field(default=3, ge=1)
    """Evaluations in a row without a new lowest loss that make the switch."""
    evaluate_every: int = Field(default=10, ge=1)
    """Steps between two evaluations."""
    latest: float = Field(default=0.5, gt=0, lt=1)
    """Share of the steps after which the switch comes, however patient: a bound of our own, so that
    private steps remain."""
    validation: float = Field(default=0.2, gt=0, lt=1)
    """Share of the public examples held out for ``patience``."""
    batch_size: int | None = Field(default=None, ge=1)
    """Public examples per rank and gradient; None: as many as private ones, at most all."""
    sampling: Literal["shuffle", "full"] = "shuffle"
    """``shuffle``: epochs over a rank's public examples; ``full``: all of them each time."""
    scale: float = Field(default=1.0, gt=0)
    """What public gradients are multiplied by, as clipped ones are smaller: the ratio of the
    learning rates that suit the two, for optimizers that depend on it."""

    _comm: Communicator = PrivateAttr()
    _problem: Problem = PrivateAttr()
    _split: PublicSplit = PrivateAttr()
    _sampler: Sampler = PrivateAttr()
    _draws: int = PrivateAttr(default=1)
    _factors: Tensor | None = PrivateAttr(default=None)
    _row: Tensor | None = PrivateAttr(default=None)
    _due: int | None = PrivateAttr(default=None)  # the switch's step, at the latest
    _call: tuple[int, int] = PrivateAttr(default=(-1, 0))  # step, and calls before in it
    _drawn: tuple[int, list[list[Batch]]] = PrivateAttr(default=(-1, []))
    _switched: int | None = PrivateAttr(default=None)
    _left: int | None = PrivateAttr(default=None)  # private calls planned at the switch
    _seen: Patience = PrivateAttr(default_factory=Patience)

    @field_validator("inner")
    @classmethod
    def _check_inner(cls, inner: Oracle) -> Oracle:
        layers = _layers(inner)
        if not any(isinstance(layer, DP) for layer in layers):
            raise ValueError(
                "public goes around dp, which makes the gradients of the other examples private; "
                "write oracle: [backprop, {name: dp, epsilon: 1}, {name: public, fraction: 0.05}]"
            )
        if any(isinstance(layer, PublicData) for layer in layers):
            raise ValueError("public stands in the list already; keep one of the two")
        return inner

    @model_validator(mode="after")
    def _check_effects(self) -> Self:
        from_file = self.indices not in (None, "first")
        if (self.fraction is None) != from_file:
            raise ValueError(
                "fraction: write it, or a file of indices (which says itself how many), not both"
            )
        switches = self.mix == "switch"
        patient = switches and self.switch == "patience"
        idle = {
            "switch": None if switches else f"mix: {self.mix}",
            "batch_size": "sampling: full" if self.sampling == "full" else None,
        }
        for name in ("patience", "evaluate_every", "latest", "validation"):
            idle[name] = None if patient else f"switch: {self.switch}" if switches else "that mix"
        if self.mix == "only-private":
            idle |= dict.fromkeys(("batch_size", "sampling", "scale"), "mix: only-private")
        for name, reason in idle.items():
            # Not model_fields_set: a run's config.yaml spells every default out.
            if reason and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: has no effect with {reason}; leave it out")
        return self

    @property
    def held_out(self) -> float:
        """Share of the public examples that does not train."""
        return self.validation if self.mix == "switch" and self.switch == "patience" else 0.0

    @property
    def _base(self) -> Oracle:
        return _layers(self.inner)[0]

    # --- before the first step --------------------------------------------------------------

    def setup(self, comm: Communicator, problem: Problem) -> DataPlan:
        """Split the examples, and set the inner oracles up for the private ones."""
        if not problem.shards:
            raise ConfigError("oracle: public needs a finite dataset, the task is a stream")
        if problem.uneven:
            raise ConfigError(
                "oracle: public weighs shards by their examples, but those of this task differ in "
                "tokens; use examples of one length, or dp without public"
            )
        self._comm, self._problem = comm, problem
        self._split = split = split_public(
            problem.shards, comm.seed.value, self.fraction, self.indices, self.held_out
        )
        plan = self.inner.setup(comm, replace(problem, shards=split.private))
        most = min(map(len, split.training))
        public = DataPlan(self.batch_size or min(plan.batch_size, most), self.sampling)
        self._sampler = Sampler(
            replace(problem, shards=split.training),
            public,
            comm.ranks,
            derive_key(comm.seed.value, "public/batches"),
        )
        self._factors = self._row_factors()
        if self.mix in ("dpmd", "sample"):
            layout = self.layout
            self._row = empty_rows(comm.local, layout.d, layout.dtype, comm.device)
        return replace(plan, shards=split.private)

    def _row_factors(self) -> Tensor | None:
        """Return what the base's public rows are multiplied by, (local, 1); None: all by 1.

        The base was set up for Q: where its f runs over examples, rows count by their shard of Q.
        """

        def shares(parts: Sequence[np.ndarray], weighting: str | None) -> list[float]:
            whole = sum(map(len, parts)) / len(parts)
            return [len(part) / whole if weighting == "examples" else 1.0 for part in parts]

        weighting = self.inner.weighting or self._problem.objective
        wanted = shares(self._split.training, weighting)
        given = shares(self._split.private, self._base.weighting or self._problem.objective)
        factors = [self.scale * a / b for a, b in zip(wanted, given, strict=True)]
        if all(factor == 1.0 for factor in factors):
            return None
        return torch.tensor([[factors[rank]] for rank in self._comm.ranks], dtype=torch.float64)

    def start(self, steps: int | None, draws: int) -> None:
        """Start the inner oracles for the private steps, as far as these are known.

        Under ``patience`` they may be any number: sigma is first found for all, which shows that it
        can be found, and anew at the switch.
        """
        self._draws = draws
        if steps is None and (self.mix == "dpmd" or (self.mix == "switch" and self._is_timed)):
            what = "mix: dpmd" if self.mix == "dpmd" else "switch: a share of the steps"
            raise ConfigError(f"oracle: public, {what} needs a number of steps; add 'steps: ...'")
        if self.mix != "switch" or steps is None:
            self.inner.start(steps, draws)
            return
        share = self.latest if self.switch == "patience" else self.switch
        self._due = round(share * steps)
        if not 0 < self._due < steps:
            field = "latest" if self.switch == "patience" else "switch"
            raise ConfigError(
                f"oracle.{field}: {share:g} of {steps} steps leaves {self._due} public and "
                f"{steps - self._due} private ones; both need one at least: use more steps, or "
                "mix: only-public or only-private"
            )
        self.inner.start(steps - self._due if self._is_timed else steps, draws)

    @property
    def _is_timed(self) -> bool:
        return self.switch != "patience"

    # --- a step -----------------------------------------------------------------------------

    def __call__(
        self,
        x: Tensor,
        batch: RankBatches,
        *,
        combine: Sequence[tuple[float, Tensor]] | None = None,
        sink: Sink | None = None,
    ) -> Estimate:
        """Return the public gradient, the private one, or both mixed; its row is reused."""
        if sink is not None:
            raise ConfigError(f"oracle: {self.keeps_whole}; no per-layer updates")
        step, calls = self._call
        self._call = (self._comm.step, calls + 1 if step == self._comm.step else 0)
        weight, is_new = self._weight(x)
        if weight == 0:
            return self._marked(self.inner(x, batch, combine=combine), is_new)
        public = self._public(x, combine)
        if weight == 1:
            return public
        assert self._row is not None, "made for this mix"
        self._row.copy_(public.grad)  # the inner oracles share one row
        private = self.inner(x, batch, combine=combine)
        rest = 1.0 - weight
        return replace(
            private,
            grad=weighted([(weight, self._row), (rest, private.grad)], out=self._row),
            origin=private.origin.scaled(rest**2),
            mean_origin=private.mean_origin.scaled(rest**2),
            metrics={**private.metrics, **public.metrics},
        )

    def _weight(self, x: Tensor) -> tuple[float, bool]:
        """Return alpha_t, and whether the source of gradients changes with this call."""
        comm = self._comm
        if self.mix != "switch":
            private, public, _ = self._split.sizes
            return public_weight(self.mix, comm.step, comm.steps, public, private), False
        if self._switched is not None:
            return 0.0, False
        if not self._is_due(x):
            return 1.0, False
        self._switched = comm.step
        self._left = None if comm.steps is None else (comm.steps - comm.step) * self._draws
        self.inner.restart(self._left)
        return 0.0, True

    def _is_due(self, x: Tensor) -> bool:
        """Say whether private steps begin here; the same on every rank."""
        step, calls = self._call
        if self._due is not None and step >= self._due:
            return True
        if self._is_timed or calls > 0 or step == 0 or step % self.evaluate_every:
            return False
        held_out = self._split.validation
        self._seen.take(mean_loss(self._comm, self._problem, self._base, x, held_out))
        return self._seen.stale >= self.patience

    def _public(self, x: Tensor, points: Sequence[tuple[float, Tensor]] | None) -> Estimate:
        step, calls = self._call
        if self._drawn[0] != step:
            self._drawn = (step, self._sampler.batches(step, self._draws))
        # An algorithm that calls more often than it has draws takes two gradients of one batch.
        batches = self._drawn[1][calls % self._draws]
        found = self._base(x, batches, combine=points)
        if self._factors is not None:
            found.grad = weighted([(self._factors, found.grad)], out=found.grad)
        figures: dict[str, Tensor | float] = {**found.metrics, "public_loss": found.loss}
        if not math.isnan(self._seen.last):
            figures["public_validation_loss"] = self._seen.last
        known = Origin(noise_var=0.0)  # public gradients get no noise
        return replace(found, metrics=figures, origin=known, mean_origin=known)

    def _marked(self, estimate: Estimate, is_new: bool) -> Estimate:
        """Let the optimizer know where the gradients begin to come from elsewhere."""
        if not is_new:
            return estimate
        return replace(
            estimate,
            origin=replace(estimate.origin, restart=True),
            mean_origin=replace(estimate.mean_origin, restart=True),
        )

    # --- what a resume needs, and what the report says ---------------------------------------

    def own_state(self) -> dict[str, Tensor]:
        """Return when the switch was, and the evaluations so far."""
        seen = self._seen
        steps = [-1.0 if k is None else float(k) for k in (self._switched, self._left)]
        row = [*steps, seen.last, seen.best, float(seen.stale)]
        return {"switch": torch.tensor([row] * self._comm.local, dtype=torch.float64)}

    def load_own_state(self, state: dict[str, Tensor]) -> None:
        """Go on where the switch stands; after it, find sigma as at the switch."""
        switched, left, last, best, stale = state["switch"][0].tolist()
        self._switched, self._left = (None if k < 0 else int(k) for k in (switched, left))
        self._seen = Patience(last, best, int(stale))
        if self._switched is not None:
            self.inner.restart(self._left)

    def statement(self) -> dict[str, Any]:
        """Add what is public, and what epsilon does not cover."""
        private, training, validation = self._split.sizes
        rule: str | None = None
        if self.mix == "switch":
            rule = f"after {self.switch} of the steps"
            if self.switch == "patience":
                rule = (
                    f"after {self.patience} evaluations of the public validation loss in a row, "
                    f"one in {self.evaluate_every} steps, without a lower one, at the latest after "
                    f"{self.latest} of the steps"
                )
        said = {
            "public_examples": training,
            "public_validation_examples": validation,
            "private_examples": private,
            "chosen": self.indices or "at random, by the run's seed",
            "mix": self.mix,
            "switch": rule,
            "switched_at_step": self._switched,
            "covers": (
                "epsilon refers to the private examples; a record in both parts would be protected "
                "only as if public"
            ),
        }
        shown = {name: value for name, value in said.items() if value is not None}
        return {**self.inner.statement(), "public_data": shown}


def _layers(oracle: Oracle) -> list[Oracle]:
    """Return the oracle and those inside it, innermost first."""
    inside = _layers(oracle.inner) if isinstance(oracle, OracleWrapper) else []
    return [*inside, oracle]
