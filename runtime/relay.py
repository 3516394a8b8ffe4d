"""How every process's block reaches every process, crossing to another host once.

Between hosts a block goes to one process of the host, its carrier there, which hands it on in
shared memory. The carriers of a host's blocks are spread over the processes of the other one.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Step", "relay_steps"]

Step = tuple[list[tuple[int, int]], list[tuple[int, int]]]
"""What one process sends and receives at once: (peer, process whose block it is), twice."""


def relay_steps(hosts: Sequence[Sequence[int]], process: int) -> list[Step]:
    """Return what ``process`` does, step by step; the steps of all processes fit together.

    Args:
        hosts: the processes by host; all on a host of their own where nothing is to be relayed.
        process: the one asked about.
    """
    here = next(k for k, host in enumerate(hosts) if process in host)
    home, away = hosts[here], [*hosts[here + 1 :], *hosts[:here]]  # not all call on the first one
    me = home.index(process)
    mates = [home[(me + k) % len(home)] for k in range(1, len(home))]
    carriers = [
        (home[place % len(home)], block) for host in away for place, block in enumerate(host)
    ]
    carried = [block for carrier, block in carriers if carrier == process]
    steps = [
        (
            [(p, process) for p in [*mates, *(host[me % len(host)] for host in away)]],
            [(p, p) for p in [*mates, *carried]],
        )
    ]
    if mates:
        handed_on = [(mate, block) for block in carried for mate in mates]
        steps.append((handed_on, [c for c in carriers if c[0] != process]))
    return steps
