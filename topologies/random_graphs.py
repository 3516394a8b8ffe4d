"""Static graphs drawn at random from a seed.

The draws come from networkx and are not stable across its versions: processes with different
versions disagree, which the runtime notices by the round's digest before the first exchange.
"""

import math

import networkx as nx
import numpy as np

from gossamer.topologies.circulants import complete
from gossamer.topologies.eigen import second_eigenvalue, smallest_eigenvalue
from gossamer.topologies.errors import TopologyConnectivityError, TopologyParameterError
from gossamer.topologies.graphs import undirected
from gossamer.topologies.round import Ints, Round
from gossamer.topologies.topology import Topology

_ATTEMPTS = 100


def erdos_renyi(n: int, p: float | None = None, seed: int = 0) -> Topology:
    """Each pair of ranks is an edge with probability p; drawn again until connected.

    Args:
        n: number of ranks.
        p: default min(1, 2 ln n / n), for which rho is about 2 / sqrt(n p).
        seed: of the first attempt; the next ones count up from it.

    Raises:
        TopologyConnectivityError: no connected graph in 100 attempts.
    """
    if p is None:
        p = min(1.0, 2 * math.log(n) / n)
    if not 0 <= p <= 1:
        raise TopologyParameterError(f"topology.p: a probability in 0..1, got {p}")
    for attempt in range(_ATTEMPTS):
        graph = nx.gnp_random_graph(n, p, seed=seed + attempt)
        if nx.is_connected(graph):
            return Topology.static("erdos_renyi", undirected(n, *_ends(graph)), p=p, seed=seed)
    raise TopologyConnectivityError(
        f"topology.p: none of {_ATTEMPTS} graphs of {n} ranks with p={p:.4g} was connected; use "
        f"p of at least {min(1.0, 2 * math.log(n) / n):.4g}"
    )


def random_regular(n: int, degree: int | None = None, trials: int = 32, seed: int = 0) -> Topology:
    """An expander: the best mixing of several random regular graphs.

    With mu the largest modulus of an eigenvalue of A off the mean, it is Ramanujan if mu <=
    2 sqrt(degree - 1); rho is at most (1 + mu) / (degree + 1).

    Args:
        n: number of ranks.
        degree: neighbors of each rank; default 4, or n - 1 if that is less.
        trials: graphs to choose among.
        seed: of the first graph; the next ones count up from it.

    Raises:
        TopologyParameterError: n * degree is odd, or degree is not in 1..n-1.
        TopologyConnectivityError: no graph was connected.
    """
    if degree is None:
        degree = min(4, n - 1)
    if n == 1 and degree == 0:
        return Topology.static("random_regular", complete(1).round(0), degree=0, seed=seed)
    if not 1 <= degree < n or n * degree % 2:
        even = degree + 1 if degree + 1 < n else degree - 1
        raise TopologyParameterError(
            f"topology.degree: random_regular needs 1 <= degree < ranks and ranks * degree even, "
            f"got degree {degree} for {n} ranks; use {even if n * degree % 2 else min(4, n - 1)}"
        )
    if trials < 1:
        raise TopologyParameterError(f"topology.trials: must be 1 or more, got {trials}")
    candidates = (nx.random_regular_graph(degree, n, seed=seed + a) for a in range(trials))
    best, best_mu = None, math.inf
    for graph in candidates:
        if not nx.is_connected(graph):
            continue
        heads, tails = _ends(graph)
        mu = _modulus_off_mean(n, degree, heads, tails)
        if mu < best_mu:
            best, best_mu = (heads, tails), mu
    if best is None:
        raise TopologyConnectivityError(
            f"topology.degree: none of {trials} {degree}-regular graphs of {n} ranks was connected;"
            " use a degree of 3 or more"
        )
    return Topology.static(
        "random_regular", undirected(n, *best), degree=degree, trials=trials, seed=seed
    )


def small_world(n: int, k: int | None = None, p: float = 0.1, seed: int = 0) -> Topology:
    """A connected Watts-Strogatz graph: a ring of k neighbors with a share p of edges rewired.

    Args:
        n: number of ranks.
        k: neighbors of each rank on the ring, 2 or more; default 4, or complete if n <= 4.
        p: probability to rewire an edge.
        seed: of the draw; 100 are tried until one is connected.
    """
    if k is None and n <= 4:
        return Topology.static("small_world", complete(n).round(0), p=p, seed=seed)
    k = 4 if k is None else k
    if not 2 <= k < n:
        raise TopologyParameterError(
            f"topology.k: small_world needs 2 <= k < ranks={n}, got {k}; use {min(4, n - 1)}"
        )
    if not 0 <= p <= 1:
        raise TopologyParameterError(f"topology.p: a probability in 0..1, got {p}")
    try:
        graph = nx.connected_watts_strogatz_graph(n, k, p, tries=_ATTEMPTS, seed=seed)
    except nx.NetworkXError as error:
        raise TopologyConnectivityError(
            f"topology.k: none of {_ATTEMPTS} small worlds of {n} ranks with k={k}, p={p} was "
            "connected; use a larger k"
        ) from error
    return Topology.static("small_world", undirected(n, *_ends(graph)), k=k, p=p, seed=seed)


def _ends(graph: "nx.Graph[int]") -> tuple[Ints, Ints]:
    pairs = np.array(sorted(graph.edges()), np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _modulus_off_mean(n: int, degree: int, heads: Ints, tails: Ints) -> float:
    targets, sources = np.concatenate([heads, tails]), np.concatenate([tails, heads])
    walk = Round.from_edges(n, targets, sources, 1 / degree, 0.0)  # A / degree
    return degree * max(abs(second_eigenvalue(walk)), abs(smallest_eigenvalue(walk)))
