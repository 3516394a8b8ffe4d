"""Pairwise noise: neighbors add the same secret numbers with opposite signs (DECOR).

Rank i adds to its clipped sum its own noise z_i of standard deviation sigma C and, for each of its
partners j, +u_ij or -u_ij of standard deviation tau C, which both make from a key that they alone
share (arXiv:2405.01031; sigma_ldp = sigma C, sigma_cor = tau C there). Over all ranks the shared
parts cancel, so that averages carry the ranks' own noise only.

Partners are two ranks of which one sends to the other in some round: the union of the schedule's
graphs, over its period or, where it never repeats, its first rounds (``num_described``). It is
fixed for the run; which graph the messages take at a step is of no importance here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.algorithms.privacy.noise import SecretNoise, normal_terms, secret_key
from gossamer.runtime import Communicator, ConfigError, RowLayout
from gossamer.runtime.perturb import Probe
from gossamer.topologies import Topology

__all__ = ["PairwiseNoise", "alone_multipliers", "partners"]

_MOST_RANKS = 256
"""Beyond, what one rank can learn is not computed."""

Partners = tuple[tuple[int, ...], ...]
"""Per rank, the ranks it shares noise with, ascending."""


def partners(topology: Topology) -> Partners:
    """Return per rank whom it shares noise with: the undirected union of the rounds."""
    found: list[set[int]] = [set() for _ in range(topology.n)]
    for t in range(topology.num_described):
        round_ = topology.round(t)
        for target, source in zip(round_.targets.tolist(), round_.sources.tolist(), strict=True):
            found[target].add(source)
            found[source].add(target)
    return tuple(tuple(sorted(ranks)) for ranks in found)


def alone_multipliers(
    pairs: Partners, own: float, shared: float, shares: Sequence[float]
) -> NDArray[np.float64]:
    """Return, per rank, the noise that its examples have against any one other rank, (n,).

    Rank a knows its own numbers z_a and u_aj, sees every message, and colludes with nobody. What it
    sees of one release is post-processing of m_i = s_i + C w_i, i != a, where it can take off what
    it knows, so that w has the covariance

        S_a = own^2 I + shared^2 D L_a D,   over the ranks other than a,

    with L_a the Laplacian of the graph of pairs without rank a and D = diag(``shares``). One
    example of rank i moves s by C e_i v, |v| <= 1. After whitening this is a Gaussian mechanism of
    sensitivity sqrt(e_i^T S_a^-1 e_i), in each step and, the whitening being the same in all of
    them, adaptively over steps and with each step's Poisson sampling: noise multiplier
    (e_i^T S_a^-1 e_i)^-1/2. Returned is the least over a; ``own`` is a lower bound, reached
    against all partners of i together. Correlation over time is the same factor K^-1 on both kinds
    of noise and leaves it as it is. O(n^4): a second for 256 ranks.

    Args:
        pairs: per rank, its partners.
        own: sigma.
        shared: tau.
        shares: per rank, what it multiplies shared noise by.
    """
    n, d = len(pairs), shared * np.asarray(shares, np.float64)
    if own == 0:
        return np.zeros(n)
    laplacian = np.zeros((n, n))
    for i, peers in enumerate(pairs):
        laplacian[i, i] = len(peers)
        laplacian[i, list(peers)] = -1.0
    least = np.full(n, np.inf)
    for a, peers in enumerate(pairs):
        known = laplacian.copy()
        known[peers, peers] -= 1.0  # what they share with a
        others = np.arange(n) != a
        hidden = (d[:, None] * known * d)[np.ix_(others, others)]
        # Not one inverse for all a, updated: what it loses where tau is large is privacy.
        exposed = np.diag(np.linalg.inv(own**2 * np.eye(n - 1) + hidden))
        least[others] = np.minimum(least[others], exposed**-0.5)
    return least


class PairwiseNoise(SecretNoise):
    """Own noise, whole on every rank, and noise shared with each partner.

    The key of a pair is drawn by its lower rank from the operating system's entropy and reaches
    the other in one message from process to process, which no third rank is sent; nor is it
    derived from anything that others know. The message is as safe as the transport: over shared
    memory other programs of the same user can read it, between hosts it travels unencrypted, so
    against eavesdroppers on the network run over an encrypted one. Ranks of one process can read
    each other's memory anyway. Who learns a pair's key can take that part of the noise off, never
    the rank's own.

    Attributes:
        pairs: per rank, its partners.
        shares: per rank, what it multiplies shared noise by: 1 where all sums are divided by the
            same size, so that what is divided cancels in the mean.
        pair_keys: (local, most partners) int64, secret, in the order of ``pairs``; 0 fills up.
    """

    def __init__(
        self,
        comm: Communicator,
        noise_seed: int | None,
        multiplier: float,
        bound: float,
        sizes: Sequence[float],
    ) -> None:
        """Draw the keys of the pairs whose lower rank is hosted here; ``agree`` brings the rest.

        Args:
            comm: its topology says who is whose partner.
            noise_seed: makes keys repeatable, and the run not private.
            multiplier: tau, the noise of a pair over the clip norm.
            bound: C, what one example can move a sum by.
            sizes: per rank, what its sum is divided by.

        Raises:
            ConfigError: a rank has nobody to share noise with.
        """
        super().__init__("pairwise", comm, noise_seed)
        self.pairs = partners(comm.topology)
        self._multiplier, self._shared = multiplier, multiplier * bound
        lonely = [rank for rank, peers in enumerate(self.pairs) if not peers]
        if lonely:
            raise ConfigError(
                f"oracle.noise_mode: pairwise needs neighbors, and rank {lonely[0]} of {comm.n} "
                "has none; use local"
            )
        mean = sum(sizes) / len(sizes)
        self.shares = [size / mean for size in sizes]
        self.pair_keys = torch.zeros(comm.local, max(map(len, self.pairs)), dtype=torch.int64)
        for i, k, rank, peer in self._hosted_pairs():
            if rank < peer:
                self.pair_keys[i, k] = secret_key(noise_seed, f"pair/{rank}", peer)

    def agree(self, layout: RowLayout) -> None:
        """Send each pair's key to its other rank, and compare own noise as all modes do."""
        super().agree(layout)
        comm = self._comm
        table = torch.zeros(comm.local, comm.n, 1, dtype=torch.int64)
        for i, k, rank, peer in self._hosted_pairs():
            if rank < peer:
                table[i, peer] = self.pair_keys[i, k]
        heard = comm.all_to_all(table.to(comm.device), count=False).cpu()
        for i, k, rank, peer in self._hosted_pairs():
            if peer < rank:
                self.pair_keys[i, k] = heard[i, peer, 0]

    def _hosted_pairs(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield (row, place in its list, rank, partner) of the hosted ranks."""
        for i, rank in enumerate(self._comm.ranks):
            for k, peer in enumerate(self.pairs[rank]):
                yield i, k, rank, peer

    def terms(self, release: int, scales: Sequence[float]) -> list[list[tuple[int, Probe]]]:
        """Return own noise of ``scales``, and what partners share."""
        found = super().terms(release, scales)
        for i, k, rank, peer in self._hosted_pairs():
            scale = self._shared * self.shares[rank] * (1.0 if rank < peer else -1.0)
            found[i] += normal_terms(int(self.pair_keys[i, k]), release, scale)
        return found

    def variances(self, total: float, sizes: Sequence[float]) -> tuple[list[float], float]:
        """Return the variance in each hosted row, shared noise included, and in the mean."""
        own, mean = super().variances(total, sizes)
        added = [
            len(self.pairs[r]) * (self._shared * self.shares[r] / sizes[r]) ** 2
            for r in self._comm.ranks
        ]
        return [a + b for a, b in zip(own, added, strict=True)], mean

    @property
    def unknown_against_one(self) -> str | None:
        """Why ``against_one`` is not to be called; None where it is."""
        n = len(self.pairs)
        if n <= _MOST_RANKS:
            return None
        return (
            f"not computed: it takes time of order n^4, too long for n = {n} ranks (up to "
            f"{_MOST_RANKS} are done); at most epsilon, which counts a rank's own noise alone"
        )

    def against_one(self, own: float) -> list[float]:
        """Return each rank's noise multiplier against any one other rank, where it has ``own``."""
        found: list[float] = alone_multipliers(
            self.pairs, own, self._multiplier, self.shares
        ).tolist()
        return found

    # --- what a resume needs -----------------------------------------------------------------

    def fingerprint(self) -> float:
        """Return a number that tells other partners, exact in float64."""
        digest = hashlib.sha256(repr(self.pairs).encode()).digest()
        return float(int.from_bytes(digest[:6], "little"))

    def state(self) -> dict[str, Tensor]:
        """Return the secrets, a row per hosted rank."""
        return {**super().state(), "pair_keys": self.pair_keys.clone()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state`` returned."""
        super().load(state)
        self.pair_keys = state["pair_keys"].clone()
