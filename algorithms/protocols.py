"""What users plug in: oracles, optimizers and algorithms, and what passes between them.

Shapes: ``local`` ranks are hosted by this process, a row has ``d`` elements.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

from pydantic import Field, PrivateAttr
from torch import Tensor

from gossamer.algorithms.conditions import require_doubly_stochastic, require_form
from gossamer.algorithms.estimates import (
    Clip,
    Directions,
    Estimate,
    Metrics,
    Sink,
    TrainingFigures,
)
from gossamer.algorithms.optimizers.base import Optimizer
from gossamer.algorithms.problems import Batches, DataPlan, Problem, RankBatches
from gossamer.runtime.communicator import Communicator
from gossamer.runtime.component import Component
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.rows import RowLayout
from gossamer.topologies import Topology

__all__ = ["Algorithm", "Optimizer", "Oracle", "State"]

# --- oracles --------------------------------------------------------------------------------


class Oracle(Component, ABC):
    """Turns (parameters, batch) into a loss and a gradient estimate, per hosted rank."""

    name: str = ""
    form: ClassVar[Literal["row", "directions", "stream"]] = "row"
    """What ``grad`` of a call is: a row, Directions, or slices handed to the sink."""

    @abstractmethod
    def setup(self, comm: Communicator, problem: Problem) -> DataPlan:
        """Get ready for a problem, once, before the first call.

        Raises:
            ConfigError: this oracle cannot serve this problem.
        """

    def adapt(self, algorithm: Algorithm) -> None:
        """Get to know the algorithm, before ``setup``; may be called again.

        Raises:
            ConfigError: the two do not go together; says why, and the way out.
        """

    def start(self, steps: int | None, draws: int) -> None:
        """Get ready to be called; every process calls it once, and may exchange messages in it.

        Args:
            steps: of the run; None when open-ended.
            draws: batches per step, each for one call.

        Raises:
            ConfigError: what was asked for cannot be had in so many calls.
        """

    def restart(self, calls: int | None) -> None:
        """Start anew in the middle of a run; every process calls it, and may exchange messages.

        What was kept of former gradients is dropped: from now on they come from another source.

        Args:
            calls: how many are to come until the end of the run; None when open-ended.

        Raises:
            ConfigError: what was asked for cannot be had in so many calls.
        """

    def branch(self) -> None:
        """Go on otherwise than the run that was resumed might; every process calls it.

        After ``load_state_dict``, where the configuration or the folder is another: secrets that
        both would use are drawn anew.
        """

    @property
    @abstractmethod
    def layout(self) -> RowLayout:
        """How the problem's module lies in a row; valid after ``setup``."""

    @property
    def weighting(self) -> Literal["ranks", "examples"] | None:
        """What the mean f of its gradients runs over; None: as the problem says."""
        return None

    @property
    def backpropagates(self) -> bool:
        """Whether it has memory for a gradient and its graph, so that an evaluation has, too."""
        return True

    @property
    def examples_at_once(self) -> int | None:
        """How many examples a forward pass may take; None: it need not be said."""
        return None

    @property
    def training_figures(self) -> TrainingFigures:
        """How the log takes figures of the training examples, which no privacy covers."""
        return "open"

    @property
    def remembers(self) -> str | None:
        """What it keeps of examples from step to step, in the plural, for whoever would lose it."""
        return None

    def take_over(self, state: Mapping[str, Tensor]) -> bool:
        """Go on with what another number of ranks remembers of examples, if that is possible.

        Args:
            state: their ``state_dict``, with a row for each of them.

        Returns:
            Whether it is.
        """
        return False

    @property
    def keeps_whole(self) -> str | None:
        """Why a ``sink`` would save no memory; None: it gets gradients as they are made."""
        return f"{self.name} gives whole gradients"

    @abstractmethod
    def __call__(
        self,
        x: Tensor,
        batch: RankBatches,
        *,
        combine: Sequence[tuple[float, Tensor]] | None = None,
        sink: Sink | None = None,
    ) -> Estimate:
        """Estimate the gradient at x (local, d) on one batch per hosted rank.

        Args:
            x: one row per hosted rank; kept.
            batch: one batch per hosted rank.
            combine: [(c_k, x_k)]: estimate sum_k c_k grad f_i(x_k) on the same examples instead
                (the loss is still at ``x``).
            sink: called per slice of the row, in one order on all ranks, instead of holding a row;
                may change x in those columns. ``grad`` is None then.
        """

    @property
    def noise_strategy(self) -> tuple[float, ...] | None:
        """First column of K, where the noise of its calls is K^-1 times white noise.

        Row t goes to call t since it started anew; None: independent from call to call.
        """
        return None

    @property
    def recipe(self) -> dict[str, Any] | None:
        """What makes the directions of its Probes, for who makes them again.

        Numbers and text; complete after ``setup``. None: it gives none, or not of whole rows,
        numbered anew each step.
        """
        return None

    def require_clipped(self) -> None:
        """Get ready for ``clipped``, after ``setup``.

        Raises:
            ConfigError: this oracle has no gradients of single examples.
        """
        if type(self).clipped is Oracle.clipped:
            raise ConfigError(
                f"oracle: {self.name} has no gradients of single examples, which privacy bounds "
                "one by one; put dp around backprop"
            )

    def deferred(
        self,
        x: Tensor,
        batch: RankBatches,
        *,
        combine: Sequence[tuple[float, Tensor]] | None = None,
    ) -> Estimate:
        """Estimate as the call does; the gradient may be Directions instead of rows.

        For callers that only hand it to ``Optimizer.apply_``, before the next call: what is not
        written down yet can be added to x in the pass that makes it.
        """
        return self(x, batch, combine=combine)

    def sweep_over(self, x: Tensor, batch: RankBatches) -> Iterator[Estimate]:
        """Yield the estimates of one step, each at x as it is by then: the caller moves x between.

        One ``deferred`` estimate, unless the oracle takes the parameters block by block.
        """
        yield self.deferred(x, batch)

    def clipped(
        self,
        x: Tensor,
        batch: RankBatches,
        clip: Clip,
        *,
        combine: Sequence[tuple[float, Tensor]] | None = None,
        secret_of: Callable[[int], int] | None = None,
    ) -> Estimate:
        """Return the *sum* over each rank's examples of their gradients, each bounded by ``clip``.

        What privacy wraps. ``grad`` is float32 at least, whatever the rows are, and reused by the
        next call; ``weight`` counts examples.

        Args:
            x: one row per hosted rank; kept.
            batch: one batch per hosted rank; one without examples gives zeros.
            clip: bounds an example's gradient.
            combine: [(c_k, x_k)]: of each example sum_k c_k grad f(x_k), formed before the bound.
            secret_of: rank -> seed of what the forward passes draw, where a mask that is known
                would tell which examples a batch has.

        Raises:
            ConfigError: this oracle has no gradients of single examples.
        """
        self.require_clipped()
        raise NotImplementedError(f"{type(self).__name__}.clipped")

    @abstractmethod
    def loss(self, x: Tensor, batch: RankBatches) -> Tensor:
        """Return the losses at x, (local,) float64, without a gradient."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resume needs beyond (seed, step): tensors (local, ...)."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state_dict`` returned."""

    def statement(self) -> dict[str, Any]:
        """Return what a run's summary and report must say about its gradients, by heading."""
        return {}


# --- algorithms -----------------------------------------------------------------------------


class State(Protocol):
    """A dataclass of tensors (local, ...), numbers and nested states: what a resume needs."""

    @property
    def x(self) -> Tensor:
        """The parameters to evaluate, (local, d)."""
        ...


class Algorithm(Component, ABC):
    """Who averages what with whom: ``init`` and ``step``, per rank.

    A step function uses row-wise arithmetic and the communicator only; then it runs unchanged with
    one rank per process or with all of them in one.
    """

    name: str = ""
    takes: ClassVar[frozenset[str]] = frozenset({"row"})
    """The forms of oracle it takes; another is refused."""
    uses: ClassVar[Literal["rows", "mean"]] = "rows"
    """What of the oracle's gradients leaves a rank: each rank's own, or the mean over all alone."""
    sends: ClassVar[str] = "what its algorithm exchanges"
    """What leaves a rank in a step, in words; a private run's report says it."""
    sweeps: ClassVar[bool] = False
    """Whether it takes ``Oracle.sweep_over``, and moves x between its estimates."""
    follows_graph: ClassVar[bool] = False
    """Whether its state is of no use on another graph, where it admits several in turn."""
    optional_optimizer: ClassVar[bool] = False
    """Whether it runs with and without an ``optimizer`` section."""
    objective: ClassVar[Literal["ranks", "examples"] | None] = None
    """What f is under this algorithm when the user says nothing; None: the task's choice."""
    optimizer: Optimizer | None = Field(default=None, exclude=True)
    """Filled from the section ``optimizer``; required where the rule leaves the update open."""
    _taken: Callable[[Directions], object] | None = PrivateAttr(default=None)

    @property
    def defers(self) -> bool:
        """Whether its optimizer is given what ``Oracle.deferred`` gives, Directions maybe."""
        return False

    @property
    def batches_per_step(self) -> int:
        """Draws of one step: the number of local updates inside it."""
        return 1

    @property
    def rounds_per_step(self) -> int:
        """How far the schedule's round t moves after a step."""
        return 1

    @property
    def streams(self) -> bool:
        """Whether it calls the oracle with a ``sink``, and never holds a whole gradient."""
        return False

    def adapt(self, topology: Topology) -> Topology:
        """Return the topology to run on: the given one, or its lazy form with a warning.

        Raises:
            ConfigError: the condition on W fails; names the condition and the way out.
        """
        return require_doubly_stochastic(self.name, topology)

    def require(self, oracle: Oracle) -> None:
        """Get to know the outermost oracle, before its ``setup``; may be called again.

        Raises:
            ConfigError: its estimates are of no use here; says why, and the way out.
        """
        require_form(self, oracle)

    def mean_delay(self, topology: Topology) -> int | None:
        """Return after how many steps all ranks apply the mean of their estimates, alike.

        None: each rank makes updates of its own.
        """
        return None

    def keeps_equal(self, topology: Topology) -> bool:
        """Say whether all ranks hold the same parameters at every step, to the bit."""
        return self.mean_delay(topology) is not None

    def watch(self, taken: Callable[[Directions], object]) -> None:
        """Call ``taken`` with each mean that all ranks apply alike, where that is Directions."""
        self._taken = taken

    def _tell(self, mean: Directions) -> None:
        if self._taken is not None:
            self._taken(mean)

    @abstractmethod
    def init(self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches) -> Any:
        """Return the state that starts at x (local, d), equal rows unless resumed.

        ``batches`` are those of step 0, which the first ``step`` is given again.
        """

    @abstractmethod
    def step(self, comm: Communicator, oracle: Oracle, state: Any, batches: Batches) -> Metrics:
        """Make one step in place and return its figures."""
