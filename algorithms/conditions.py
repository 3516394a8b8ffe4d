"""What an algorithm asks of W and of its oracle, checked before the first step."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

from gossamer.runtime.errors import ConfigError
from gossamer.topologies import Topology, build

if TYPE_CHECKING:
    from gossamer.algorithms.protocols import Algorithm, Oracle

__all__ = [
    "LAMBDA_MIN_TOLERANCE",
    "Lazy",
    "lazy_above",
    "needs_static",
    "require_column_stochastic",
    "require_doubly_stochastic",
    "require_form",
    "require_lambda_min",
    "require_own_weight",
    "require_static",
    "require_symmetric",
]

log = logging.getLogger("gossamer")

LAMBDA_MIN_TOLERANCE = 1e-6

Lazy = Literal["auto", "always", "never"]
"""When to run on (I + W) / 2: where the condition asks for it, always, or never (then refuse)."""


def require_doubly_stochastic(algorithm: str, topology: Topology) -> Topology:
    """Refuse a W whose columns or rows do not sum to 1: the mean over ranks would drift."""
    if not topology.is_doubly_stochastic:
        raise ConfigError(
            f"topology: {algorithm} needs a doubly stochastic W, but {topology.name} is "
            f"{topology.kind}; use weights: metropolis (undirected) or sinkhorn (directed), or an "
            "algorithm for directed graphs: sgp, push-diging"
        )
    return topology


def require_symmetric(algorithm: str, topology: Topology) -> Topology:
    """Refuse a W that is not symmetric and doubly stochastic."""
    require_doubly_stochastic(algorithm, topology)
    if not topology.is_symmetric:
        raise ConfigError(
            f"topology: {algorithm} needs a symmetric W, but {topology.name} is directed; "
            "use an undirected graph (ring, torus, hypercube), or gradient-tracking"
        )
    return topology


class _NotStaticError(ConfigError):
    """The topology is a schedule and the algorithm needs a static one."""


def require_static(algorithm: str, topology: Topology) -> Topology:
    """Refuse a schedule: W must be the same in every round."""
    if not topology.is_static:
        raise _NotStaticError(
            f"topology: {algorithm} needs one fixed graph, but {topology.name} changes over time; "
            "use a static one (ring, torus, exponential, hypercube)"
        )
    return topology


def needs_static(algorithm: Algorithm) -> bool:
    """Return whether ``algorithm`` refuses every W that changes over time."""
    try:
        algorithm.adapt(build("one_peer_hypercube", 4))  # symmetric, doubly stochastic, changing
    except _NotStaticError:
        return True
    except ConfigError:
        return False
    return False


def require_column_stochastic(algorithm: str, topology: Topology) -> Topology:
    """Refuse a W whose columns do not sum to 1: push-sum would lose mass."""
    if topology.kind == "RS":
        raise ConfigError(
            f"topology: {algorithm} needs a column-stochastic W, but {topology.name} is "
            "row-stochastic; use weights: push_sum"
        )
    return topology


def require_lambda_min(algorithm: str, topology: Topology, bound: float) -> Topology:
    """Refuse a symmetric W whose smallest eigenvalue is not above ``bound``."""
    lambda_min = topology.lambda_min()
    if lambda_min <= bound + LAMBDA_MIN_TOLERANCE:
        raise ConfigError(
            f"topology: {algorithm} needs lambda_min(W) > {bound:.3g}, but {topology.name} of "
            f"{topology.n} ranks has {lambda_min:.4f}; use topology: {{lazy: true}}, "
            "or weights: metropolis, which keep a share of every rank's own value"
        )
    return topology


def lazy_above(algorithm: str, topology: Topology, bound: float, lazy: Lazy) -> Topology:
    """Return the topology, or its lazy form (I + W) / 2, so that lambda_min is above ``bound``.

    Args:
        algorithm: for the message.
        topology: symmetric.
        bound: what the algorithm's convergence asks of lambda_min.
        lazy: ``auto``: the given W if it qualifies, else the lazy one with a warning; ``always``:
            the lazy one; ``never``: the given W.

    Raises:
        ConfigError: ``never``, and lambda_min is below the bound.
    """
    if lazy == "always":
        return topology.lazy()
    lambda_min = topology.lambda_min()
    if lazy == "never":
        if lambda_min < bound - LAMBDA_MIN_TOLERANCE:
            raise ConfigError(
                f"algorithm.lazy: {algorithm} diverges unless lambda_min(W) > {bound:.4f}, but "
                f"{topology.name} of {topology.n} ranks has {lambda_min:.4f}; use lazy: auto"
            )
        return topology
    if lambda_min > bound + LAMBDA_MIN_TOLERANCE:
        return topology
    log.warning(
        "%s runs on (I + W) / 2: it needs lambda_min(W) > %.4f, and %s of %d ranks has %.4f",
        algorithm, bound, topology.name, topology.n, lambda_min,
    )  # fmt: skip
    return topology.lazy()


def require_own_weight(algorithm: str, topology: Topology) -> Topology:
    """Refuse a W(t) with a zero on the diagonal: every rank must keep a share of its own value."""
    for t in range(topology.num_described):
        empty = (topology.round(t).self_weight <= 0).nonzero()[0]
        if len(empty):
            raise ConfigError(
                f"topology: {algorithm} needs w_ii > 0, but rank {empty[0]} keeps nothing in round "
                f"{t} of {topology.name}; use weights: push_sum, or the lazy form of W"
            )
    return topology


def require_form(algorithm: Algorithm, oracle: Oracle) -> None:
    """Refuse an oracle whose gradients come in a form, or at once, as the algorithm takes none."""
    if oracle.form not in algorithm.takes:
        raise ConfigError(
            f"oracle: {oracle.name} gives {oracle.form}, of which {algorithm.name} can make no "
            f"step (it takes {' or '.join(sorted(algorithm.takes))}); use another oracle, or an "
            f"algorithm that takes {oracle.form}"
        )
    if algorithm.streams and oracle.keeps_whole is not None:
        raise ConfigError(
            f"algorithm.per_layer: updates parameters one by one as backward goes on, but "
            f"{oracle.keeps_whole}; use per_layer: false, or oracle: backprop alone"
        )
    if algorithm.streams and algorithm.optimizer is not None:
        algorithm.optimizer.require_parts()
