"""EquiTopo: graphs whose rate does not depend on the number of ranks (arXiv:2210.07881).

A^(u) has 1/n on the diagonal and (n-1)/n in column (i + u) mod n of row i, u = 1..n-1. The mean of
A^(u) over u is J; everything here averages a few of them, in space (static) or in time (dynamic).
"""

from collections.abc import Callable, Sequence
from math import log

import numpy as np

from gossamer.topologies.eigen import distance_to_mean
from gossamer.topologies.errors import TopologyParameterError
from gossamer.topologies.one_peer import pairwise
from gossamer.topologies.randomness import check_seed, generator
from gossamer.topologies.round import Floats, Ints, Round
from gossamer.topologies.topology import Topology

_DRAWS = 100


def equi_static(
    n: int,
    m: int | None = None,
    directed: bool = True,
    eps: float = 0.5,
    delta: float = 0.1,
    rho_max: float | None = None,
    seed: int = 0,
) -> Topology:
    """EquiStatic: W is the mean of m matrices A^(u), u drawn with replacement from 1..n-1.

    Directed: degree at most m. Undirected, the mean of A^(u) and its transpose: at most 2m. The
    draw is repeated with the next seed until rho(W) is below ``rho_max``, since a single draw of
    few matrices may hardly mix.

    Args:
        n: number of ranks.
        m: how many; default int(8 ln(2n/delta) / (3 eps^2)), for which rho < eps with probability
            at least 1 - delta.
        directed: D-EquiStatic (doubly stochastic), else U-EquiStatic (symmetric too).
        eps: wanted rho, where m is not given.
        delta: probability to miss it, where m is not given.
        rho_max: accept a draw with rho below this; default eps if m is not given, else 1.
        seed: of the first draw.

    Raises:
        TopologyParameterError: 100 draws did not reach ``rho_max``.
    """
    check_seed(seed)
    if not (eps > 0 and 0 < delta < 1):
        raise TopologyParameterError(
            f"topology.eps, topology.delta: need eps > 0 and 0 < delta < 1, got {eps} and {delta}"
        )
    bound = rho_max if rho_max is not None else (eps if m is None else 1 - 1e-12)
    m = int(8 * log(2 * n / delta) / (3 * eps**2)) if m is None else m
    if m < 1:
        raise TopologyParameterError(f"topology.m: must be 1 or more, got {m}")
    for attempt in range(_DRAWS):
        round_ = _mean_of_shifts(n, generator(seed + attempt, 0), m, directed)
        if distance_to_mean([round_]) < bound:
            return Topology.static("equi_static", round_, m=m, directed=directed, seed=seed)
    raise TopologyParameterError(
        f"topology.rho_max: {_DRAWS} draws of m={m} matrices for {n} ranks gave no rho below "
        f"{bound:.6g}; raise m or rho_max"
    )


def equi_dyn(
    n: int,
    directed: bool = True,
    eta: float = 0.5,
    basis: Sequence[int] | None = None,
    seed: int = 0,
) -> Topology:
    """EquiDyn: one message a round, over a shift v drawn anew each time.

    Directed (OD): W_t = (1 - eta) I + eta A^(v). Undirected (OU): v and a start s are drawn, ranks
    i = s, s+1, .. are matched with i + v where both are free, and with that matching M
    W_t = (1 - eta) I + eta (I/n + (n-1)/n M). eta = 1/2 mixes well; the official code's default of
    1 gives rho_ms^2 = 1 - 2/n, as slow as a ring.

    Args:
        n: number of ranks.
        directed: OD-EquiDyn, else OU-EquiDyn.
        eta: the share of a round that is exchange, in (0, 1].
        basis: shifts to draw from; default all of 1..n-1.
        seed: with t, decides round t.
    """
    check_seed(seed)
    if not 0 < eta <= 1:
        raise TopologyParameterError(f"topology.eta: must be in (0, 1], got {eta}; use 0.5")
    shifts = np.arange(1, n) if basis is None else np.array(sorted({int(v) for v in basis}))
    if basis is not None and (len(shifts) == 0 or shifts[0] < 1 or shifts[-1] >= n):
        raise TopologyParameterError(
            f"topology.basis: needs shifts in 1..{n - 1} (ranks - 1), got {list(basis)}"
        )
    if basis is not None and np.gcd.reduce([*shifts, n]) != 1:
        raise TopologyParameterError(
            f"topology.basis: the shifts {list(basis)} and ranks={n} share the divisor "
            f"{np.gcd.reduce([*shifts, n])}, so some ranks never meet; add 1 to the basis"
        )
    exchange = eta * (n - 1) / n  # weight of the message; 1 - exchange stays

    def directed_round(t: int) -> Round:
        if n == 1:
            return pairwise(1, shifts, shifts)
        shift = generator(seed, t).choice(shifts)
        return Round.circulant(n, [int(shift)], exchange, 1 - exchange)

    def undirected_round(t: int) -> Round:
        if n == 1:
            return pairwise(1, shifts, shifts)
        draw = generator(seed, t)
        shift, start = int(draw.choice(shifts)), int(draw.integers(n))
        heads = greedy_heads(n, shift)
        return pairwise(n, (heads + start) % n, (heads + shift + start) % n, exchange)

    rounds: Callable[[int], Round] = directed_round if directed else undirected_round
    return Topology(
        "equi_dyn",
        n,
        rounds,
        kind="DS" if directed else "SDS",
        period=None,
        params={"directed": directed, "eta": eta, "basis": basis, "seed": seed},
        rho_ms=_rho_ms(n, shifts, exchange, directed),
    )


def greedy_heads(n: int, shift: int) -> Ints:
    """Return the i, scanned from 0 up, that are matched with i + shift mod n, both being free.

    The scan in closed form: blocks of ``width`` ranks are matched and skipped in turn.
    """
    width = min(shift, n - shift)
    ranks = np.arange(max(shift, n - shift))
    heads: Ints = ranks[ranks // width % 2 == 0]
    return heads


def _num_heads(n: int, shifts: Ints) -> Ints:
    """Return how many pairs `greedy_heads` finds, for each shift."""
    width, limit = np.minimum(shifts, n - shifts), np.maximum(shifts, n - shifts)
    pairs: Ints = limit // (2 * width) * width + np.minimum(limit % (2 * width), width)
    return pairs


def _mean_of_shifts(n: int, draw: np.random.Generator, m: int, directed: bool) -> Round:
    if n == 1:
        return Round.circulant(1, [], 0.0, 1.0)
    counts = np.bincount(draw.integers(1, n, size=m), minlength=n).astype(np.float64)
    if not directed:
        counts = (counts + np.roll(counts[::-1], 1)) / 2  # u and n - u
    offsets = np.flatnonzero(counts)
    weights = counts[offsets] / m * ((n - 1) / n)
    return Round.circulant(n, offsets.tolist(), weights, 1 / n)


def _rho_ms(n: int, shifts: Ints, exchange: float, directed: bool) -> float:
    """Return sqrt(lambda_max((I-J) E[W^T W] (I-J))) of W = (1 - b) I + b P, P a permutation.

    W^T W = ((1-b)^2 + b^2) I + b (1-b) (P + P^T), and E[P] is circulant: over a uniform start, the
    matching of a shift v has E[M]_{i, i+v} = E[M]_{i, i-v} = pairs / n, the rest on the diagonal.
    """
    if n == 1:
        return 0.0
    mean: Floats = np.zeros(n)  # first row of E[P]
    if directed:
        mean[shifts] = 1 / len(shifts)
    else:
        share = _num_heads(n, shifts) / (n * len(shifts))
        mean[shifts] += share
        mean[n - shifts] += share
        mean[0] += 1 - 2 * share.sum()
    symmetric_part = np.fft.fft(mean).real[1:].max()
    square = (1 - exchange) ** 2 + exchange**2 + 2 * exchange * (1 - exchange) * symmetric_part
    return float(np.sqrt(max(square, 0.0)))
