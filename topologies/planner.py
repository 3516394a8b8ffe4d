"""What a topology costs on a given network, and which to take.

Full-duplex links of latency alpha (s) and bandwidth B (byte/s), messages of S bytes, d_t the most
messages that a rank sends or receives in round t, posted together: a round takes
alpha [d_t > 0] + d_t S / B. An exact schedule of T rounds needs T of them to average; any other
ceil(ln(1/epsilon) / -ln(rho_period)) periods to bring disagreement down to epsilon.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, log
from typing import Any, Literal

from gossamer.topologies.errors import TopologyParameterError
from gossamer.topologies.integers import ceil_log2, is_power_of_two, squarest_rows
from gossamer.topologies.registry import build
from gossamer.topologies.spectrum import spectrum

Goal = Literal["per_step", "average"]

_EXACT_EPSILON = 1e-3  # an exact schedule of T rounds counts as contracting by this^(1/T) a round
_BASES = (1, 2, 3, 4)  # k of the Base-(k+1) graphs in the table
_SMALL = 4  # up to so many ranks all-reduce is as good as anything


@dataclass(frozen=True)
class Network:
    """A network between equal ranks, and the message of a round.

    Attributes:
        latency_s: alpha, seconds from posting a message to its first byte.
        bandwidth: B, bytes per second and direction of a rank's link.
        message_bytes: S, bytes of one copy of the model.
    """

    latency_s: float
    bandwidth: float
    message_bytes: float

    def round_s(self, degrees: Sequence[int]) -> float:
        """Return the mean seconds of rounds in which the busiest rank has so many messages."""
        busy = sum(degree > 0 for degree in degrees) / len(degrees)
        copies = sum(degrees) / len(degrees)
        return self.latency_s * busy + copies * self.message_bytes / self.bandwidth


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        label: its name in the table.
        topology: what to write under `topology:`, None for all-reduce and CECA.
        copies: messages of S bytes on the busiest link, per round (of an all-reduce: in all).
        round_s: seconds per round, averaged over a period.
        rate: disagreement left per round; an exact schedule of T rounds counts as 1e-3^(1/T).
        rounds: rounds until disagreement is down to epsilon; inf if never.
        exact: whether it then is zero.
        average_only: gives averages, but cannot be taken apart into training steps.
    """

    label: str
    topology: Mapping[str, Any] | None
    copies: float
    round_s: float
    rate: float
    rounds: float
    exact: bool
    average_only: bool = False

    @property
    def is_gossip(self) -> bool:
        """Say whether ranks only talk to neighbors, unlike in an all-reduce."""
        return self.topology is not None or self.average_only

    @property
    def total_s(self) -> float:
        """Seconds until disagreement is down to epsilon."""
        return self.rounds * self.round_s

    @property
    def nats_per_copy(self) -> float | None:
        """Agreement bought per copy of the model sent: -ln(rate) / copies; None if none is sent."""
        return -log(self.rate) / self.copies if self.copies and self.rate > 0 else None


@dataclass(frozen=True)
class Plan:
    """A recommendation, and the table it rests on.

    Attributes:
        methods: the table.
        choice: the recommended row.
        reasons: why, and how it compares with all-reduce, in sentences.
        parties: what averages: ranks, or machines if there are several ranks on each.
        ranks_per_node: ranks on each machine.
    """

    methods: tuple[Method, ...]
    choice: Method
    reasons: tuple[str, ...]
    parties: int
    ranks_per_node: int

    def config(self) -> dict[str, Any] | None:
        """Return the recommended `topology:` section; None where all-reduce is the advice."""
        if self.choice.topology is None:
            return None
        local = {"hierarchical": {"local": self.ranks_per_node}} if self.ranks_per_node > 1 else {}
        return {**self.choice.topology, **local}


def plan(
    ranks: int,
    params: float,
    latency_s: float,
    bandwidth: float,
    *,
    goal: Goal = "per_step",
    epsilon: float = 1e-3,
    dtype_bytes: float = 4,
    ranks_per_node: int = 1,
    heterogeneous: bool = False,
    compute_time_s: float | None = None,
    rho_max: float = 0.9,
) -> Plan:
    """Compare the topologies for a job and recommend one, by a fixed rule.

    1. Up to 4 parties, or one machine: all-reduce. 2. Several ranks per machine: the rule applies
    to the machines, each rank exchanging its shard, as the `hybrid` transport does. 3. Goal
    'per_step' (training): of the schedules that contract by ``rho_max`` a round or better, the
    cheapest round; of equal ones an exact schedule, then the fewest rounds. With heterogeneous
    data: the base graph of most peers that still hides behind the computation of a step. 4. Goal
    'average': the least total time, all-reduce included.

    Args:
        ranks: n.
        params: parameters of the model.
        latency_s: of a link, seconds.
        bandwidth: of a rank's link between machines, bytes per second.
        goal: 'per_step' or 'average'.
        epsilon: disagreement that counts as none.
        dtype_bytes: bytes per parameter on the wire.
        ranks_per_node: ranks on each machine.
        heterogeneous: whether the ranks' data differ in distribution.
        compute_time_s: seconds a rank computes per step; needed with ``heterogeneous``.
        rho_max: the slowest contraction per round that a training schedule may have.

    Raises:
        TopologyParameterError: a figure out of range, or missing.
    """
    _check_figures(
        ranks=ranks,
        params=params,
        bandwidth=bandwidth,
        dtype_bytes=dtype_bytes,
        ranks_per_node=ranks_per_node,
    )
    if latency_s < 0 or not 0 < epsilon < 1:
        raise TopologyParameterError(
            f"plan.latency, plan.epsilon: need latency >= 0 and 0 < epsilon < 1, got {latency_s} "
            f"and {epsilon}"
        )
    if ranks % ranks_per_node:
        raise TopologyParameterError(
            f"plan.ranks_per_node: {ranks_per_node} does not divide {ranks} ranks; use a divisor"
        )
    if heterogeneous and compute_time_s is None:
        raise TopologyParameterError(
            "plan.compute_time: heterogeneous data call for as many peers as fit behind the "
            "computation of a step; give its seconds"
        )
    parties = ranks // ranks_per_node
    network = Network(latency_s, bandwidth, params * dtype_bytes / ranks_per_node)
    peers = None
    if heterogeneous and compute_time_s is not None and parties > 1:
        fitting = int(compute_time_s * bandwidth / network.message_bytes)
        peers = max(1, min(fitting, parties - 1))
    methods = _methods(parties, network, epsilon, peers)
    all_reduce = min(
        (method for method in methods if not method.is_gossip),
        key=lambda method: method.total_s,
    )
    choice, reason = _choose(methods, all_reduce, parties, goal, peers, rho_max)
    reasons = [reason]
    if ranks_per_node > 1 and parties > 1:
        reasons.append(
            f"{ranks_per_node} ranks per machine: figures are for the links between {parties} "
            f"machines, each rank carrying 1/{ranks_per_node} of the model; sums within a machine "
            "come on top, for every row alike."
        )
    if parties > 1:
        reasons += _compare(methods, choice, all_reduce, network)
    return Plan(
        methods=tuple(methods),
        choice=choice,
        reasons=tuple(reasons),
        parties=parties,
        ranks_per_node=ranks_per_node,
    )


def _check_figures(**figures: float) -> None:
    for field, value in figures.items():
        if not 0 < value < inf:
            raise TopologyParameterError(f"plan.{field}: must be above 0 and finite, got {value}")


def _methods(n: int, network: Network, epsilon: float, peers: int | None) -> list[Method]:
    bases = sorted({k for k in (*_BASES, *([peers] if peers else [])) if k < max(n, 2)})
    named: list[tuple[str, dict[str, Any]]] = [("ring", {"name": "ring"})]
    if n > 2:
        named.append(("star", {"name": "star"}))
    if squarest_rows(n) > 1:
        named.append(("torus", {"name": "torus"}))
    if n > 2 and is_power_of_two(n):
        named.append(("hypercube", {"name": "hypercube"}))
    named.append(("exponential", {"name": "exponential"}))
    named.append(("one_peer_exponential", {"name": "one_peer_exponential"}))
    named += [(f"base_{k + 1}", {"name": "base", "k": k}) for k in bases]
    if n > 2:
        named.append(("equi_dyn", {"name": "equi_dyn"}))
        named.append(("equi_dyn, undirected", {"name": "equi_dyn", "directed": False}))
    gossip = [_gossip(label, config, n, network, epsilon) for label, config in named]
    return [*gossip, *_collectives(n, network)]


def _gossip(label: str, config: dict[str, Any], n: int, network: Network, epsilon: float) -> Method:
    name, params = config["name"], {key: value for key, value in config.items() if key != "name"}
    topology = build(name, n, check="off", **params)  # our own graphs: nothing to check
    found = spectrum(topology)
    rounds = found.estimated_rounds(epsilon)
    exact = found.exact_after is not None
    degrees = [topology.round(t).max_degree for t in range(topology.num_described)]
    return Method(
        label=label,
        topology=config,
        copies=sum(degrees) / len(degrees),
        round_s=network.round_s(degrees),
        rate=_EXACT_EPSILON ** (1 / max(rounds, 1)) if exact else found.rate,
        rounds=rounds,
        exact=exact,
    )


def _collectives(n: int, network: Network) -> list[Method]:
    copies = 2 * (n - 1) / n
    bytes_s = copies * network.message_bytes / network.bandwidth
    steps = {"ring": 2 * (n - 1), "halving-doubling": 2 * ceil_log2(n)}
    all_reduces = [
        Method(
            label=f"{label} all-reduce",
            topology=None,
            copies=copies,
            round_s=num_steps * network.latency_s + bytes_s,
            rate=_EXACT_EPSILON,
            rounds=1,
            exact=True,
        )
        for label, num_steps in steps.items()
    ]
    rounds = ceil_log2(n)
    ceca = Method(
        label="CECA",
        topology=None,
        copies=float(n > 1),
        round_s=network.round_s([int(n > 1)]),
        rate=_EXACT_EPSILON ** (1 / max(rounds, 1)),
        rounds=rounds,
        exact=True,
        average_only=True,
    )
    return [ceca, *all_reduces]


def _choose(
    methods: list[Method],
    all_reduce: Method,
    parties: int,
    goal: Goal,
    peers: int | None,
    rho_max: float,
) -> tuple[Method, str]:
    """Apply the rule; ties go to the row that stands first."""
    if parties <= _SMALL:
        who = f"{parties} parties" if parties > 1 else "one party"
        return all_reduce, f"Rule 1: for {who} all-reduce is as cheap as gossip, and exact."
    if goal == "average":
        best = min(methods, key=lambda method: method.total_s)
        return best, "Rule 4: the least time to agree, all-reduce included."
    if peers is not None:
        base = next(method for method in methods if method.label == f"base_{peers + 1}")
        return base, (
            f"Rule 3: heterogeneous data, and {peers} peers are the most whose messages hide "
            "behind the computation of a step (at least one)."
        )
    fast = [method for method in methods if method.topology and method.rate <= rho_max]
    if not fast:
        raise TopologyParameterError(
            f"plan.rho_max: no topology contracts by {rho_max} a round or better; raise it"
        )
    best = min(fast, key=lambda method: (method.round_s, not method.exact, method.rounds))
    return best, (
        f"Rule 3: the cheapest round among those that leave at most {rho_max:g} of the "
        "disagreement; of equal ones an exact schedule, then the fewest rounds."
    )


def _compare(
    methods: list[Method], choice: Method, all_reduce: Method, network: Network
) -> list[str]:
    """Say plainly how gossip stands against all-reduce."""
    sentences = []
    if choice.topology is not None and choice.round_s > 0:
        ratio = all_reduce.total_s / choice.round_s
        verdict = f"{ratio:.2f} times one round" if ratio >= 1 else "LESS than one round"
        sentences.append(
            f"The {all_reduce.label} takes {all_reduce.total_s:.4g} s: {verdict} of {choice.label} "
            f"({choice.round_s:.4g} s)."
        )
    gossip = min((method for method in methods if method.is_gossip), key=lambda row: row.total_s)
    if all_reduce.total_s <= gossip.total_s:
        sentences.append(
            f"All-reduce is cheaper for an average: {all_reduce.total_s:.4g} s against "
            f"{gossip.total_s:.4g} s of {gossip.label}, the best of gossip."
        )
    else:
        sentences.append(
            f"Gossip is cheaper even for an average: {gossip.total_s:.4g} s of {gossip.label} "
            f"against {all_reduce.total_s:.4g} s of {all_reduce.label}."
        )
    if network.message_bytes / network.bandwidth > network.latency_s:
        sentences.append(
            "Bandwidth decides here: on equal links a round of gossip costs at best about half an "
            "all-reduce. Gossip wins by latency (small messages, many ranks), stragglers, slow or "
            "partial links, and asynchrony."
        )
    else:
        sentences.append("Latency decides here, and a round of gossip waits for it only once.")
    return sentences
