"""What oracles around another have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from gossamer.algorithms.estimates import TrainingFigures
from gossamer.algorithms.problems import DataPlan, Problem, RankBatches
from gossamer.algorithms.protocols import Algorithm, Oracle
from gossamer.runtime import Communicator, RowLayout

__all__ = ["OracleWrapper"]


class OracleWrapper(Oracle):
    """An oracle around another: it changes batches or gradients and leaves the rest as it is."""

    inner: Oracle = Field(exclude=True)
    """Filled from the entry before it in the list ``oracle``."""

    def setup(self, comm: Communicator, problem: Problem) -> DataPlan:
        """Set the inner oracle up and take its plan."""
        return self.inner.setup(comm, problem)

    def adapt(self, algorithm: Algorithm) -> None:
        """Tell the inner oracle."""
        self.inner.adapt(algorithm)

    def start(self, steps: int | None, draws: int) -> None:
        """Start the inner oracle."""
        self.inner.start(steps, draws)

    def restart(self, calls: int | None) -> None:
        """Restart the inner oracle."""
        self.inner.restart(calls)

    def branch(self) -> None:
        """Branch the inner oracle."""
        self.inner.branch()

    def require_clipped(self) -> None:
        """Ask the inner oracle, too."""
        super().require_clipped()
        self.inner.require_clipped()

    @property
    def layout(self) -> RowLayout:
        """The inner oracle's."""
        return self.inner.layout

    @property
    def weighting(self) -> Literal["ranks", "examples"] | None:
        """The inner oracle's."""
        return self.inner.weighting

    @property
    def backpropagates(self) -> bool:
        """Whether the inner oracle does."""
        return self.inner.backpropagates

    @property
    def examples_at_once(self) -> int | None:
        """The inner oracle's."""
        return self.inner.examples_at_once

    @property
    def training_figures(self) -> TrainingFigures:
        """The inner oracle's."""
        return self.inner.training_figures

    @property
    def remembers(self) -> str | None:
        """The inner oracle's."""
        return self.inner.remembers

    def take_over(self, state: Mapping[str, Tensor]) -> bool:
        """Have the inner oracle do it."""
        return self.inner.take_over(state)

    @property
    def noise_strategy(self) -> tuple[float, ...] | None:
        """The inner oracle's."""
        return self.inner.noise_strategy

    @property
    def buffers(self) -> Any:
        """The inner oracle's buffers, None where it keeps none."""
        return getattr(self.inner, "buffers", None)

    def loss(self, x: Tensor, batch: RankBatches) -> Tensor:
        """Return the inner oracle's losses."""
        return self.inner.loss(x, batch)

    @property
    def _prefix(self) -> str:
        """``NAME.``; ``NAME@2.`` around another of this name, and so on."""
        layer, same = self.inner, 1
        while isinstance(layer, OracleWrapper):
            same += layer.name == self.name
            layer = layer.inner
        return f"{self.name}." if same == 1 else f"{self.name}@{same}."

    def state_dict(self) -> dict[str, Tensor]:
        """Return the inner oracle's state and, under ``NAME.``, this one's ``own_state``."""
        prefix = self._prefix
        own = {f"{prefix}{key}": value for key, value in self.own_state().items()}
        return self.inner.state_dict() | own

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Give each its own."""
        prefix = self._prefix
        self.load_own_state(
            {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
        )
        self.inner.load_state_dict({k: v for k, v in state.items() if not k.startswith(prefix)})

    def own_state(self) -> dict[str, Tensor]:
        """Return what a resume needs of this wrapper: tensors (local, ...)."""
        return {}

    def load_own_state(self, state: dict[str, Tensor]) -> None:
        """Take back what ``own_state`` returned."""

    def statement(self) -> dict[str, Any]:
        """Return what the inner oracle states."""
        return self.inner.statement()
