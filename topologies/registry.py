"""Topologies by name, with the options they all share."""

import difflib
import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gossamer.topologies import circulants, equi, graphs, matchings, one_peer, random_graphs
from gossamer.topologies.base import base, hyper_hypercube
from gossamer.topologies.custom import custom
from gossamer.topologies.errors import TopologyParameterError, TopologySizeError
from gossamer.topologies.hierarchical import HierarchicalTopology
from gossamer.topologies.topology import Topology
from gossamer.topologies.validation import check_mixing, check_rounds, checked
from gossamer.topologies.weights import RULES, SIGNED_RULES, reweighted

factories: dict[str, Callable[..., Topology]] = {
    factory.__name__: factory
    for factory in (
        circulants.ring,
        circulants.directed_ring,
        graphs.path,
        graphs.star,
        circulants.complete,
        graphs.grid,
        graphs.torus,
        graphs.hypercube,
        graphs.tree,
        circulants.exponential,
        circulants.p_peer_exponential,
        circulants.circulant,
        graphs.de_bruijn,
        circulants.paley,
        graphs.margulis,
        random_graphs.erdos_renyi,
        random_graphs.random_regular,
        random_graphs.small_world,
        equi.equi_static,
        one_peer.one_peer_exponential,
        one_peer.one_peer_hypercube,
        hyper_hypercube,
        base,
        equi.equi_dyn,
        matchings.random_matching,
        matchings.bipartite_matching,
        matchings.random_edge,
        custom,
    )
}
_ALIASES = {"expander": "random_regular"}

_log = logging.getLogger(__name__)


def names() -> list[str]:
    """Return the names that `build` knows."""
    return list(factories)


def nearest(word: str, known: Sequence[str]) -> str:
    """Return the known names nearest to a word, quoted, to end an error message with."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return (
        "did you mean " + " or ".join(f"'{name}'" for name in close)
        if close
        else ("known are " + ", ".join(known))
    )


def build(
    name: str,
    n: int,
    *,
    weights: str | None = None,
    lazy: bool = False,
    allow_biased: bool = False,
    allow_negative: bool = False,
    check: Literal["strict", "off"] | bool = "strict",
    hierarchical: Mapping[str, int] | None = None,
    **params: Any,
) -> Topology:
    """Build a topology by name and check it.

    Example:
        >>> build("base", 25, k=4).period
        2

    Args:
        name: a name in `names`; hyphens and underscores are alike.
        n: number of ranks.
        weights: a rule in `weights.RULES` in place of the graph's own weights.
        lazy: use (I + W(t)) / 2.
        allow_biased: accept the rule 'uniform' on an irregular graph.
        allow_negative: accept negative weights in a graph of the user's.
        check: 'off' skips the checks of weights, connectivity and sums (YAML reads a bare off as
            False, which means the same).
        hierarchical: {'local': L}: the topology among machines of L ranks each, exact averages
            within a machine.
        **params: parameters of this topology.

    Raises:
        TopologyError: the subclass says which check failed; the message names field and fix.
    """
    factory = _find(name)
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise TopologySizeError(f"topology.ranks: must be a whole number, 1 or more, got {n!r}")
    if check not in ("strict", "off", True, False):
        raise TopologyParameterError(f"topology.check: must be 'strict' or 'off', got {check!r}")
    weights = weights if weights is None else str(weights).replace("-", "_")
    if weights is not None and weights not in RULES:
        raise TopologyParameterError(
            f"topology.weights: unknown rule {weights!r}; {nearest(weights, list(RULES))}"
        )
    local = _local_ranks(n, hierarchical)
    params = _checked_params(factory, params)
    weighs_itself = "weights" in inspect.signature(factory).parameters
    if weighs_itself:  # a user's graph, for which no weights may be right but the rule's
        params |= {"weights": weights, "allow_biased": allow_biased}
    topology = factory(n // local, **params)
    if weights is not None and not weighs_itself:
        topology = reweighted(topology, weights, allow_biased=allow_biased)
    strict = check in ("strict", True)
    allow_negative = allow_negative or weights in SIGNED_RULES
    if strict:
        check_rounds(topology, allow_negative=allow_negative)
        if topology.period is None and topology.rho_ms is None:
            topology = checked(topology, allow_negative=allow_negative)
    if lazy:
        topology = topology.lazy()
    if strict:
        check_mixing(topology)
    return topology if hierarchical is None else HierarchicalTopology(topology, local)


def _find(name: str) -> Callable[..., Topology]:
    key = str(name).replace("-", "_").lower()
    key = _ALIASES.get(key, key)
    if key not in factories:
        raise TopologyParameterError(f"topology.name: unknown {name!r}; {nearest(key, names())}")
    return factories[key]


def _local_ranks(n: int, hierarchical: Mapping[str, Any] | None) -> int:
    if hierarchical is None:
        return 1
    if not isinstance(hierarchical, Mapping) or set(hierarchical) != {"local"}:
        raise TopologyParameterError(
            f"topology.hierarchical: must be {{local: RANKS_PER_MACHINE}}, got {hierarchical!r}"
        )
    local = hierarchical["local"]
    if not isinstance(local, int) or isinstance(local, bool) or local < 1:
        hint = " ('auto' is filled in by a launcher that knows the machines)"
        raise TopologyParameterError(
            f"topology.hierarchical.local: must be a whole number, 1 or more, got {local!r}"
            f"{hint if local == 'auto' else ''}"
        )
    if n % local:
        raise TopologyParameterError(
            f"topology.hierarchical.local: {local} ranks per machine do not divide {n} ranks; use "
            f"a divisor of {n}: machines of unequal size would weigh ranks unequally"
        )
    return local


def _checked_params(factory: Callable[..., Topology], params: dict[str, Any]) -> dict[str, Any]:
    """Refuse unknown parameters and wrong types; drop a seed where nothing is random."""
    hints = get_type_hints(factory)
    own = [key for key in inspect.signature(factory).parameters if key != "n"]
    if "seed" in params and "seed" not in own:
        _log.warning("topology.seed: nothing in '%s' is random; not used", factory.__name__)
        params = {key: value for key, value in params.items() if key != "seed"}
    for key, value in params.items():
        if key not in own:
            suggestion = nearest(key, own) if own else "it takes none"
            raise TopologyParameterError(
                f"topology.{key}: not a parameter of {factory.__name__}; {suggestion}"
            )
        if not _fits(value, hints[key]):
            raise TopologyParameterError(
                f"topology.{key}: must be {_spelled(hints[key])}, got {value!r}"
            )
    for key, parameter in inspect.signature(factory).parameters.items():
        if parameter.default is parameter.empty and key != "n" and key not in params:
            raise TopologyParameterError(
                f"topology.{key}: '{factory.__name__}' needs {_spelled(hints[key])} here"
            )
    return params


def _fits(value: Any, hint: Any) -> bool:
    """Say whether a value from YAML has the annotated type; a bool is no number here."""
    origin = get_origin(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, choice) for choice in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if origin is Sequence:
        (item,) = get_args(hint)
        return isinstance(value, list | tuple) and all(_fits(each, item) for each in value)
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _spelled(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_spelled(choice) for choice in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in get_args(hint))
    if get_origin(hint) is Sequence:
        return "a list of whole numbers"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(
        hint, "null" if hint is type(None) else "a value"
    )
