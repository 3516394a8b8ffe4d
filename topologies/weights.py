"""Weight rules: from the edges of a graph to a mixing matrix.

A rule reads where the edges of a round are, not the weights they have. Degrees count neighbors,
not the rank itself. L = D - A is the Laplacian, with eigenvalues 0 = l_1 <= l_2 <= .. <= l_n.

Sources: metropolis, best_constant, fmmc, fdla: Xiao and Boyd, Systems and Control Letters 53, 2004,
and Boyd, Diaconis, Xiao, SIAM Review 46, 2004; push_sum: arXiv:1811.10792.
"""

import logging
from collections.abc import Callable
from types import MappingProxyType

import numpy as np
from scipy import sparse

from gossamer.topologies.connectivity import require_connected
from gossamer.topologies.eigen import second_eigenvalue, smallest_eigenvalue
from gossamer.topologies.errors import TopologyParameterError, TopologyStochasticError
from gossamer.topologies.optimized_weights import fdla, fdla_sdp, fmmc, fmmc_sdp
from gossamer.topologies.round import Floats, Round
from gossamer.topologies.topology import Topology, classify, classify_all

Rule = Callable[[Round], Round]

_SINKHORN_SWEEPS = 20_000
_SINKHORN_TOLERANCE = 1e-12

_log = logging.getLogger(__name__)


def metropolis(edges: Round) -> Round:
    """W_ij = 1 / (1 + max(d_i, d_j)), the rest on the diagonal: symmetric, positive diagonal."""
    degree = np.diff(edges.indptr)
    return _symmetric(edges, 1 / (1 + np.maximum(degree[edges.targets], degree[edges.sources])))


def max_degree(edges: Round) -> Round:
    """W = I - L / (d_max + 1)."""
    return _symmetric(edges, np.full(edges.num_messages, 1 / (1 + edges.max_degree)))


def best_constant(edges: Round) -> Round:
    """W = I - a L with a = 2 / (l_2 + l_n), the best single weight; rho = (l_n-l_2)/(l_n+l_2).

    A rank of high degree may get a negative self weight (a star's centre); that is logged.
    """
    if edges.num_messages == 0:
        return _symmetric(edges, np.zeros(0))
    # Eigenvalues of L through those of I - L / (2 d_max), which is a mixing matrix.
    scale = 2 * edges.max_degree
    half = _symmetric(edges, np.full(edges.num_messages, 1 / scale))
    l_2 = scale * (1 - second_eigenvalue(half))
    l_n = scale * (1 - smallest_eigenvalue(half))
    round_ = _symmetric(edges, np.full(edges.num_messages, 2 / (l_2 + l_n)))
    if (smallest := round_.self_weight.min()) < 0:
        rank = int(round_.self_weight.argmin())
        _log.warning(
            "topology.weights: 'best_constant' gives rank %d the self weight %.6g < 0",
            rank,
            smallest,
        )
    return round_


def row_stochastic(edges: Round) -> Round:
    """W[i, j] = 1 / (1 + indeg_i) for every in-neighbor and for i itself: rows sum to one.

    The limit is the average weighted by the left Perron vector pi. To correct it, every rank keeps
    y_i in R^n, y_i(0) = e_i, y <- W y, and divides its gradient by its own [y_i]_i -> pi_i.
    """
    share = 1 / (1 + np.diff(edges.indptr))
    return Round.from_edges(edges.n, edges.targets, edges.sources, share[edges.targets], share)


def push_sum(edges: Round) -> Round:
    """W[i, j] = 1 / (1 + outdeg_j) for every out-neighbor i of j and j itself: columns sum to one.

    State (x, w), w_0 = 1: x <- W x, w <- W w, read z = x / w; the sum of w stays n.
    """
    share = 1 / (1 + np.bincount(edges.sources, minlength=edges.n))
    return Round.from_edges(edges.n, edges.targets, edges.sources, share[edges.sources], share)


def sinkhorn(edges: Round) -> Round:
    """Scale rows and columns of the 0/1 pattern, self-loops added, until both sum to one.

    A strongly connected graph with self-loops has total support, so every edge keeps a positive
    weight (Sinkhorn and Knopp, 1967).

    Raises:
        TopologyConnectivityError: the graph is not strongly connected.
        TopologyStochasticError: no convergence.
    """
    n = edges.n
    pattern = Round.from_edges(n, edges.targets, edges.sources, 1.0, 1.0).sparse()
    require_connected(pattern, "a graph with weights 'sinkhorn'")
    transpose = sparse.csr_array(pattern.T)
    column_scale = np.ones(n)
    for _ in range(_SINKHORN_SWEEPS):
        row_scale = 1 / (pattern @ column_scale)
        column_scale = 1 / (transpose @ row_scale)
        row_sums = row_scale * (pattern @ column_scale)
        if np.abs(row_sums - 1).max() < _SINKHORN_TOLERANCE:
            scaled = row_scale[edges.targets] * column_scale[edges.sources]
            own = row_scale * column_scale
            return Round.from_edges(n, edges.targets, edges.sources, scaled, own)
    raise TopologyStochasticError(
        f"topology.weights: 'sinkhorn' did not converge in {_SINKHORN_SWEEPS} sweeps (row sums "
        f"still off by {np.abs(row_sums - 1).max():.2g}); use 'push_sum', or add edges"
    )


_UNDIRECTED_RULES: dict[str, Rule] = {
    "metropolis": metropolis,
    "max_degree": max_degree,
    "best_constant": best_constant,
    "fmmc": fmmc,
    "fdla": fdla,
    "fmmc_sdp": fmmc_sdp,
    "fdla_sdp": fdla_sdp,
}
RULES: MappingProxyType[str, Rule] = MappingProxyType(
    {
        **_UNDIRECTED_RULES,
        "uniform": row_stochastic,  # the same formula, but refused where it is biased
        "row_stochastic": row_stochastic,
        "push_sum": push_sum,
        "sinkhorn": sinkhorn,
    }
)
SIGNED_RULES = frozenset(
    {"best_constant", "fdla", "fdla_sdp"}
)  # they may give negative weights on purpose
_LOCAL_RULES = frozenset({"metropolis", "max_degree", "uniform", "row_stochastic", "push_sum"})


def weigh(edges: Round, rule: str, *, allow_biased: bool = False) -> Round:
    """Return a round with the same edges and the weights of a rule.

    Args:
        edges: where the edges are; its weights are not read.
        rule: a name in `RULES`.
        allow_biased: accept 'uniform' on an irregular graph, where the limit is not the average.

    Raises:
        TopologyParameterError: the rule is unknown, or needs an undirected graph.
        TopologyStochasticError: 'uniform' on an irregular graph, or 'sinkhorn' failed.
    """
    if rule in _UNDIRECTED_RULES and not edges.is_undirected:
        raise TopologyParameterError(
            f"topology.weights: '{rule}' needs an undirected graph, and {_one_way(edges)} has no "
            "way back; use 'sinkhorn' (doubly stochastic), 'push_sum' or 'row_stochastic'"
        )
    round_ = RULES[rule](edges)
    if rule == "uniform" and not allow_biased and classify(round_) == "RS":
        raise TopologyStochasticError(
            "topology.weights: 'uniform' on an irregular graph is only row-stochastic: its limit "
            "is a weighted mean of the ranks, not their average; use 'metropolis' (undirected) or "
            "'sinkhorn' (directed), or set allow_biased: true"
        )
    return round_


def default_rule(edges: Round) -> str:
    """Return the rule for a graph that names none: doubly stochastic on any connected graph."""
    if edges.is_undirected:
        return "metropolis"
    in_degree = np.diff(edges.indptr)
    out_degree = np.bincount(edges.sources, minlength=edges.n)
    regular = np.all(in_degree == in_degree[0]) and np.all(out_degree == in_degree[0])
    return "uniform" if regular else "sinkhorn"


def reweighted(topology: Topology, rule: str, *, allow_biased: bool = False) -> Topology:
    """Return the topology with the same edges in every round and the weights of a rule.

    A schedule that averages exactly does so through its own weights; replacing them is logged.

    Raises:
        TopologyParameterError: the rule needs the whole graph and this is a schedule.
        TopologyError: as for `weigh`.
    """
    params = {**topology.params, "weights": rule}
    if topology.is_static:
        round_ = weigh(topology.round(0), rule, allow_biased=allow_biased)
        return Topology.static(topology.name, round_, **params)
    if rule not in _LOCAL_RULES:
        raise TopologyParameterError(
            f"topology.weights: '{rule}' needs one connected graph, and a round of the schedule "
            f"'{topology.name}' is not; leave weights out, or use 'metropolis'"
        )

    def rounds(t: int) -> Round:
        return weigh(topology.round(t), rule, allow_biased=allow_biased)

    own = [topology.round(t).digest() for t in range(topology.num_described)]
    described = [rounds(t) for t in range(topology.num_described)]
    if own == [round_.digest() for round_ in described]:
        return topology  # its weights are the rule's already
    _log.warning(
        "topology.weights: '%s' replaces the weights of '%s'; what it promises about agreement "
        "(exact after a period) no longer holds",
        rule,
        topology.name,
    )
    kind = classify_all(described) or "RS"
    return Topology(
        topology.name, topology.n, rounds, kind=kind, period=topology.period, params=params
    )


def _symmetric(edges: Round, weights: Floats) -> Round:
    """Weigh undirected edges and leave the rest to the diagonal."""
    rest = 1 - np.bincount(edges.targets, weights, minlength=edges.n)
    return Round.from_edges(edges.n, edges.targets, edges.sources, weights, rest)


def _one_way(edges: Round) -> str:
    forward = set(zip(edges.sources.tolist(), edges.targets.tolist(), strict=True))
    source, target = min((j, i) for j, i in forward if (i, j) not in forward)
    return f"edge {source} -> {target}"
