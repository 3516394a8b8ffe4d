"""Which ranks can hear of which, through any number of rounds."""

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from gossamer.topologies.errors import TopologyConnectivityError
from gossamer.topologies.round import Ints, Round

_SHOWN = 8  # ranks of a component, and components, that a message lists


def strong_components(support: sparse.csr_array) -> list[Ints]:
    """Return the strongly connected components of a graph, (n, n), in order of their least rank."""
    count, labels = csgraph.connected_components(support, directed=True, connection="strong")
    components = [np.flatnonzero(labels == label) for label in range(min(count, _SHOWN + 1))]
    return sorted(components, key=lambda ranks: int(ranks[0]))


def require_connected(support: sparse.csr_array, where: str) -> None:
    """Raise unless every rank can hear of every other.

    Args:
        support: (n, n), non-zero where there is an edge, in either orientation.
        where: what the support is of, for the message.

    Raises:
        TopologyConnectivityError: names the components.
    """
    components = strong_components(support)
    if len(components) == 1:
        return
    listed = ", ".join(_listed(ranks) for ranks in components[:_SHOWN])
    more = ", .." if len(components) > _SHOWN else ""
    raise TopologyConnectivityError(
        f"topology: {where} is not connected, its components are {listed}{more}; add edges (both "
        "ways, if directed) until every rank can reach every other"
    )


def cycle_period(round_: Round) -> int:
    """Return the greatest common divisor of all cycle lengths of a strongly connected round.

    Values circulate for ever if it is above 1: it counts the eigenvalues of modulus one.
    """
    if np.any(round_.self_weight != 0):
        return 1
    matrix = round_.sparse()
    depth = csgraph.shortest_path(matrix, method="D", indices=0, unweighted=True).astype(np.int64)
    # Row i of W points from i to its sources; any consistent orientation has the same cycles.
    return int(np.gcd.reduce(np.abs(depth[round_.targets] + 1 - depth[round_.sources])))


def _listed(ranks: Ints) -> str:
    shown = ", ".join(map(str, ranks[:_SHOWN].tolist()))
    return f"{{{shown}{', ..' if len(ranks) > _SHOWN else ''}}}"
