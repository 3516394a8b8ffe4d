"""A user's own graph: an edge list, a matrix, a networkx graph, a file, or a function of t."""

import importlib
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
from scipy import sparse

from gossamer.topologies.errors import (
    TopologyParameterError,
    TopologySizeError,
    TopologyWeightError,
)
from gossamer.topologies.round import Round
from gossamer.topologies.topology import Kind, Topology, classify_all
from gossamer.topologies.weights import default_rule, weigh

_FORMS = (
    "a list of [source, target] or [source, target, weight], a .npy, .gml, .graphml, .edgelist or "
    ".adjlist file, a networkx graph, a matrix, or 'module:function' returning one of these for t"
)

_log = logging.getLogger(__name__)


def custom(
    n: int,
    edges: Any,
    weights: str | None = None,
    directed: bool | None = None,
    kind: Kind | None = None,
    period: int | None = None,
    allow_biased: bool = False,
) -> Topology:
    """Run on a graph of your own, static or a function of the round.

    Labels that are the integers 0..n-1 are ranks; others are sorted as text and numbered, and the
    map is logged. Weights of repeated edges add. Edges with no weights get those of a rule.

    Args:
        n: number of ranks; the graph must have as many nodes.
        edges: a list of [source, target] or [source, target, weight]; a matrix W; a networkx graph;
            the path of a .npy, .gml, .graphml, .edgelist or .adjlist file; a pure function of t
            that returns any of these, or its name as 'module:function'.
        weights: a rule, in place of any weights given; default: the weights given, or for none
            metropolis, uniform or sinkhorn, whichever is doubly stochastic.
        directed: whether [a, b] is a to b only; default: as the graph or file says, lists and
            matrices directed, .edgelist and .adjlist undirected.
        kind: class the matrices are declared to be in; default: SDS or DS.
        period: rounds after which a function of t repeats; default: never.
        allow_biased: accept the rule 'uniform' on an irregular graph.

    Raises:
        TopologyParameterError: no such file or function, or not readable as a graph.
        TopologySizeError: the graph does not have n nodes.
        TopologyWeightError: some edges have a weight and some do not, or one is not a number.
    """
    params = {"edges": edges if isinstance(edges, str | list) else type(edges).__name__}
    params |= {} if weights is None else {"weights": weights}
    if isinstance(edges, str | Path):
        edges = _load(str(edges), directed)

    def as_weighed_round(given: Any) -> Round:
        round_, has_weights = as_round(n, given, directed)
        rule = weights if weights or has_weights else default_rule(round_)
        return weigh(round_, rule, allow_biased=allow_biased) if rule else round_

    if not callable(edges):
        if period not in (None, 1):
            raise TopologyParameterError(
                f"topology.period: only a function of t has one, got {period}; leave it out"
            )
        static = as_weighed_round(edges)
        kind = kind or _declared([static], weights)
        return Topology("custom", n, lambda t: static, kind=kind, period=1, params=params)

    function: Callable[[int], Any] = edges
    if period is not None and period < 1:
        raise TopologyParameterError(f"topology.period: must be 1 or more, got {period}")
    topology = Topology(
        "custom",
        n,
        lambda t: as_weighed_round(function(t)),
        kind=kind or "DS",
        period=period,
        params={**params, "period": period},
    )
    repeated = as_weighed_round(function(period or 0))
    if topology.round(0).digest() != repeated.digest():
        raise TopologyParameterError(
            f"topology.edges: the function's round {period or 0} differs from round 0; it must be "
            "a pure function of t, and repeat after `period` rounds where that is given"
        )
    described = [topology.round(t) for t in range(topology.num_described)]
    topology.kind = kind or _declared(described, weights)
    return topology


def num_nodes(source: str, directed: bool | None = None) -> int:
    """Return how many nodes the graph has that a file or 'module:function' (its round 0) holds."""
    given = _load(source, directed)
    given = given(0) if callable(given) else given
    given = _graph_of(given, directed) if isinstance(given, list | tuple) else given
    if isinstance(given, Round):
        return given.n
    return given.number_of_nodes() if isinstance(given, nx.Graph) else len(given)


def as_round(n: int, given: Any, directed: bool | None = None) -> tuple[Round, bool]:
    """Return a graph in any accepted form as a round, and whether it came with weights.

    A graph without weights comes back with some non-zero weight on every edge, for a rule to
    replace.
    """
    if isinstance(given, Round):
        _check_size(n, given.n)
        return given, True
    if isinstance(given, nx.Graph):
        return _from_graph(n, given, directed)
    if isinstance(given, list | tuple):
        return _from_graph(n, _graph_of(given, directed), directed)
    if isinstance(given, np.ndarray) or sparse.issparse(given):
        if given.ndim != 2 or given.shape[0] != given.shape[1]:
            raise TopologySizeError(
                f"topology.edges: a mixing matrix is square, got shape {given.shape}"
            )
        _check_size(n, given.shape[0])
        if directed is False:
            raise TopologyParameterError(
                "topology.directed: a matrix says for itself which edges go both ways; leave it out"
            )
        return Round.from_matrix(given), True
    raise TopologyParameterError(f"topology.edges: expected {_FORMS}; got {type(given).__name__}")


def _graph_of(edges: Iterable[Any], directed: bool | None) -> "nx.Graph[Any]":
    graph: nx.Graph[Any] = nx.MultiGraph() if directed is False else nx.MultiDiGraph()
    for place, edge in enumerate(edges):
        if not isinstance(edge, list | tuple) or len(edge) not in (2, 3):
            raise TopologyParameterError(
                f"topology.edges: item {place} must be [source, target] or [source, target, "
                f"weight], got {edge!r}"
            )
        if any(isinstance(rank, bool) or not isinstance(rank, int | str) for rank in edge[:2]):
            raise TopologyParameterError(
                f"topology.edges: item {place} must name ranks by integers or labels, got {edge!r}"
            )
        graph.add_edge(edge[0], edge[1], **({"weight": edge[2]} if len(edge) == 3 else {}))
    return graph


def _from_graph(n: int, graph: "nx.Graph[Any]", directed: bool | None) -> tuple[Round, bool]:
    if directed and not graph.is_directed():
        raise TopologyParameterError(
            "topology.directed: the graph is undirected; leave it out, or give a directed graph"
        )
    _check_size(n, graph.number_of_nodes())
    ranks = _ranks(graph)
    both_ways = not graph.is_directed() or directed is False
    sources: list[int] = []
    targets: list[int] = []
    weights: list[Any] = []
    for a, b, data in graph.edges(data=True):
        for source, target in ((a, b), (b, a)) if both_ways and a != b else ((a, b),):
            sources.append(ranks[source])
            targets.append(ranks[target])
            weights.append(data.get("weight"))
    given = [weight is not None for weight in weights]
    if not any(given):
        between = [(i, j) for i, j in zip(targets, sources, strict=True) if i != j]
        edges = np.array(between, np.int64).reshape(-1, 2)
        return Round.from_edges(n, edges[:, 0], edges[:, 1], 1.0, 0.0), False
    if not all(given):
        missing = given.index(False)
        raise TopologyWeightError(
            f"topology.edges: {sum(given)} of {len(given)} edges have a weight, but "
            f"{sources[missing]} -> {targets[missing]} has none; give all of them, or none"
        )
    values = [_number(weight, j, i) for weight, j, i in zip(weights, sources, targets, strict=True)]
    return Round.from_edges(n, targets, sources, values, 0.0), True


def _number(weight: Any, source: int, target: int) -> float:
    try:
        return float(weight)
    except (TypeError, ValueError) as error:
        raise TopologyWeightError(
            f"topology.edges: the weight of {source} -> {target} is {weight!r}, must be a number"
        ) from error


def _ranks(graph: "nx.Graph[Any]") -> Mapping[Any, int]:
    labels = list(graph.nodes)
    try:
        ranks = {label: int(str(label)) for label in labels}
    except ValueError:
        ranks = {}
    if sorted(ranks.values()) == list(range(len(labels))):
        return ranks
    ranks = {label: rank for rank, label in enumerate(sorted(labels, key=str))}
    _log.warning("topology.edges: labels are not the ranks 0..%d; mapped %s", len(ranks) - 1, ranks)
    return ranks


def _check_size(n: int, nodes: int) -> None:
    if nodes != n:
        raise TopologySizeError(
            f"topology.ranks: the graph has {nodes} nodes and the run {n} ranks; use ranks: "
            f"{nodes}, or a graph in which each of the {n} ranks has an edge"
        )


def _declared(rounds: Iterable[Round], rule: str | None) -> Kind:
    """Return the class of rounds of which none was declared.

    A rule's own class stands. Given weights that miss double stochasticity are no choice, more
    often a slip: they are held to it, and the check's message says how to declare them.
    """
    kind = classify_all(rounds)
    if rule is None and kind not in ("SDS", "DS"):
        return "DS"
    return kind or "DS"


def _load(source: str, directed: bool | None) -> Any:
    """Return the matrix, graph or function that a file name or 'module:function' stands for."""
    suffix = Path(source).suffix
    if suffix not in _READERS:
        return _import(source)
    if not Path(source).is_file():
        raise TopologyParameterError(f"topology.edges: there is no file {source!r}")
    try:
        return _READERS[suffix](source, directed)
    except (
        ValueError,
        TypeError,
        LookupError,
        SyntaxError,
        OSError,
        EOFError,
        nx.NetworkXException,
    ) as error:
        raise TopologyParameterError(
            f"topology.edges: {source!r} cannot be read as {suffix}: {error}; it may be cut short"
        ) from error


def _read_gml(path: str, directed: bool | None) -> "nx.Graph[Any]":
    try:
        graph: nx.Graph[Any] = nx.read_gml(path)
    except nx.NetworkXError as error:
        if "no 'label' attribute" not in str(error):
            raise
        graph = nx.read_gml(path, label="id")
    return graph


def _read_edgelist(path: str, directed: bool | None) -> "nx.Graph[Any]":
    empty: Any = nx.MultiDiGraph if directed else nx.MultiGraph  # the stubs want no classes
    try:
        graph: nx.Graph[Any] = nx.read_edgelist(path, create_using=empty)
    except TypeError:  # a bare third column is a weight
        graph = nx.read_weighted_edgelist(path, create_using=empty)
    return graph


def _read_adjlist(path: str, directed: bool | None) -> "nx.Graph[Any]":
    # Not a multigraph: files often list an undirected edge on the lines of both its ends.
    graph: nx.Graph[Any] = nx.read_adjlist(path, create_using=nx.DiGraph if directed else nx.Graph)
    return graph


_READERS: dict[str, Callable[[str, bool | None], Any]] = {
    ".npy": lambda path, directed: np.load(path, allow_pickle=False),
    ".gml": _read_gml,
    ".graphml": lambda path, directed: nx.read_graphml(path),
    ".edgelist": _read_edgelist,
    ".adjlist": _read_adjlist,
}


def _import(source: str) -> Callable[[int], Any]:
    module, colon, function = source.partition(":")
    if not colon:
        raise TopologyParameterError(f"topology.edges: expected {_FORMS}; got {source!r}")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:  # an installed command does not look in the current folder by itself
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise TopologyParameterError(
            f"topology.edges: cannot import {source!r}: {error}; it is looked for in the current "
            "folder and on PYTHONPATH"
        ) from error
    finally:
        if added:
            sys.path.remove(here)
    if not callable(found):
        raise TopologyParameterError(
            f"topology.edges: {source!r} is a {type(found).__name__}, not a function of t"
        )
    checked: Callable[[int], Any] = found
    return checked
