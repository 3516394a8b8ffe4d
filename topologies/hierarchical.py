"""Machines of several ranks: gossip between machines, exact averages within them."""

import numpy as np
from scipy import sparse

from gossamer.topologies.errors import TopologyParameterError
from gossamer.topologies.round import Round
from gossamer.topologies.topology import Topology


class HierarchicalTopology(Topology):
    """W(t) = W_M(t) kron J_L: rank = machine * L + local rank; rho(W) = rho(W_M).

    The runtime executes it sharded where the machines are the hosts of its `hybrid` transport:
    reduce-scatter within the machine, local rank l exchanges shard l with local rank l of the
    neighbor machines, all-gather within the machine. That sends 1/L of the message per rank and
    neighbor machine. On every other transport it is the flat graph of W.

    Attributes:
        machines: the schedule W_M among machines.
        local: L, ranks on each machine.
    """

    def __init__(self, machines: Topology, local: int) -> None:
        """Compose ``machines`` with exact averages over ``local`` ranks."""
        if local < 1:
            raise TopologyParameterError(
                f"topology.hierarchical.local: ranks per machine, 1 or more, got {local}"
            )
        self.machines = machines
        self.local = local
        mean = np.full((local, local), 1 / local)

        def rounds(t: int) -> Round:
            return Round.from_matrix(sparse.kron(machines.round(t).sparse(), mean))

        super().__init__(
            machines.name,
            machines.n * local,
            rounds,
            kind=machines.kind,
            period=machines.period,
            params={**machines.params, "hierarchical": {"local": local}},
            rho_ms=machines.rho_ms,
        )

    def lazy(self) -> "HierarchicalTopology":
        """Return the composition with the lazy machines: still hierarchical, no eigenvalue < 0."""
        return HierarchicalTopology(self.machines.lazy(), self.local)

    def lambda_min(self) -> float:
        """Return the smallest eigenvalue: those of W_M and, with L > 1, zeros."""
        smallest = self.machines.lambda_min()
        return min(smallest, 0.0) if self.local > 1 else smallest
