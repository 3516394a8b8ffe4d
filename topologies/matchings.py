"""Random schedules of disjoint pairs: gossip with whom the draw of the round says."""

from collections.abc import Callable
from math import sqrt
from typing import Literal

import numpy as np

from gossamer.topologies import circulants, graphs
from gossamer.topologies.eigen import second_eigenvalue
from gossamer.topologies.one_peer import pairwise
from gossamer.topologies.randomness import check_seed, generator
from gossamer.topologies.round import Round
from gossamer.topologies.topology import Topology
from gossamer.topologies.weights import max_degree

EdgeGraph = Literal["ring", "path", "star", "complete", "grid", "torus", "hypercube", "tree"]
_EDGE_GRAPHS: dict[str, Callable[[int], Topology]] = {
    "ring": circulants.ring,
    "path": graphs.path,
    "star": graphs.star,
    "complete": circulants.complete,
    "grid": graphs.grid,
    "torus": graphs.torus,
    "hypercube": graphs.hypercube,
    "tree": graphs.tree,
}


def random_matching(n: int, seed: int = 0) -> Topology:
    """Round t pairs all ranks at random, weights 1/2; for odd n one of them idles.

    rho_ms^2 = (n - 2) / (2 (n - 1)) for even n, 1/2 for odd n.

    Args:
        n: number of ranks.
        seed: with t, decides round t.
    """
    check_seed(seed)

    def rounds(t: int) -> Round:
        order = generator(seed, t).permutation(n)[: n - n % 2]
        return pairwise(n, order[0::2], order[1::2])

    rho_ms = 0.0 if n == 1 else sqrt(0.5 if n % 2 else (n - 2) / (2 * (n - 1)))
    return _random("random_matching", n, rounds, rho_ms, seed=seed)


def bipartite_matching(n: int, seed: int = 0) -> Topology:
    """Round t matches ranks 0..n//2-1 with the others by a random permutation, weights 1/2.

    rho_ms^2 = 1/2 for even n >= 4. For odd n one rank of the larger half, of c = (n + 1)/2 ranks,
    idles, and rho_ms^2 = (1 + 1/c) / 2.

    Args:
        n: number of ranks.
        seed: with t, decides round t.
    """
    check_seed(seed)
    half = n // 2

    def rounds(t: int) -> Round:
        return pairwise(n, np.arange(half), half + generator(seed, t).permutation(n - half)[:half])

    # The vectors that shrink least sum to zero within the larger half, where a rank keeps its value
    # with probability 1 - half / (n - half). With one or two ranks there is no such vector.
    idle = 1 - half / (n - half)
    rho_ms = 0.0 if n <= 2 else sqrt((1 + idle) / 2)
    return _random("bipartite_matching", n, rounds, rho_ms, seed=seed)


def random_edge(n: int, graph: EdgeGraph = "ring", seed: int = 0) -> Topology:
    """Round t averages the two ends of one edge of a graph, as pairwise gossip does.

    rho_ms^2 = 1 - l_2(L) / (2 |E|) per activation (Boyd et al., IEEE Trans. Inf. Theory 52, 2006).

    Args:
        n: number of ranks.
        graph: the static graph whose edges are drawn, uniformly.
        seed: with t, decides round t.
    """
    check_seed(seed)
    edges = _EDGE_GRAPHS[graph](n).round(0)
    once = edges.sources < edges.targets
    heads, tails = edges.sources[once], edges.targets[once]
    if n == 1:
        return _random("random_edge", n, lambda t: edges, 0.0, graph=graph, seed=seed)

    def rounds(t: int) -> Round:
        drawn = generator(seed, t).integers(len(heads), size=1)
        return pairwise(n, heads[drawn], tails[drawn])

    # max_degree weights are I - L / (d_max + 1), which gives l_2 without forming L.
    l_2 = (edges.max_degree + 1) * (1 - second_eigenvalue(max_degree(edges)))
    rho_ms = sqrt(1 - l_2 / (2 * len(heads)))
    return _random("random_edge", n, rounds, rho_ms, graph=graph, seed=seed)


def _random(
    name: str, n: int, rounds: Callable[[int], Round], rho_ms: float, **params: str | int
) -> Topology:
    return Topology(name, n, rounds, kind="SDS", period=None, params=params, rho_ms=rho_ms)
