"""The checks a topology passes before it is used, each with an error class of its own."""

import logging

import numpy as np
from scipy import sparse

from gossamer.topologies.connectivity import cycle_period, require_connected, strong_components
from gossamer.topologies.errors import (
    TopologyPeriodicError,
    TopologyStochasticError,
    TopologyWeightError,
)
from gossamer.topologies.round import Floats, Round
from gossamer.topologies.spectrum import spectrum
from gossamer.topologies.topology import STOCHASTIC_TOLERANCE, Kind, Topology

_NEGATIVE = -1e-12  # a weight below it is negative on purpose, not by rounding
_NO_CONTRACTION = 1 - 1e-12
_SAMPLE = 256  # rounds in which a schedule that never repeats must connect all ranks

_log = logging.getLogger(__name__)


def check_rounds(topology: Topology, *, allow_negative: bool = False) -> None:
    """Check weights, connectivity and sums of all rounds of a period, or of the first ones.

    Raises:
        TopologyWeightError: a weight is not finite, or negative without ``allow_negative``.
        TopologyConnectivityError: the union of the rounds is not strongly connected.
        TopologyStochasticError: rows or columns do not sum to one as the class demands.
    """
    rounds = [(t, topology.round(t)) for t in range(topology.num_described)]
    for t, round_ in rounds:
        _check_weights(round_, _named(topology, t), allow_negative)
    _check_connected(topology)
    for t, round_ in rounds:
        _check_sums(round_, topology.kind, _named(topology, t))


def checked(topology: Topology, *, allow_negative: bool = False) -> Topology:
    """Return the topology with each round checked when it is first evaluated.

    For schedules that never repeat, whose later rounds `check_rounds` cannot see.
    """

    def rounds(t: int) -> Round:
        round_ = topology.round(t)
        _check_weights(round_, _named(topology, t), allow_negative)
        _check_sums(round_, topology.kind, _named(topology, t))
        return round_

    return Topology(
        topology.name,
        topology.n,
        rounds,
        kind=topology.kind,
        period=topology.period,
        params=topology.params,
    )


def check_mixing(topology: Topology) -> None:
    """Check that values agree in the end; warn if a single round may not help.

    Where every rank keeps part of its value in every round and the rounds connect all ranks, there
    is nothing to check.

    Raises:
        TopologyPeriodicError: a static matrix has a second eigenvalue of modulus one (or above).
    """
    rounds = [topology.round(t) for t in range(topology.num_described)]
    signed = any(np.any(round_.weights < 0) or np.any(round_.self_weight < 0) for round_ in rounds)
    kept = all(np.all(round_.self_weight > 0) for round_ in rounds)
    if topology.period is None or topology.n == 1 or (kept and not signed):
        return
    if topology.is_static and not signed:
        period = cycle_period(rounds[0])
        if period > 1:
            raise TopologyPeriodicError(
                f"topology: values circulate with period {period} and never agree (eigenvalues of "
                "modulus 1); give ranks a self weight: lazy: true, or a weight rule"
            )
        gram = sparse.csr_array(rounds[0].sparse().T @ rounds[0].sparse())
        if topology.is_doubly_stochastic and len(strong_components(gram)) > 1:
            _log.warning(
                "topology: rho(W) = 1 for '%s': a single round may leave disagreement as it is, "
                "though several together shrink it",
                topology.name,
            )
        return
    rate = spectrum(topology).rate
    if rate >= _NO_CONTRACTION and topology.is_static:
        raise TopologyPeriodicError(
            f"topology: the second eigenvalue of W has modulus {rate:.9g}, so ranks never agree; "
            "use weights 'metropolis', or lazy: true"
        )
    if rate >= _NO_CONTRACTION:
        _log.warning(
            "topology: a period of '%s' may leave disagreement as it is: rate %.9g >= 1 - 1e-12",
            topology.name,
            rate,
        )


def _named(topology: Topology, t: int) -> str:
    return "W" if topology.is_static else f"W({t})"


def _check_weights(round_: Round, name: str, allow_negative: bool) -> None:
    for weights, targets, sources in (
        (round_.weights, round_.targets, round_.sources),
        (round_.self_weight, np.arange(round_.n), np.arange(round_.n)),
    ):
        bad = ~np.isfinite(weights)
        rule = "must be finite; correct the weight, or name a weight rule such as 'metropolis'"
        if not np.any(bad) and not allow_negative:
            bad = weights < _NEGATIVE
            rule = "must not be negative; use 'metropolis', or set allow_negative: true"
        if np.any(bad):
            first = int(np.flatnonzero(bad)[0])
            raise TopologyWeightError(
                f"topology.weights: {name}[{targets[first]}, {sources[first]}] is "
                f"{weights[first]:.6g}, {rule}"
            )


def _check_connected(topology: Topology) -> None:
    if topology.period is not None:
        where = "the graph" if topology.is_static else "the union of the rounds over a period"
        require_connected(_union(topology, topology.period), where)
    elif topology.rho_ms is None or topology.rho_ms >= 1:
        # A mean-square rate below 1 is proof enough; without one, look at the first rounds.
        require_connected(_union(topology, _SAMPLE), f"the union of the first {_SAMPLE} rounds")


def _union(topology: Topology, num_rounds: int) -> sparse.csr_array:
    union = sparse.csr_array((topology.n, topology.n))
    for t in range(num_rounds):
        union = union + abs(topology.round(t).sparse())
    return union


def _check_sums(round_: Round, kind: Kind, name: str) -> None:
    matrix = round_.sparse()
    if kind != "CS":
        _check_sum(np.asarray(matrix.sum(axis=1)), "row", kind, name)
    if kind != "RS":
        _check_sum(np.asarray(matrix.sum(axis=0)), "column", kind, name)
    if kind == "SDS" and (worst := float(abs(matrix - matrix.T).max())) > STOCHASTIC_TOLERANCE:
        raise TopologyStochasticError(
            f"topology.kind: {name} differs from its transpose by {worst:.3g}, must be symmetric "
            "for kind SDS; declare kind: DS, or use 'metropolis'"
        )


def _check_sum(sums: Floats, what: str, kind: Kind, name: str) -> None:
    off = np.abs(sums - 1)
    worst = int(off.argmax())
    if off[worst] > STOCHASTIC_TOLERANCE:
        meaning = {"RS": "row-stochastic", "CS": "column-stochastic"}.get(kind, "doubly stochastic")
        raise TopologyStochasticError(
            f"topology.weights: {what} {worst} of {name} sums to {sums[worst]:.9g}, must be 1 "
            f"({meaning}); use a weight rule ('metropolis', directed 'sinkhorn'), correct the "
            "weights, or declare kind: RS or CS for an algorithm that corrects the bias"
        )
