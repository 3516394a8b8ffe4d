"""How fast a topology brings the ranks to agreement.

J = 11^T/n. rho(W) = ||W - J||_2 is the share of disagreement that a round may leave; for a schedule
of period T, rho_period = ||W_{T-1} .. W_0 - J||_2; for a random one the mean square contracts by
rho_ms^2 = lambda_max((I-J) E[W^T W] (I-J)) a round.
"""

from dataclasses import dataclass, field
from math import ceil, log

import numpy as np
from scipy import sparse

from gossamer.topologies.eigen import (
    distance_to_mean,
    largest_off_mean,
    second_eigenvalue,
    second_modulus,
    smallest_eigenvalue,
)
from gossamer.topologies.hierarchical import HierarchicalTopology
from gossamer.topologies.integers import ceil_log2
from gossamer.topologies.round import Floats
from gossamer.topologies.topology import Topology

EXACT = 1e-12  # disagreement that is rounding only
_STILL_APART = 1e-6  # an exact schedule goes from above this to below EXACT in one round
_PROBES = 4
_SAMPLES = 256  # rounds that stand for a random schedule without a formula
_MAX_ROUNDS = 20_000


@dataclass(frozen=True)
class Spectrum:
    """What `spectrum` found.

    Attributes:
        rho: share of disagreement left by a round: ||W - J||_2 of a static graph; for a schedule
            rho_period^(1/T), for a random one rho_ms.
        rho_period: ||W_{T-1} .. W_0 - J||_2 over a period; None for a random schedule.
        rho_ms: contraction per round in mean square, for a random schedule; None for others.
        rate: asymptotic contraction per round: rho, except where W is not normal (de Bruijn, or a
            class in which W does not keep the average): there the second largest modulus of an
            eigenvalue. 0 for a graph that averages exactly.
        gap: 1 - rho.
        lambda_min: smallest eigenvalue over the period; None if W is not symmetric.
        exact_after: rounds, from round 0, after which every rank holds the average but for
            rounding; None if no number of rounds does that.
    """

    rho: float
    rho_period: float | None
    rho_ms: float | None
    rate: float
    gap: float
    lambda_min: float | None
    exact_after: int | None
    topology: Topology = field(repr=False, compare=False)

    def rounds_to(self, tolerance: float = 1e-6, max_rounds: int = _MAX_ROUNDS) -> int | None:
        """Return how many rounds bring max |x - xbar| to ``tolerance`` of its start, from x_i = i.

        Simulated, with push-sum's ratio where columns sum to one. None if ``max_rounds`` are not
        enough (`estimated_rounds` extrapolates), as for row-stochastic weights, whose limit is not
        the average.
        """
        topology = self.topology
        values = np.arange(topology.n, dtype=np.float64)
        state = np.stack([values - values.mean(), np.ones(topology.n)], axis=1)
        start = np.abs(state[:, 0]).max()
        if start == 0:
            return 0
        for t in range(max_rounds):
            state = topology.round(t).apply(state)
            if np.abs(state[:, 0] / state[:, 1]).max() <= tolerance * start:
                return t + 1
        return None

    def estimated_rounds(self, tolerance: float) -> float:
        """Return how many rounds bring the disagreement to ``tolerance``, from rate; may be inf.

        A whole number of periods, or exactly ``exact_after``.
        """
        if self.exact_after is not None:
            return self.exact_after
        if self.rate >= 1:
            return float("inf")
        period = self.topology.period or 1
        return ceil(-log(tolerance) / (-log(self.rate) * period)) * period


def spectrum(topology: Topology) -> Spectrum:
    """Compute rho and its companions; seconds for 4,096 ranks, and for schedules of 59,049.

    The figures of a random schedule without a closed form (a lazy one, or a user's) are estimates
    from its first 256 rounds.
    """
    if isinstance(topology, HierarchicalTopology):
        return _hierarchical(topology)
    exact_after = _exact_after(topology)
    if topology.period is None:
        rho_ms = topology.rho_ms if topology.rho_ms is not None else _sampled_rho_ms(topology)
        rho, rho_period, rate = rho_ms, None, rho_ms
    else:
        rho_ms, (rho, rho_period, rate) = None, _periodic(topology, topology.period, exact_after)
    return Spectrum(
        rho=rho,
        rho_period=rho_period,
        rho_ms=rho_ms,
        rate=rate,
        gap=1 - rho,
        lambda_min=topology.lambda_min() if topology.is_symmetric else None,
        exact_after=exact_after,
        topology=topology,
    )


def _periodic(
    topology: Topology, period: int, exact_after: int | None
) -> tuple[float, float, float]:
    """Return (rho, rho_period, rate) of a static graph or a schedule that repeats."""
    rounds = [topology.round(t) for t in range(period)]
    if exact_after is not None and exact_after <= period:
        return 0.0, 0.0, 0.0
    if topology.is_static and topology.is_symmetric:
        ends = second_eigenvalue(rounds[0]), smallest_eigenvalue(rounds[0])
        rho_period = max(abs(end) for end in ends)
    else:
        rho_period = distance_to_mean(rounds)
    rho = rho_period ** (1 / period)
    if exact_after is not None:
        rate = 0.0
    elif topology.is_symmetric or (topology.is_doubly_stochastic and not topology.is_static):
        rate = rho
    else:
        rate = second_modulus(rounds) ** (1 / period)
    return rho, rho_period, rate


def _exact_after(topology: Topology) -> int | None:
    """Find the round that makes all values equal, by random probes.

    A product that maps a few random vectors to their means within rounding is J, but for a chance
    of measure zero. Static graphs are tried for as long as a de Bruijn graph may take.
    """
    if topology.n == 1:
        return 0
    if topology.period is None or not topology.is_doubly_stochastic:
        return None
    limit = ceil_log2(topology.n) + 1 if topology.is_static else topology.period
    probes: Floats = np.random.default_rng(0).standard_normal((topology.n, _PROBES))
    mean = probes.mean(axis=0)
    before = 1.0
    for t in range(limit):
        probes = topology.round(t).apply(probes)
        apart = float(np.abs(probes - mean).max())
        if apart <= EXACT:
            return t + 1 if before > _STILL_APART else None
        before = apart
    return None


def _sampled_rho_ms(topology: Topology) -> float:
    n = topology.n
    mean_square = sparse.csr_array((n, n))
    for t in range(_SAMPLES):
        matrix = topology.round(t).sparse()
        mean_square = mean_square + matrix.T @ matrix / _SAMPLES
    return float(np.sqrt(max(largest_off_mean(sparse.csr_array(mean_square)), 0.0)))


def _hierarchical(topology: HierarchicalTopology) -> Spectrum:
    machines = spectrum(topology.machines)
    exact_after = machines.exact_after
    if exact_after is not None and topology.local > 1:
        exact_after = max(exact_after, 1)  # one machine: its own ranks average in one round
    return Spectrum(
        rho=machines.rho,
        rho_period=machines.rho_period,
        rho_ms=machines.rho_ms,
        rate=machines.rate,
        gap=machines.gap,
        lambda_min=topology.lambda_min() if topology.is_symmetric else None,
        exact_after=exact_after,
        topology=topology,
    )
