"""What an algorithm asks of W, checked before the first step."""

from __future__ import annotations

import logging

from gossamer.runtime.errors import ConfigError
from gossamer.topologies import Topology

__all__ = [
    "LAMBDA_MIN_TOLERANCE",
    "require_column_stochastic",
    "require_doubly_stochastic",
    "require_static",
    "require_symmetric",
]

log = logging.getLogger("gossamer")

LAMBDA_MIN_TOLERANCE = 1e-6


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


def require_static(algorithm: str, topology: Topology) -> Topology:
    """Refuse a schedule: W must be the same in every round."""
    if not topology.is_static:
        raise ConfigError(
            f"topology: {algorithm} needs one fixed graph, but {topology.name} changes over time; "
            "use a static one (ring, torus, exponential, hypercube)"
        )
    return topology


def require_column_stochastic(algorithm: str, topology: Topology) -> Topology:
    """Refuse a W whose columns do not sum to 1: push-sum would lose mass."""
    if topology.kind == "RS":
        raise ConfigError(
            f"topology: {algorithm} needs a column-stochastic W, but {topology.name} is "
            "row-stochastic; use weights: push_sum"
        )
    return topology
