"""What algorithms share whose rule fixes the local update: a plain gradient and a rate."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator
from torch import Tensor

from gossamer.algorithms.estimates import Estimate
from gossamer.algorithms.optimizers.sgd import SGD
from gossamer.algorithms.problems import RankBatches
from gossamer.algorithms.protocols import Algorithm, Oracle
from gossamer.runtime import Communicator

__all__ = ["FixedRule"]


class FixedRule(Algorithm):
    """An algorithm whose update is its own: the optimizer gives it a rate and a weight decay."""

    optimizer: SGD = Field(exclude=True)
    """Learning rate, schedule and weight decay: {name: sgd, lr: ...}; the rule does the rest."""

    @field_validator("optimizer", mode="before")
    @classmethod
    def _only_sgd(cls, value: Any) -> Any:
        name = getattr(value, "name", None)
        if name not in (None, "sgd"):
            raise ValueError(
                f"{cls.model_fields['name'].default} has an update rule of its own and takes from "
                f"the optimizer the rate only, so '{name}' would have no effect; use optimizer: "
                "{name: sgd, lr: ...}, or an algorithm that takes any optimizer: dsgd, "
                "gradient-tracking, all-reduce"
            )
        return value

    def estimate(
        self, comm: Communicator, oracle: Oracle, x: Tensor, batch: RankBatches
    ) -> tuple[Estimate, Tensor]:
        """Return the oracle's estimate at x, and its gradient g with weight decay, (local, d)."""
        found = oracle(x, batch)
        return found, self.optimizer.direction(None, x, found.grad, comm, found.origin)
