"""Topologies: schedules of weighted graphs, their spectra, a planner and drawings.

Conventions: ranks are 0..n-1 and x_i <- sum_j W[i, j] x_j. W[i, j] != 0 for i != j means that j
sends to i. As a networkx graph that is the edge (j, i) with weight W[i, j]; self-loops carry
W[i, i].
"""

from gossamer.topologies.ceca import CecaRound, ceca_average, ceca_rounds
from gossamer.topologies.errors import (
    TopologyConnectivityError,
    TopologyError,
    TopologyParameterError,
    TopologyPeriodicError,
    TopologySizeError,
    TopologyStochasticError,
    TopologyWeightError,
)
from gossamer.topologies.hierarchical import HierarchicalTopology
from gossamer.topologies.planner import Method, Plan, plan
from gossamer.topologies.registry import build, factories, names, nearest
from gossamer.topologies.round import Round
from gossamer.topologies.spectrum import Spectrum, spectrum
from gossamer.topologies.topology import Kind, Topology
from gossamer.topologies.weights import RULES

__all__ = [
    "RULES",
    "CecaRound",
    "HierarchicalTopology",
    "Kind",
    "Method",
    "Plan",
    "Round",
    "Spectrum",
    "Topology",
    "TopologyConnectivityError",
    "TopologyError",
    "TopologyParameterError",
    "TopologyPeriodicError",
    "TopologySizeError",
    "TopologyStochasticError",
    "TopologyWeightError",
    "build",
    "ceca_average",
    "ceca_rounds",
    "factories",
    "names",
    "nearest",
    "plan",
    "spectrum",
]
