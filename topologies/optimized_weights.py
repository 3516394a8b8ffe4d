"""Weights that minimise rho(W) on an undirected graph, by projected subgradient descent.

fmmc (fastest mixing Markov chain, W >= 0) and fdla (fastest distributed linear averaging, any sign)
of Boyd, Diaconis, Xiao (SIAM Review 46, 2004) and Xiao, Boyd (Systems & Control Letters 53, 2004).
W = I - sum_e w_e b_e b_e^T over the edges e = {i, j}, b_e = e_i - e_j. Each iteration is a dense
eigen-decomposition, so these are for small graphs; within 3e-3 of the optimum on the graphs tried.
"""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from gossamer.topologies.errors import TopologyParameterError
from gossamer.topologies.round import Floats, Ints, Round

_ITERATIONS = 1500
_STEP = 0.3
_ROUNDING = 1e-14
_LARGEST = 256  # 1500 eigen-decompositions of this size take about half a minute


def fmmc(edges: Round) -> Round:
    """Fastest mixing with non-negative weights: minimise rho(W) subject to W >= 0."""
    return _optimize(edges, "fmmc", _project)


def fdla(edges: Round) -> Round:
    """Fastest linear averaging: minimise rho(W), weights of any sign."""
    return _optimize(edges, "fdla", None)


def fmmc_sdp(edges: Round) -> Round:
    """Solve fmmc to optimality, as a semidefinite program; needs cvxpy."""
    return _solve_sdp(edges, nonnegative=True)


def fdla_sdp(edges: Round) -> Round:
    """Solve fdla to optimality, as a semidefinite program; needs cvxpy."""
    return _solve_sdp(edges, nonnegative=False)


def _solve_sdp(edges: Round, *, nonnegative: bool) -> Round:
    """Minimise s subject to -sI <= W - J <= sI, for fmmc with w >= 0 and incident sums <= 1."""
    try:
        cp: Any = importlib.import_module("cvxpy")  # untyped and optional
    except ModuleNotFoundError as error:
        raise TopologyParameterError(
            "topology.weights: 'fmmc_sdp' and 'fdla_sdp' need cvxpy, which is not installed; "
            "pip install cvxpy, or use weights 'fmmc' or 'fdla'"
        ) from error
    n = edges.n
    head, tail = _undirected_edges(edges)
    incidence = np.zeros((n, len(head)))
    incidence[head, np.arange(len(head))] = 1
    incidence[tail, np.arange(len(head))] = -1
    weights, bound = cp.Variable(len(head)), cp.Variable()
    off_mean = np.eye(n) - 1 / n - incidence @ cp.diag(weights) @ incidence.T
    constraints = [off_mean << bound * np.eye(n), off_mean >> -bound * np.eye(n)]
    if nonnegative:
        constraints += [weights >= 0, np.abs(incidence) @ weights <= 1]
    cp.Problem(cp.Minimize(bound), constraints).solve()
    solved = np.asarray(weights.value, np.float64)
    if nonnegative:  # solvers keep to the constraints within 1e-5 or so
        solved = _project(solved, _incident(n, head, tail))
    return _round(n, head, tail, solved)


def _optimize(
    edges: Round, rule: str, project: Callable[[Floats, list[Ints]], Floats] | None
) -> Round:
    n = edges.n
    if n > _LARGEST:
        raise TopologyParameterError(
            f"topology.weights: '{rule}' takes {_ITERATIONS} dense eigen-decompositions, too many "
            f"for {n} ranks (at most {_LARGEST}); use 'best_constant' or 'metropolis'"
        )
    head, tail = _undirected_edges(edges)
    incident = _incident(n, head, tail)
    degree = np.diff(edges.indptr)
    weights = 1 / (1.0 + np.maximum(degree[head], degree[tail]))  # metropolis
    best, best_rho = weights, np.inf
    for iteration in range(1, _ITERATIONS + 1):
        eigenvalues, vectors = np.linalg.eigh(_dense(n, head, tail, weights) - 1 / n)
        rho = max(eigenvalues[-1], -eigenvalues[0])
        if rho < best_rho:
            best, best_rho = weights, rho
        vector, sign = (
            (vectors[:, -1], -1.0) if eigenvalues[-1] >= -eigenvalues[0] else (vectors[:, 0], 1.0)
        )
        gradient = sign * (vector[head] - vector[tail]) ** 2
        length = np.linalg.norm(gradient)
        if length == 0:  # rho is 0 already: nothing off the mean is left to shrink
            break
        weights = weights - _STEP / np.sqrt(iteration) * gradient / length
        if project is not None:
            weights = project(weights, incident)
    return _round(n, head, tail, best)


def _project(weights: Floats, incident: list[Ints]) -> Floats:
    """Make the weights non-negative and the sum over the edges of each rank at most one."""
    weights = np.maximum(weights, 0)
    for edges in incident:
        while (excess := weights[edges].sum() - 1) > _ROUNDING:
            positive = edges[weights[edges] > 0]
            weights[positive] -= min(weights[positive].min(), excess / len(positive))
    return weights


def _incident(n: int, head: Ints, tail: Ints) -> list[Ints]:
    return [np.flatnonzero((head == rank) | (tail == rank)) for rank in range(n)]


def _undirected_edges(edges: Round) -> tuple[Ints, Ints]:
    once = edges.sources < edges.targets
    return edges.sources[once], edges.targets[once]


def _dense(n: int, head: Ints, tail: Ints, weights: Floats) -> Floats:
    matrix = np.zeros((n, n))
    matrix[head, tail] = matrix[tail, head] = weights
    np.fill_diagonal(matrix, 1 - matrix.sum(axis=0))
    return matrix


def _round(n: int, head: Ints, tail: Ints, weights: Floats) -> Round:
    targets, sources = np.concatenate([head, tail]), np.concatenate([tail, head])
    both = np.concatenate([weights, weights])
    rest = 1 - np.bincount(targets, both, minlength=n)
    return Round.from_edges(n, targets, sources, both, rest)
