"""Schedules in which a rank talks to one peer a round (or to p), by index formula."""

import numpy as np

from gossamer.topologies.errors import TopologyParameterError
from gossamer.topologies.graphs import require_power_of_two
from gossamer.topologies.integers import ceil_log, ceil_log2
from gossamer.topologies.round import Ints, Round
from gossamer.topologies.topology import Topology


def one_peer_exponential(n: int, p: int = 1) -> Topology:
    """Round t: send to i + j (p+1)^(t mod tau) mod n, j = 1..p, weights 1/(p+1) (arXiv:2110.13363).

    Directed and doubly stochastic; tau is the least with (p+1)^tau >= n. Any tau consecutive rounds
    average exactly if n = (p+1)^tau, and only then.

    Args:
        n: number of ranks.
        p: peers a round (arXiv:1811.10792); 1 is the one-peer exponential graph.
    """
    if not 1 <= p < max(n, 2):
        raise TopologyParameterError(
            f"topology.p: one_peer_exponential needs 1 <= p < ranks={n}, got {p}; use 1"
        )
    period = max(1, ceil_log(n, p + 1))

    def rounds(t: int) -> Round:
        sources = (np.arange(n)[:, None] - np.arange(1, p + 1) * (p + 1) ** t) % n
        targets = np.repeat(np.arange(n), p)
        return Round.from_edges(n, targets, sources.ravel(), 1 / (p + 1), 1 / (p + 1))

    return Topology("one_peer_exponential", n, rounds, kind="DS", period=period, params={"p": p})


def one_peer_hypercube(n: int) -> Topology:
    """Round t pairs i with i xor 2^(t mod d), n = 2^d, weights 1/2: exact after d rounds."""
    require_power_of_two("one_peer_hypercube", n)
    period = max(1, ceil_log2(n))

    def rounds(t: int) -> Round:
        ranks = np.arange(n)
        below = ranks[(ranks >> t) & 1 == 0] if n > 1 else ranks[:0]
        return pairwise(n, below, below ^ (1 << t))

    return Topology("one_peer_hypercube", n, rounds, kind="SDS", period=period)


def pairwise(n: int, heads: Ints, tails: Ints, weight: float = 0.5) -> Round:
    """Return the round in which disjoint pairs exchange; whoever is in none keeps its value.

    Args:
        n: number of ranks.
        heads: (pairs,) one of each pair.
        tails: (pairs,) the other.
        weight: what each gives the other's value.
    """
    targets, sources = np.concatenate([heads, tails]), np.concatenate([tails, heads])
    own = np.ones(n)
    own[targets] -= weight
    return Round.from_edges(n, targets, sources, weight, own)
