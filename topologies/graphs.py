"""Static graphs given by an index formula, other than the circulant ones."""

import logging

import networkx as nx
import numpy as np

from gossamer.topologies.circulants import complete
from gossamer.topologies.errors import TopologyParameterError
from gossamer.topologies.integers import ceil_log2, is_power_of_two, squarest_rows
from gossamer.topologies.round import Ints, Round
from gossamer.topologies.topology import Topology
from gossamer.topologies.weights import metropolis

_log = logging.getLogger(__name__)


def undirected(n: int, heads: Ints, tails: Ints) -> Round:
    """Return undirected edges with Metropolis weights; doubled edges count once.

    Args:
        n: number of ranks.
        heads: (edges,) one end of each edge.
        tails: (edges,) the other end.
    """
    targets, sources = np.concatenate([heads, tails]), np.concatenate([tails, heads])
    return metropolis(Round.from_edges(n, targets, sources, 1.0, 0.0))


def path(n: int) -> Topology:
    """Ranks in a line, each exchanging with its neighbors; rho = (1 + 2 cos(pi/n))/3, n >= 3."""
    ranks = np.arange(n)
    return Topology.static("path", undirected(n, ranks[:-1], ranks[1:]))


def star(n: int, center: int = 0) -> Topology:
    """One rank exchanges with all others; rho = 1 - 1/n for n >= 3.

    Args:
        n: number of ranks.
        center: the rank in the middle, which sends and receives n - 1 messages a round.
    """
    if not 0 <= center < n:
        raise TopologyParameterError(
            f"topology.center: must be a rank, 0..{n - 1}, got {center}; use 0"
        )
    leaves = np.delete(np.arange(n), center)
    return Topology.static(
        "star", undirected(n, np.full_like(leaves, center), leaves), center=center
    )


def grid(n: int, rows: int | None = None, cols: int | None = None) -> Topology:
    """Rank row * cols + col exchanges with its up to four neighbors on a rows x cols grid.

    Args:
        n: number of ranks, rows * cols.
        rows: default: the largest divisor of n that is at most sqrt(n).
        cols: default: n / rows.
    """
    return _lattice("grid", n, rows, cols, wrap=False)


def torus(n: int, rows: int | None = None, cols: int | None = None) -> Topology:
    """Like grid, wrapped around; a dimension of size 2 has one neighbor there, of size 1 none.

    For rows, cols >= 3: weights 1/5 and rho = max((3 + 2 cos(2 pi/max(rows, cols)))/5, 3/5 if both
    are even).

    Args:
        n: number of ranks, rows * cols.
        rows: default: the largest divisor of n that is at most sqrt(n).
        cols: default: n / rows.
    """
    return _lattice("torus", n, rows, cols, wrap=True)


def hypercube(n: int) -> Topology:
    """Rank i exchanges with i xor 2^b for every b < d, n = 2^d; rho = (d - 1)/(d + 1)."""
    require_power_of_two("hypercube", n)
    ranks = np.arange(n)
    bits = np.arange(ceil_log2(n))
    heads = np.repeat(ranks, len(bits))
    return Topology.static("hypercube", undirected(n, heads, heads ^ np.tile(1 << bits, n)))


def de_bruijn(n: int, degree: int = 2) -> Topology:
    """Rank i sends to (degree * i + c) mod n, c < degree, weights 1/degree each.

    Doubly stochastic; rho(W) = 1, yet W^t = J exactly if n = degree^t.

    Args:
        n: number of ranks.
        degree: messages per rank and round; a few ranks send one of them to themselves.
    """
    if degree < 2:
        raise TopologyParameterError(f"topology.degree: de_bruijn needs 2 or more, got {degree}")
    sources = np.repeat(np.arange(n), degree)
    targets = (degree * sources + np.tile(np.arange(degree), n)) % n
    round_ = Round.from_edges(n, targets, sources, 1 / degree, 0.0)
    return Topology.static("de_bruijn", round_, degree=degree)


def margulis(n: int) -> Topology:
    """The Margulis-Gabber-Galil expander on n = m^2 ranks: W = A/8, the rest on the diagonal.

    A sums the multiplicities of the multigraph; the second eigenvalue is at most 5 sqrt(2)/8. With
    2 ranks: complete.
    """
    side = round(n**0.5)
    if n == 2:
        edges = complete(2).round(0)
    elif side * side == n:
        multigraph = nx.margulis_gabber_galil_graph(side)
        pairs = np.array([a * side + b for edge in multigraph.edges() for a, b in edge])
        heads, tails = pairs.reshape(-1, 2).T
        between = heads != tails
        heads, tails = heads[between], tails[between]
        targets, sources = np.concatenate([heads, tails]), np.concatenate([tails, heads])
        rest = 1 - np.bincount(targets, minlength=n) / 8
        edges = Round.from_edges(n, targets, sources, 1 / 8, rest)
    else:
        raise TopologyParameterError(
            f"topology.ranks: margulis needs a square number, got {n}; use {side * side} or "
            f"{(side + 1) ** 2}, or 'random_regular'"
        )
    return Topology.static("margulis", edges)


def tree(n: int, branching: int = 2) -> Topology:
    """Rank i > 0 exchanges with its parent (i - 1) // branching.

    Args:
        n: number of ranks.
        branching: children of each inner rank.
    """
    if branching < 1:
        raise TopologyParameterError(f"topology.branching: must be 1 or more, got {branching}")
    children = np.arange(1, n)
    parents = (children - 1) // branching
    return Topology.static("tree", undirected(n, children, parents), branching=branching)


def require_power_of_two(name: str, n: int) -> None:
    """Raise TopologyParameterError unless n is a power of two."""
    if not is_power_of_two(n):
        above = 1 << ceil_log2(n)
        other = "exponential" if name == "hypercube" else "base"
        raise TopologyParameterError(
            f"topology.ranks: {name} needs a power of two, got {n}; use {above // 2} or {above}, "
            f"or '{other}'"
        )


def _lattice(name: str, n: int, rows: int | None, cols: int | None, wrap: bool) -> Topology:
    given = rows is not None or cols is not None
    if rows is None:
        rows = squarest_rows(n) if cols is None else n // max(cols, 1)
    if cols is None:
        cols = n // max(rows, 1)
    if rows * cols != n or rows < 1:
        best = squarest_rows(n)
        raise TopologyParameterError(
            f"topology.rows, topology.cols: {name} needs rows * cols = ranks, got {rows} * {cols} "
            f"for {n} ranks; use {best} and {n // best}"
        )
    if rows == 1 and n > 3 and not given:
        _log.warning(
            "topology.ranks: %d is prime, so the %s is a %s", n, name, "ring" if wrap else "path"
        )
    place = np.arange(n).reshape(rows, cols)
    if wrap:
        heads = np.concatenate([place.ravel()] * 2)
        tails = np.concatenate([np.roll(place, -1, axis).ravel() for axis in (0, 1)])
        heads, tails = heads[heads != tails], tails[heads != tails]  # a dimension of size 1
    else:
        heads = np.concatenate([place[:-1].ravel(), place[:, :-1].ravel()])
        tails = np.concatenate([place[1:].ravel(), place[:, 1:].ravel()])
    return Topology.static(name, undirected(n, heads, tails), rows=rows, cols=cols)
