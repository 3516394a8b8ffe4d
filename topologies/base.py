"""Base-(k+1) graphs: exact averages for every number of ranks and every maximum degree k.

Undirected schedules of symmetric doubly stochastic rounds whose product over a period is J
(arXiv:2305.11420). Blocks of ranks that do the same stand side by side, so a round is built from
Kronecker products and block-diagonal sums of small matrices.
"""

from math import prod

import numpy as np
from scipy import sparse

from gossamer.topologies.errors import TopologyParameterError
from gossamer.topologies.integers import digits, largest_prime_factor, small_factors
from gossamer.topologies.round import Floats, Round
from gossamer.topologies.topology import Topology


def base(n: int, k: int = 1, simple: bool = False, inner: bool = True) -> Topology:
    """The Base-(k+1) graph: exact after a period of at most 2 log_{k+1}(n) + 2 rounds.

    Args:
        n: number of ranks.
        k: most messages a rank sends in a round, 1..n-1.
        simple: the Simple Base-(k+1) graph; the default splits off the factors of n up to k+1
            first where that makes the period shorter.
        inner: let ranks that idle while others hand out average among themselves, which changes
            nothing in exact arithmetic and helps when gradient noise enters.
    """
    if not 1 <= k < max(n, 2):
        raise TopologyParameterError(
            f"topology.k: base needs 1 <= k < ranks={n}, got {k}; use {max(1, min(k, n - 1))}"
        )
    period, split = _simple_period(n, k), 1
    if not simple:
        factors, rest = small_factors(n, k + 1)
        split_period = _simple_period(rest, k) + len(factors)
        if rest not in (1, n) and split_period < period:
            period, split = split_period, n // rest

    def rounds(t: int) -> Round:
        return Round.from_matrix(_base_round(n, k, split, inner, t))

    params = {"k": k, "simple": simple, "inner": inner}
    return Topology("base", n, rounds, kind="SDS", period=period, params=params)


def hyper_hypercube(n: int, k: int | None = None) -> Topology:
    """Average in groups of each factor of n in turn: exact after one round per factor.

    Args:
        n: number of ranks; no prime factor may exceed k + 1.
        k: most messages a rank sends in a round; default: the least that n allows.

    Raises:
        TopologyParameterError: n has a prime factor above k + 1.
    """
    largest = largest_prime_factor(n)
    k = max(largest - 1, 1) if k is None else k
    if largest > k + 1 or not 1 <= k < max(n, 2):
        raise TopologyParameterError(
            f"topology.k: hyper_hypercube needs k >= {max(largest - 1, 1)} (prime factor {largest} "
            f"of {n}) and k < ranks={n}, got {k}; use k={max(largest - 1, 1)}, or 'base'"
        )
    factors, _ = small_factors(n, k + 1)

    def rounds(t: int) -> Round:
        return Round.from_matrix(_factor_round(n, factors, t))

    period = max(1, len(factors))
    return Topology("hyper_hypercube", n, rounds, kind="SDS", period=period, params={"k": k})


def _base_round(n: int, k: int, split: int, inner: bool, t: int) -> sparse.sparray:
    """Round t of Base: Simple Base in ``split`` groups side by side, then across the groups."""
    size = n // split
    simple_period = _simple_period(size, k)
    if t < simple_period:
        return sparse.kron(sparse.eye_array(split), _simple_round(size, k, inner, t))
    across = _factor_round(split, small_factors(split, k + 1)[0], t - simple_period)
    return sparse.kron(across, sparse.eye_array(size))


def _factor_round(n: int, factors: list[int], t: int) -> sparse.sparray:
    """Round t of the hyper-hypercube: groups of factors[t] ranks, a stride apart, average."""
    if not factors:
        return sparse.eye_array(n)
    factor, stride = factors[t], prod(factors[:t])
    groups = sparse.kron(_mean(factor), sparse.eye_array(stride))
    return sparse.kron(sparse.eye_array(n // (factor * stride)), groups)


def _simple_period(n: int, k: int) -> int:
    factors, rest = small_factors(n, k + 1)
    if rest == 1:
        return max(1, len(factors))
    digit, exponent = digits(n, k + 1)[0]
    return len(_factors(digit * (k + 1) ** exponent, k)) + 1 + exponent


def _simple_round(n: int, k: int, inner: bool, t: int) -> sparse.sparray:
    """Round t of Simple Base.

    n is written in base k+1; part l holds digit a_l times (k+1)^p_l ranks. First every part
    averages itself (gather); then part r = 0, 1, .. brings the smaller parts after it to the mean
    of all (hand out); parts that have done so, and at last the smallest, average within their
    blocks of (k+1)^p_l (settle).
    """
    factors, rest = small_factors(n, k + 1)
    if rest == 1:
        return _factor_round(n, factors, t)
    parts = digits(n, k + 1)
    sizes = [digit * (k + 1) ** exponent for digit, exponent in parts]
    gather = len(_factors(sizes[0], k))
    if t < gather:
        return _side_by_side([_repeated(size, k, t) for size in sizes])
    r, last = t - gather, len(parts) - 1
    settled = parts[:r] if r < last else parts
    # The smallest part hands nothing out, so it settles one round earlier than its place says.
    counters = [r - part - (part != last) for part in range(len(settled))]
    blocks = [
        _settle(digit, exponent, k, counter)
        for (digit, exponent), counter in zip(settled, counters, strict=True)
    ]
    if r < last:
        blocks.append(_hand_out(sizes[r:], parts[r][0], k, inner))
    return _side_by_side(blocks)


def _settle(digit: int, exponent: int, k: int, counter: int) -> sparse.sparray:
    """A part after its hand-out: its ``digit`` blocks average within, factor by factor."""
    if exponent == 0:
        return _repeated(digit, k, counter)
    block = (k + 1) ** exponent
    return sparse.kron(sparse.eye_array(digit), _repeated(block, k, counter))


def _hand_out(sizes: list[int], blocks: int, k: int, inner: bool) -> sparse.sparray:
    """Part sizes[0], in ``blocks`` blocks, gives each rank of the later parts one peer a block.

    The served ranks are taken from the smallest part up; peers from the end of each block.
    """
    first, total = sizes[0], sum(sizes)
    block, num_served = first // blocks, total - first
    starts = np.cumsum([0, *sizes])
    served = np.concatenate(
        [np.arange(starts[part], starts[part + 1]) for part in range(len(sizes) - 1, 0, -1)]
    )
    peers = np.arange(blocks)[:, None] * block + (block - 1 - np.arange(num_served))  # (block, i)
    weight = first / (blocks * total)
    own = np.ones(total)
    own[served] = 1 - blocks * weight
    own[peers] = 1 - weight
    heads, tails = np.tile(served, blocks), peers.ravel()
    exchange = Round.from_edges(
        total, np.concatenate([heads, tails]), np.concatenate([tails, heads]), weight, own
    ).sparse()
    if not inner:
        return exchange
    kept = (np.arange(blocks)[:, None] * block + np.arange(block - num_served)).ravel()
    whole, remainder = divmod(len(kept), k + 1)
    chunks = [sparse.kron(sparse.eye_array(whole), _mean(k + 1))] if whole else []
    chunks += [sparse.coo_array(_mean(remainder))] if remainder else []
    if not chunks:
        return exchange
    # The kept ranks have self weight 1 so far: replace that by the mean of their chunk.
    place = sparse.eye_array(total, format="csr")[kept]
    within = _side_by_side(chunks) - sparse.eye_array(len(kept))
    return exchange + place.T @ within @ place


def _repeated(size: int, k: int, counter: int) -> sparse.sparray:
    """The hyper-hypercube of ``size`` ranks, started over when its rounds are used up."""
    factors = _factors(size, k)
    return _factor_round(size, factors, counter % len(factors) if factors else 0)


def _factors(size: int, k: int) -> list[int]:
    return small_factors(size, k + 1)[0]


def _mean(size: int) -> Floats:
    return np.full((size, size), 1 / size)


def _side_by_side(blocks: list[sparse.sparray]) -> sparse.sparray:
    return sparse.block_diag(blocks, format="csr")
