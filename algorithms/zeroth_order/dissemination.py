"""How what every rank has to say reaches every rank over a graph.

In each exchange a rank sends to each neighbour all that it knows and has neither sent to nor
received from it. Who knows what when follows from the schedule, so no rank has to be told.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from gossamer.runtime.errors import ConfigError
from gossamer.runtime.messages import Edge
from gossamer.topologies import Topology
from gossamer.topologies.round import Ints

__all__ = ["Dissemination", "dissemination"]


class Dissemination:
    """Whose items travel over which edge in which exchange.

    Attributes:
        exchanges: after so many, from any round on, all ranks know all; on a static graph its
            diameter, 1 for a single rank.
    """

    def __init__(self, topology: Topology) -> None:
        """Follow the items from every round of the period on.

        Raises:
            ConfigError: the schedule never repeats, or some rank never hears of another.
        """
        if topology.period is None:
            raise ConfigError(
                f"topology: {topology.name} never repeats, so that nothing bounds how long an item "
                "is under way; use a static graph, or a schedule with a period "
                "(one_peer_exponential)"
            )
        self._period = topology.period
        self._spreads = [_spread(topology, start) for start in range(topology.period)]
        self.exchanges = max(1, *map(len, self._spreads))

    def senders(self, start: int, exchange: int) -> Mapping[Edge, Ints]:
        """Return edge -> the ranks, ascending, whose items it carries.

        Args:
            start: the round in which these items were first sent.
            exchange: how many rounds ago that was.
        """
        spread = self._spreads[start % self._period]
        return spread[exchange] if exchange < len(spread) else {}


@lru_cache(maxsize=8)
def dissemination(topology: Topology) -> Dissemination:
    """Return the topology's, worked out once.

    Raises:
        ConfigError: as ``Dissemination``.
    """
    return Dissemination(topology)


def _spread(topology: Topology, start: int) -> list[dict[Edge, Ints]]:
    """Return what travels in the rounds from ``start`` until all ranks know all."""
    n = topology.n
    knows = np.eye(n, dtype=bool)  # [rank, whose item]
    exchanged: dict[Edge, np.ndarray] = {}  # between two ranks, either way
    found: list[dict[Edge, Ints]] = []
    idle = 0
    while not knows.all():
        round_ = topology.round(start + len(found))
        sent = {}
        for source, target in zip(round_.sources.tolist(), round_.targets.tolist(), strict=True):
            pair = min(source, target), max(source, target)
            before = exchanged.setdefault(pair, np.zeros(n, dtype=bool))
            new = np.flatnonzero(knows[source] & ~before)
            if len(new):
                sent[source, target] = new
        known = knows.sum()
        for (source, target), owners in sent.items():
            exchanged[min(source, target), max(source, target)][owners] = True
            knows[target, owners] = True
        found.append(sent)
        idle = 0 if knows.sum() > known else idle + 1
        if idle == topology.period:
            rank, other = (int(k) for k in np.argwhere(~knows)[0])
            raise ConfigError(
                f"topology: {topology.name} is not connected over its period of {idle} rounds: "
                f"rank {rank} never hears of rank {other}; add edges until every rank can reach "
                "every other"
            )
    return found
