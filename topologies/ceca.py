"""CECA: the exact average in ceil(log2 n) rounds for any n, one message a rank and round.

Not a mixing matrix (arXiv:2306.00256): every rank keeps two sums over a window of ranks, S with
itself and T without, and each round sends one of the two. It is offered for exact averaging, not
for interleaving with gradients.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from gossamer.topologies.errors import TopologyParameterError
from gossamer.topologies.integers import ceil_log2
from gossamer.topologies.round import Floats, Ints


@dataclass(frozen=True)
class CecaRound:
    """One round: everyone sends the same one of its two sums, and adds what it receives to both.

    Attributes:
        buffer: 'S' or 'T', what is sent.
        sources: (n,) int64, from whom each rank receives.
        window: ranks summed in T before the round; S holds one more.
    """

    buffer: Literal["S", "T"]
    sources: Ints
    window: int

    def targets(self) -> Ints:
        """Return (n,) int64, to whom each rank sends."""
        return np.argsort(self.sources)


def ceca_rounds(n: int, *, one_port: bool = False) -> list[CecaRound]:
    """Return the rounds after which S of every rank is the sum over all ranks.

    The bits b of n - 1, most significant first, say what is sent: S if b = 1, T if b = 0.

    Args:
        n: number of ranks.
        one_port: exchange with one partner both ways instead of sending to one rank and receiving
            from another; needs an even n.

    Raises:
        TopologyParameterError: ``one_port`` with an odd n.
    """
    if one_port and n > 1 and n % 2:
        raise TopologyParameterError(
            f"topology.ranks: one-port CECA pairs all ranks and needs an even n, got {n}; use "
            "one_port: false"
        )
    ranks, rounds, window = np.arange(n), [], 0
    for place in range(ceil_log2(n) - 1, -1, -1):
        bit = (n - 1) >> place & 1
        if one_port:
            step = 2 * window + 1
            sources = np.where(ranks % 2 == 0, ranks + step, ranks - step) % n
        else:
            sources = (ranks - window - bit) % n
        rounds.append(CecaRound("S" if bit else "T", sources, window))
        window = 2 * window + bit
    return rounds


def ceca_average(x: ArrayLike, *, one_port: bool = False) -> Floats:
    """Run CECA on the rows of x, (n,) or (n, d), and return what every rank ends with.

    The buffers hold averages instead of sums, so that they keep the scale of the data.
    """
    s = np.array(x, np.float64)
    t = np.zeros_like(s)
    for round_ in ceca_rounds(len(s), one_port=one_port):
        m = round_.window
        sent, count = (s, m + 1) if round_.buffer == "S" else (t, m)
        message = sent[round_.sources]
        s = ((m + 1) * s + count * message) / (m + 1 + count)
        t = (m * t + count * message) / (m + count)
    return s
