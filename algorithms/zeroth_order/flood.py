"""``flood``: all ranks take the same step, a little late, and send numbers to neighbours alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from gossamer.algorithms.estimates import Metrics
from gossamer.algorithms.problems import Batches
from gossamer.algorithms.protocols import Algorithm, Optimizer, Oracle
from gossamer.algorithms.zeroth_order.dissemination import dissemination
from gossamer.algorithms.zeroth_order.probes import Along, Probes
from gossamer.algorithms.zeroth_order.records import (
    RECORD,
    as_records,
    as_tensor,
    make_records,
    require_own_directions,
)
from gossamer.runtime import Communicator
from gossamer.runtime.messages import Edge
from gossamer.topologies import Topology

__all__ = ["Flood"]


@dataclass
class FloodState:
    """What a rank knows.

    Attributes:
        x: (local, d) parameters, equal rows.
        optimizer: its own state.
        pending: (local, D, n q) float64, the coefficients of the latest D steps, step k since the
            start in row k mod D; NaN where a record has not come yet.
        made: steps since the start.
    """

    x: Tensor
    optimizer: Any
    pending: Tensor
    made: int = 0


class Flood(Algorithm):
    """Delayed exact consensus: every record reaches every rank, then all take the step it is of.

    At step t rank i makes its numbers g for directions of its own (arXiv:2305.17333), as records
    (step, probe, g / q) of 16 bytes, and sends to each neighbour every record that it has neither
    sent to nor received from it. After D exchanges, D the diameter, all ranks have them: all apply
    the mean of step t - (D - 1), in the order of the probes, with any local optimizer. So the rows
    stay equal to the bit on any connected graph, and the run is ``all-reduce`` with gradients that
    are D - 1 steps old; the numbers of the last D - 1 steps are never applied. A set with a number
    that is not finite is skipped, by all.

    On a schedule D is the most rounds that a record needs from any round of the period on.
    """

    follows_graph: ClassVar[bool] = True
    uses: ClassVar[Literal["rows", "mean"]] = "rows"
    objective: ClassVar[Literal["ranks", "examples"] | None] = "examples"
    takes: ClassVar[frozenset[str]] = frozenset({"directions"})
    sends: ClassVar[str] = "its numbers for random directions, to all ranks in the end"
    name: Literal["flood"] = "flood"
    optimizer: Optimizer = Field(exclude=True)
    """The local update; any optimizer."""

    @property
    def defers(self) -> bool:
        """Yes."""
        return True

    def adapt(self, topology: Topology) -> Topology:
        """Take any graph over which every rank can reach every other; weights are not used."""
        dissemination(topology)
        return topology

    def require(self, oracle: Oracle) -> None:
        """Refuse all but own directions."""
        require_own_directions(self, oracle)

    def mean_delay(self, topology: Topology) -> int:
        """Return D - 1."""
        return dissemination(topology).exchanges - 1

    def init(self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches) -> FloodState:
        """Start at x, with nothing under way."""
        assert oracle.recipe is not None, "refused by require"
        depth, probes = dissemination(comm.topology).exchanges, comm.n * oracle.recipe["queries"]
        pending = torch.full((comm.local, depth, probes), torch.nan, dtype=torch.float64)
        return FloodState(x, self.optimizer.init(x), pending)

    def step(
        self, comm: Communicator, oracle: Oracle, state: FloodState, batches: Batches
    ) -> Metrics:
        """One estimate, records to each neighbour, the update of D - 1 steps ago."""
        estimate = oracle.deferred(state.x, batches[0])
        probes = estimate.grad
        assert isinstance(probes, Probes), "refused by require"
        figures = {"loss": estimate.loss, **estimate.metrics}
        now, depth = state.made % state.pending.shape[1], state.pending.shape[1]
        state.pending[:, now] = torch.nan
        for i, rank in enumerate(comm.ranks):
            state.pending[i, now, list(probes.numbers[rank])] = probes.coefficients[i]
        _exchange(comm, state, np.asarray(probes.numbers))
        state.made += 1
        if state.made < depth:
            return figures
        due = state.pending[:, state.made % depth]
        if not bool(due.isfinite().all()):  # on all ranks alike: they hold the same records
            return {**figures, "skipped": 1.0}
        along = [Along(comm.step - (depth - 1), k) for k in range(due.shape[1])]
        mean = replace(probes, along=[along] * comm.n, coefficients=due / comm.n)
        self._tell(mean)
        self.optimizer.apply_(state.optimizer, state.x, mean, comm)
        return figures


def _exchange(comm: Communicator, state: FloodState, numbers: np.ndarray) -> None:
    """Pass on to each neighbour what is new to it, and keep what comes.

    Args:
        comm: the ranks.
        state: its ``pending`` is filled.
        numbers: (n, q), which probes each rank makes in a step.
    """
    first, queries, depth = comm.ranks.start, numbers.shape[1], state.pending.shape[1]
    pending = state.pending.numpy()
    parts: dict[Edge, list[np.ndarray]] = {}
    counts: dict[Edge, int] = {}
    for (source, target), age, owners in _travelling(comm, state.made, depth):
        if source in comm.ranks:
            probes = numbers[owners].ravel()
            coefficients = pending[source - first, (state.made - age) % depth, probes]
            records = make_records(comm.step - age, probes, coefficients)
            parts.setdefault((source, target), []).append(records)
        if target in comm.ranks:
            counts[source, target] = counts.get((source, target), 0) + len(owners) * queries
    messages = {e: as_tensor(np.concatenate(p)).to(comm.device) for e, p in parts.items()}
    received = {
        edge: torch.empty(count * RECORD.itemsize, dtype=torch.uint8, device=comm.device)
        for edge, count in counts.items()
    }
    comm.neighbor_all_to_all(messages, received)
    for (_, target), message in received.items():
        records = as_records(message)
        rows = (state.made - (comm.step - records["step"].astype(np.int64))) % depth
        pending[target - first, rows, records["probe"]] = records["coefficient"]


def _travelling(
    comm: Communicator, made: int, depth: int
) -> Iterator[tuple[Edge, int, np.ndarray]]:
    """Yield what this round carries: the edge, how old the records are, who made them."""
    spread = dissemination(comm.topology)
    for age in reversed(range(min(depth, made + 1))):
        for edge, owners in spread.senders(comm.round - age, age).items():
            yield edge, age, owners
