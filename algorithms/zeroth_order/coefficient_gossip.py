"""``coefficient-gossip``: decentralized SGD whose ranks average numbers in place of parameters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from gossamer.algorithms.estimates import Metrics
from gossamer.algorithms.optimizers.sgd import SGD
from gossamer.algorithms.problems import Batches
from gossamer.algorithms.protocols import Algorithm, Optimizer, Oracle
from gossamer.algorithms.zeroth_order.probes import Probes
from gossamer.algorithms.zeroth_order.records import require_own_directions
from gossamer.runtime import Communicator, ConfigError
from gossamer.runtime.perturb import Probe, update_
from gossamer.topologies import Topology
from gossamer.topologies.round import Floats

__all__ = ["CoefficientGossip"]

_MOST_ROUNDS = 10_000


@dataclass
class CoefficientGossipState:
    """A rank's model, and what of it still moves.

    Attributes:
        x: (local, d) parameters.
        coefficients: (local, A n q), of the directions of the latest A steps, step k since the
            start in block k mod A; float64 for float64 parameters, float32 for others.
        made: steps since the start.
    """

    x: Tensor
    coefficients: Tensor
    made: int = 0


class CoefficientGossip(Algorithm):
    """Decentralized SGD (arXiv:1705.09056), adapt then combine, without parameters on the wire.

    With directions z of each rank's own, model i is x_0 - sum C_i[s, j] z_(s, j), and averaging
    models is averaging their coefficients: C_i = sum_j W_ij (C_j + lr g_j e_(t, j)). The models are
    those of ``dsgd`` with ``order: atc`` and ``sgd``. What is sent is A n q numbers to each
    neighbour, for the directions of the latest A steps: older ones are equal on all ranks but for
    ``tolerance``, and each takes their mean, which it knows from its own: C_i[s, j] / (n P_ij), P
    the product of the A rounds. Each number that moves costs a pass over its direction, (A + 1) n q
    of them a step: for few parameters (adapters, prompts) and graphs that mix fast. A rank whose
    numbers are not finite makes no step of its own (``skipped``: their share). Parameters of 16
    bits lose small changes.
    """

    follows_graph: ClassVar[bool] = True
    takes: ClassVar[frozenset[str]] = frozenset({"directions"})
    sends: ClassVar[str] = "its numbers for random directions, averaged with its neighbours'"
    name: Literal["coefficient-gossip"] = "coefficient-gossip"
    tolerance: float = Field(default=1e-6, gt=0, lt=1)
    """How far the n numbers of a direction may be apart, relative to their mean, when they are
    set to it: n max |P - 11'/n| stays below it."""
    window: int | None = Field(default=None, ge=1)
    """A, steps whose numbers are averaged; None: as few as the tolerance allows."""
    optimizer: Optimizer = Field(exclude=True)
    """``sgd`` without weight decay and bound."""

    @model_validator(mode="after")
    def _check_optimizer(self) -> Self:
        optimizer = self.optimizer
        if not isinstance(optimizer, SGD) or optimizer.weight_decay or optimizer.max_norm:
            raise ValueError(
                "optimizer: coefficient-gossip averages the numbers of plain SGD steps; use "
                "optimizer: {name: sgd} without weight_decay and max_norm, or algorithm: dsgd"
            )
        return self

    def adapt(self, topology: Topology) -> Topology:
        """Take a doubly stochastic W that repeats, and mixes within the window."""
        topology = super().adapt(topology)
        needed = _rounds_to_mix(topology, self.tolerance)
        if self.window is not None and self.window < needed:
            raise ConfigError(
                f"algorithm.window: after {self.window} rounds of {topology.name} ranks differ by "
                f"more than tolerance {self.tolerance:g}; use at least {needed}, or a larger "
                "tolerance"
            )
        return topology

    def require(self, oracle: Oracle) -> None:
        """Refuse all but own directions."""
        require_own_directions(self, oracle)

    def init(
        self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches
    ) -> CoefficientGossipState:
        """Start at x, with no direction taken."""
        assert oracle.recipe is not None, "refused by require"
        steps = self.window or _rounds_to_mix(comm.topology, self.tolerance)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        numbers = steps * comm.n * oracle.recipe["queries"]
        zeros = torch.zeros(comm.local, numbers, dtype=dtype, device=comm.device)
        return CoefficientGossipState(x, zeros)

    def step(
        self, comm: Communicator, oracle: Oracle, state: CoefficientGossipState, batches: Batches
    ) -> Metrics:
        """One estimate, one average of A n q numbers, the directions whose numbers moved."""
        estimate = oracle.deferred(state.x, batches[0])
        probes = estimate.grad
        assert isinstance(probes, Probes), "refused by require"
        finite = probes.coefficients.isfinite().all(dim=1, keepdim=True)
        rate = self.optimizer.rate(comm)
        taken = torch.where(finite, rate * probes.coefficients, 0.0)

        per_step = comm.n * probes.coefficients.shape[1]
        blocks = state.coefficients.view(comm.local, -1, per_step)
        steps = blocks.shape[1]
        now = state.made % steps
        frozen = _frozen(comm, probes, blocks[:, now], steps)
        before = blocks.clone()
        before[:, now] = 0
        blocks[:, now] = 0
        for i, rank in enumerate(comm.ranks):
            own = torch.tensor(probes.numbers[rank])
            blocks[i, now, own] = taken[i].to(blocks)
        comm.neighbor_average(state.coefficients, out=state.coefficients)

        moved = blocks - before
        for i, row in enumerate(state.x):
            terms = _terms(frozen[i], comm.step - steps)
            for block in range(steps):
                terms += _terms(moved[i, block], comm.step - (state.made - block) % steps)
            update_(
                row,
                probes.layout,
                probes.seed,
                terms,
                distribution=probes.distribution,
                mask=probes.mask,
            )
        state.made += 1
        skipped = (~finite).double().squeeze(1)
        return {"loss": estimate.loss, **estimate.metrics, "skipped": skipped}


def _frozen(comm: Communicator, probes: Probes, oldest: Tensor, steps: int) -> Tensor:
    """Return what brings the numbers of the step that leaves the window to their mean.

    Args:
        comm: the ranks.
        probes: of this step, whose numbers are those of every step.
        oldest: (local, n q), averaged ``steps`` times.
        steps: A.
    """
    if not bool(oldest.any()):
        return torch.zeros_like(oldest)
    assert comm.topology.period is not None
    product = _product(comm.topology, (comm.round - steps) % comm.topology.period, steps)
    queries = probes.coefficients.shape[1]
    shares = np.repeat(product[comm.ranks.start : comm.ranks.stop], queries, axis=1)
    places = np.ravel(probes.numbers)  # by rank
    gain = torch.empty(oldest.shape, dtype=torch.float64)
    gain[:, places] = torch.from_numpy(1 / (comm.n * shares) - 1)
    return oldest * gain.to(oldest)


def _terms(coefficients: Tensor, step: int) -> list[Probe]:
    """Return the directions of a step whose coefficients are not 0."""
    return [Probe(step, j, c) for j, c in enumerate(coefficients.tolist()) if c]


@lru_cache(maxsize=64)
def _product(topology: Topology, start: int, rounds: int) -> Floats:
    """Return W(start + rounds - 1) .. W(start), (n, n)."""
    product = np.eye(topology.n)
    for t in range(start, start + rounds):
        product = topology.round(t).apply(product)
    return product


@lru_cache(maxsize=8)
def _rounds_to_mix(topology: Topology, tolerance: float) -> int:
    """Return the least A with n max |P - 11'/n| < tolerance, P the product of any A rounds.

    Raises:
        ConfigError: the schedule never repeats, or does not get there.
    """
    if topology.period is None:
        raise ConfigError(
            f"topology: coefficient-gossip must know the product of the rounds to come, but "
            f"{topology.name} never repeats; use a static graph or a schedule with a period"
        )
    n, most = topology.n, 0
    for start in range(topology.period):
        product = np.eye(n)
        for rounds in count():
            if np.abs(n * product - 1).max() < tolerance:
                most = max(most, rounds)
                break
            if rounds == _MOST_ROUNDS:
                raise ConfigError(
                    f"topology: {topology.name} does not bring ranks within tolerance "
                    f"{tolerance:g} in {rounds} rounds; use a graph that mixes faster (see "
                    "'gossamer topology show'), or a larger tolerance"
                )
            product = topology.round(start + rounds).apply(product)
    return max(most, 1)
