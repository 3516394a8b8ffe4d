"""How a private run draws its batches, and what its sums are divided by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gossamer.algorithms.problems import DataPlan, Problem
from gossamer.algorithms.protocols import Oracle
from gossamer.runtime.errors import ConfigError

__all__ = ["SamplingPlan", "require_countable"]


def require_countable(plan: DataPlan, inner: Oracle, problem: Problem) -> None:
    """Refuse batches that no accounting covers.

    Raises:
        ConfigError: the task is a stream, or the oracle inside was told another sampling, or an
            example's inputs have others in them.
    """
    if problem.mixes_examples:
        raise ConfigError(
            "task.standardize: the mean and spread of all examples are in each of them, which dp "
            "does not protect; scale by public constants (task.normalize), and leave it out"
        )
    if not problem.shards:
        raise ConfigError("oracle: dp needs a finite dataset, the task is a stream")
    # A resolved configuration spells the default out: it stands for the coins of dp.
    field = type(inner).model_fields.get("sampling")
    if plan.sampling not in ("full", "poisson", field and field.default):
        raise ConfigError(
            f"oracle.sampling: {plan.sampling} batches have no Poisson accounting, which dp "
            "needs; leave it out (coins are tossed for each example), or 'full'"
        )


@dataclass(frozen=True)
class SamplingPlan:
    """Public constants of the sampling.

    Attributes:
        plan: how to draw.
        rates: per rank, q: the expected batch over the examples it is drawn from.
        divisors: per rank, what its sum is divided by; a constant, whatever the batch.
    """

    plan: DataPlan
    rates: list[float]
    divisors: list[float]

    @classmethod
    def of(
        cls,
        plan: DataPlan,
        sizes: list[int],
        each: bool,
        seed_of: Callable[[int], int],
        bands: int = 1,
    ) -> SamplingPlan:
        """Plan for shards of ``sizes``.

        Args:
            plan: of the oracle inside.
            sizes: examples of each rank.
            each: whether each rank answers for its own examples, with a rate of its own; else the
                union of the batches is one draw at one rate.
            seed_of: rank -> secret seed of its coins.
            bands: of correlated noise: every shard is split into so many blocks, which take turns
                at ``bands`` times the rate, so that the expected batch stays what it is (but for
                blocks that differ by one example).

        Raises:
            ConfigError: a batch is expected to have more examples than there are.
        """
        n, total = len(sizes), sum(sizes)
        if plan.sampling == "full":
            if bands > 1:
                raise ConfigError(
                    "oracle.sampling: full takes every example at every step, and correlated noise "
                    f"needs {bands} steps between two; leave sampling out, or correlation"
                )
            return cls(plan, [1.0] * n, [float(s) if each else total / n for s in sizes])
        rates = [plan.batch_size / s for s in sizes] if each else [plan.batch_size * n / total] * n
        if max(rates) > 1:
            raise ConfigError(
                f"oracle.batch_size: {plan.batch_size} per rank is more than the "
                f"{min(sizes) if each else total} examples hold; use 'sampling: full'"
            )
        if bands * max(rates) > 1 + 1e-12:  # rounding aside: a batch may be a whole block
            raise ConfigError(
                f"oracle.correlation.bands: {bands} blocks would take each example of a block with "
                f"probability {bands} * {max(rates):.4g}, must be at most 1; use at most "
                f"{int(1 / max(rates) + 1e-12)} bands, or a smaller batch_size"
            )
        if min(sizes) < bands:
            raise ConfigError(
                f"oracle.correlation.bands: {bands} blocks of {min(sizes)} examples, of which a "
                "rank has no more; use fewer bands, or fewer ranks"
            )
        drawn = DataPlan(
            batch_size=plan.batch_size,
            sampling="poisson",
            indices=plan.indices,
            rate=None if each else rates[0],
            seed_of=seed_of,
            blocks=bands,
        )
        return cls(drawn, rates, [float(plan.batch_size)] * n)
