"""Static graphs that look the same from every rank: rank i receives from i + o for fixed offsets o.

Circulant matrices are normal, and an FFT gives their spectrum at any size.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

from gossamer.topologies.errors import TopologyParameterError
from gossamer.topologies.integers import is_prime
from gossamer.topologies.round import Round
from gossamer.topologies.topology import Topology


def ring(n: int) -> Topology:
    """Each rank exchanges with the one before and the one after, weights 1/3.

    rho = (1 + 2 cos(2 pi / n)) / 3 for n >= 4; 0 for n = 3.
    """
    return Topology.static("ring", _uniform(n, [-1, 1]))


def directed_ring(n: int, direction: Literal["from_prev", "from_next"] = "from_prev") -> Topology:
    """Each rank receives from the one before (or after) it, weights 1/2; rho = cos(pi / n).

    Args:
        n: number of ranks.
        direction: 'from_prev': rank i receives from i - 1; 'from_next': from i + 1.
    """
    offset = {"from_prev": -1, "from_next": 1}[direction]
    return Topology.static("directed_ring", _uniform(n, [offset]), direction=direction)


def complete(n: int) -> Topology:
    """Every rank exchanges with every other, weights 1/n: one round averages exactly."""
    return Topology.static("complete", _uniform(n, range(1, n)))


def exponential(n: int) -> Topology:
    """Rank i receives from i - 2^k mod n, k = 0..tau-1, tau = ceil(log2 n) (arXiv:2110.13363).

    Directed, weights 1/(tau + 1); rho = (tau - 1)/(tau + 1) for even n, smaller for odd n.
    """
    return Topology.static("exponential", _uniform(n, _powers(n, 1)))


def p_peer_exponential(n: int, p: int = 1) -> Topology:
    """Rank i receives from i - j (p+1)^k mod n, j = 1..p, for every (p+1)^k < n; uniform weights.

    Args:
        n: number of ranks.
        p: peers per power; 1 is the static exponential graph.
    """
    if not 1 <= p < max(n, 2):
        raise TopologyParameterError(
            f"topology.p: p_peer_exponential needs 1 <= p < ranks={n}, got {p}; use 1"
        )
    return Topology.static("p_peer_exponential", _uniform(n, _powers(n, p)), p=p)


def circulant(n: int, offsets: Sequence[int]) -> Topology:
    """Rank i receives from i - o mod n for every given offset o; uniform weights.

    Args:
        n: number of ranks.
        offsets: any whole numbers; equal ones modulo n count once, multiples of n not at all.
    """
    return Topology.static("circulant", _uniform(n, [-o for o in offsets]), offsets=list(offsets))


def paley(n: int) -> Topology:
    """Ranks i and j exchange if i - j is a non-zero square mod n; n prime with n = 1 mod 4.

    Degree (n-1)/2, weights 2/(n+1), rho = (1 + sqrt(n)) / (n + 1). With 1 or 2 ranks: complete.
    """
    if n > 2 and not (is_prime(n) and n % 4 == 1):
        near = [m for m in range(max(n - 40, 5), n + 40) if is_prime(m) and m % 4 == 1]
        nearest = min(near, key=lambda m: abs(m - n))
        raise TopologyParameterError(
            f"topology.ranks: paley needs a prime n with n = 1 mod 4, got {n}; use {nearest}, "
            "or 'random_regular'"
        )
    squares = range(1, n) if n <= 2 else {i * i % n for i in range(1, n)}
    return Topology.static("paley", _uniform(n, squares))


def _powers(n: int, p: int) -> list[int]:
    offsets, power = [], 1
    while power < n:
        offsets += [-j * power for j in range(1, p + 1)]
        power *= p + 1
    return offsets


def _uniform(n: int, offsets: Iterable[int]) -> Round:
    distinct = sorted({offset % n for offset in offsets} - {0})
    share = 1 / (1 + len(distinct))
    return Round.circulant(n, distinct, share, share)
