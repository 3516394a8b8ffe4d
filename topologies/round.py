"""One round of a topology: who sends to whom, with which weights.

Conventions, used everywhere: ranks are 0..n-1 and x_i <- sum_j W[i, j] x_j, so W[i, j] != 0 for
i != j means that j sends to i, and row i of W holds the weights of what i receives.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Round:
    """A sparse mixing matrix W, stored as the in-edges of each rank.

    The arrays are read-only. A zero weight is no edge. Sources ascend within a rank, which is the
    order in which the runtime adds messages.

    Attributes:
        n: number of ranks.
        self_weight: (n,) float64, the diagonal of W.
        indptr: (n + 1,) int64, rank i receives the edges indptr[i] .. indptr[i + 1] - 1.
        sources: (edges,) int64, the rank that sends.
        weights: (edges,) float64, W[target, source], never zero.
    """

    n: int
    self_weight: Floats
    indptr: Ints
    sources: Ints
    weights: Floats

    def __post_init__(self) -> None:
        for array in (self.self_weight, self.indptr, self.sources, self.weights):
            array.setflags(write=False)

    @classmethod
    def from_edges(
        cls,
        n: int,
        targets: ArrayLike,
        sources: ArrayLike,
        weights: ArrayLike,
        self_weight: ArrayLike,
    ) -> Self:
        """Build a round from a list of edges in any order.

        Args:
            n: number of ranks.
            targets: (edges,) ranks that receive.
            sources: (edges,) ranks that send.
            weights: (edges,) or one number; weights of repeated edges add, those of edges from a
                rank to itself add to its self weight.
            self_weight: (n,) or one number, the diagonal of W.
        """
        targets = np.asarray(targets, np.int64)
        diagonal = np.arange(n)
        rows = np.concatenate([targets, diagonal])
        columns = np.concatenate([np.asarray(sources, np.int64), diagonal])
        values = np.concatenate(
            [
                np.broadcast_to(np.asarray(weights, np.float64), targets.shape),
                np.broadcast_to(np.asarray(self_weight, np.float64), (n,)),
            ]
        )
        return cls.from_matrix(sparse.coo_array((values, (rows, columns)), shape=(n, n)))

    @classmethod
    def from_matrix(cls, matrix: ArrayLike | sparse.sparray) -> Self:
        """Build a round from a mixing matrix, dense or scipy sparse, (n, n)."""
        csr = sparse.csr_array(matrix, dtype=np.float64)  # adds up repeated entries
        csr.sort_indices()
        n = csr.shape[0]
        targets = np.repeat(np.arange(n), np.diff(csr.indptr))
        edge = (csr.indices != targets) & (csr.data != 0)
        indptr = np.zeros(n + 1, np.int64)
        np.cumsum(np.bincount(targets[edge], minlength=n), out=indptr[1:])
        return cls(
            n=n,
            self_weight=np.array(csr.diagonal(), np.float64),
            indptr=indptr,
            sources=csr.indices[edge].astype(np.int64),
            weights=csr.data[edge],
        )

    @classmethod
    def circulant(cls, n: int, offsets: Sequence[int], weights: ArrayLike, own: float) -> Self:
        """Build the round in which every rank i receives from i + o, for each offset o.

        Sorts within the ranks only, so that a complete graph of thousands of ranks stays cheap.

        Args:
            n: number of ranks.
            offsets: distinct modulo n, none of them 0 modulo n.
            weights: one per offset, or one number; not zero.
            own: the self weight.
        """
        degree = len(offsets)
        sources = (np.arange(n)[:, None] + np.asarray(offsets, np.int64).reshape(1, degree)) % n
        order = np.argsort(sources, axis=1)
        spread = np.broadcast_to(np.asarray(weights, np.float64), (degree,))
        return cls(
            n=n,
            self_weight=np.full(n, own),
            indptr=np.arange(n + 1, dtype=np.int64) * degree,
            sources=np.take_along_axis(sources, order, axis=1).ravel(),
            weights=spread[order].ravel(),
        )

    @property
    def is_undirected(self) -> bool:
        """Say whether every edge has one in the other direction, whatever their weights."""
        indptr, targets, _ = self._transpose
        return np.array_equal(indptr, self.indptr) and np.array_equal(targets, self.sources)

    @property
    def num_messages(self) -> int:
        """Messages sent in this round, over all ranks."""
        return len(self.sources)

    @cached_property
    def targets(self) -> Ints:
        """(edges,) int64, the rank that receives, beside ``sources`` and ``weights``."""
        return np.repeat(np.arange(self.n), np.diff(self.indptr))

    @cached_property
    def max_degree(self) -> int:
        """Most messages that any rank receives, or sends, in this round."""
        received = np.diff(self.indptr)
        sent = np.bincount(self.sources, minlength=self.n)
        return int(max(received.max(), sent.max()))

    def recv(self, rank: int) -> tuple[Ints, Floats]:
        """Return the ranks that ``rank`` receives from, ascending, and their weights."""
        edges = slice(self.indptr[rank], self.indptr[rank + 1])
        return self.sources[edges], self.weights[edges]

    def send(self, rank: int) -> tuple[Ints, Floats]:
        """Return the ranks that ``rank`` sends to, ascending, and the weights they give it."""
        indptr, targets, weights = self._transpose
        edges = slice(indptr[rank], indptr[rank + 1])
        return targets[edges], weights[edges]

    @cached_property
    def _transpose(self) -> tuple[Ints, Ints, Floats]:
        order = np.argsort(self.sources, kind="stable")  # stable: targets stay ascending
        indptr = np.zeros(self.n + 1, np.int64)
        np.cumsum(np.bincount(self.sources, minlength=self.n), out=indptr[1:])
        arrays = indptr, self.targets[order], self.weights[order]
        for array in arrays:
            array.setflags(write=False)
        return arrays

    @cached_property
    def _csr(self) -> sparse.csr_array:
        edges = (self.weights, self.sources, self.indptr)
        off_diagonal = sparse.csr_array(edges, shape=(self.n, self.n))
        return sparse.csr_array(off_diagonal + sparse.diags_array(self.self_weight))

    def sparse(self) -> sparse.csr_array:
        """Return W with its diagonal, (n, n) float64, as a copy of its own."""
        return self._csr.copy()

    def matrix(self) -> Floats:
        """Return W as a dense (n, n) float64 array."""
        dense: Floats = self._csr.toarray()
        return dense

    def apply(self, x: ArrayLike) -> Floats:
        """Return W x in float64, for x of shape (n,) or (n, d)."""
        mixed: Floats = self._csr @ np.asarray(x, np.float64)
        return mixed

    def digest(self) -> int:
        """Return a hash of the whole round; it fits a signed 64-bit integer and is not negative.

        Equal on two processes exactly if they hold the same edges and the same weight bits, up to
        collisions of a 63-bit hash.
        """
        state = hashlib.blake2b(self.n.to_bytes(8, "little"), digest_size=8)
        arrays: tuple[NDArray[Any], ...] = (
            self.self_weight,
            self.indptr,
            self.sources,
            self.weights,
        )
        for array in arrays:
            state.update(array.tobytes())
        return int.from_bytes(state.digest(), "little") >> 1
