"""A topology: a schedule of weighted graphs, round t -> mixing matrix W(t)."""

import hashlib
import operator
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, Literal, Self

import networkx as nx
import numpy as np

from gossamer.topologies.eigen import smallest_eigenvalue
from gossamer.topologies.errors import TopologyStochasticError
from gossamer.topologies.round import Round

Kind = Literal["SDS", "DS", "CS", "RS"]

STOCHASTIC_TOLERANCE = 1e-8  # how far row and column sums may be from 1, and W from its transpose
_SAMPLED_ROUNDS = 16  # a schedule that never repeats is described by its first rounds


def classify(round_: Round) -> Kind | None:
    """Return the strongest class a round belongs to, None if neither rows nor columns sum to 1.

    SDS is symmetric doubly stochastic, DS doubly stochastic, CS column-stochastic (averages through
    push-sum), RS row-stochastic (the limit is biased without a correction).
    """
    matrix = round_.sparse()
    rows = bool(np.abs(matrix.sum(axis=1) - 1).max() <= STOCHASTIC_TOLERANCE)
    columns = bool(np.abs(matrix.sum(axis=0) - 1).max() <= STOCHASTIC_TOLERANCE)
    if rows and columns:
        asymmetry = abs(matrix - matrix.T).max()
        return "SDS" if asymmetry <= STOCHASTIC_TOLERANCE else "DS"
    if columns:
        return "CS"
    return "RS" if rows else None


def classify_all(rounds: Iterable[Round]) -> Kind | None:
    """Return the strongest class that all the rounds belong to, None if there is none."""
    kinds = {classify(round_) for round_ in rounds}
    if None in kinds or kinds >= {"CS", "RS"}:
        return None
    weaker: tuple[Kind, ...] = ("CS", "RS", "DS", "SDS")
    return next(kind for kind in weaker if kind in kinds)


class Topology:
    """A schedule: a pure function from the round's index t to a `Round`.

    Any process can evaluate any round of any rank without communication. t counts mixing steps: it
    is advanced once per optimizer step, never per bucket or tensor. Rounds are cached: all of a
    period, the latest few of a schedule that never repeats.

    Attributes:
        name: name in the registry.
        n: number of ranks.
        kind: SDS, DS, CS or RS, of every round.
        period: 1 for a static graph, None for a random schedule, which never repeats.
        params: what it was built with.
        rho_ms: for a random schedule, the square root of lambda_max((I-J) E[W^T W] (I-J)), the
            contraction per round in mean square, where a formula is known; None otherwise.
    """

    def __init__(
        self,
        name: str,
        n: int,
        rounds: Callable[[int], Round],
        *,
        kind: Kind,
        period: int | None,
        params: Mapping[str, Any] | None = None,
        rho_ms: float | None = None,
    ) -> None:
        """Make a topology of a pure function; ``rounds`` is called with t in 0..period-1."""
        self.name = name
        self.n = n
        self.kind: Kind = kind
        self.period = period
        self.params = dict(params or {})
        self.rho_ms = rho_ms
        self._rounds = lru_cache(maxsize=period or 64)(rounds)

    @classmethod
    def static(cls, name: str, round_: Round, **params: Any) -> Self:
        """Make the topology that repeats one round; its class is read off the matrix.

        A matrix that is in no class is declared DS, so that validation names what is wrong.
        """
        kind = classify(round_) or "DS"
        return cls(name, round_.n, lambda t: round_, kind=kind, period=1, params=params)

    def __repr__(self) -> str:
        params = "".join(f", {key}={value!r}" for key, value in self.params.items())
        return f"Topology({self.name}, n={self.n}{params}, kind={self.kind}, period={self.period})"

    def round(self, t: int) -> Round:
        """Return round t, for t >= 0."""
        t = operator.index(t)
        if t < 0:
            raise ValueError(f"topology.round: t counts mixing steps from 0, got {t}")
        return self._rounds(t % self.period if self.period else t)

    @property
    def is_static(self) -> bool:
        """Say whether every round is the same."""
        return self.period == 1

    @property
    def is_symmetric(self) -> bool:
        """Say whether every W(t) is symmetric and doubly stochastic."""
        return self.kind == "SDS"

    @property
    def is_doubly_stochastic(self) -> bool:
        """Say whether every W(t) is doubly stochastic, so that averages are kept exactly."""
        return self.kind in ("SDS", "DS")

    @property
    def num_described(self) -> int:
        """How many first rounds describe the schedule: its period, or a sample if it has none."""
        return self.period or _SAMPLED_ROUNDS

    @property
    def degree(self) -> int:
        """Most messages a rank receives, or sends, in a round of the period (or of a sample)."""
        return max(self.round(t).max_degree for t in range(self.num_described))

    def lazy(self) -> "Topology":
        """Return the topology of (I + W(t)) / 2; no eigenvalue of a symmetric W stays negative."""
        return Topology(
            self.name,
            self.n,
            lambda t: _lazy_round(self.round(t)),
            kind=self.kind,
            period=self.period,
            params={**self.params, "lazy": True},
        )

    def lambda_min(self) -> float:
        """Return the smallest eigenvalue of W, the least one over a period (or over a sample).

        Raises:
            TopologyStochasticError: W is not symmetric.
        """
        if not self.is_symmetric:
            raise TopologyStochasticError(
                f"topology: lambda_min needs a symmetric W, got '{self.name}' of kind {self.kind}; "
                "use an undirected topology with weights 'metropolis'"
            )
        return min(smallest_eigenvalue(self.round(t)) for t in range(self.num_described))

    def digest(self) -> int:
        """Return a hash of n, class, period and first rounds; fits a signed 64-bit integer."""
        state = hashlib.blake2b(digest_size=8)
        state.update(f"{self.n} {self.kind} {self.period}".encode())
        for t in range(min(self.num_described, _SAMPLED_ROUNDS)):
            state.update(self.round(t).digest().to_bytes(8, "little"))
        return int.from_bytes(state.digest(), "little") >> 1

    def graph(self, t: int = 0) -> "nx.DiGraph[int]":
        """Return round t as a networkx graph: edge (j, i) has weight W[i, j], loops carry W[i, i].

        BlueFog's ``topo[i][j]`` is the transpose of this.
        """
        round_ = self.round(t)
        graph: nx.DiGraph[int] = nx.DiGraph()
        graph.add_nodes_from(range(self.n))
        graph.add_weighted_edges_from(
            (rank, rank, weight) for rank, weight in enumerate(round_.self_weight.tolist())
        )
        columns = round_.sources, round_.targets, round_.weights
        graph.add_weighted_edges_from(zip(*(column.tolist() for column in columns), strict=True))
        return graph


def _lazy_round(round_: Round) -> Round:
    return Round(
        n=round_.n,
        self_weight=(1 + round_.self_weight) / 2,
        indptr=round_.indptr,
        sources=round_.sources,
        weights=round_.weights / 2,
    )
