"""What is left of D-NASA when one of its parts is taken away: algorithms for the ablation."""

from __future__ import annotations

from typing import Literal

from gossamer.algorithms.decentralized.dnasa import DNASA, DNASAState
from gossamer.algorithms.estimates import Metrics
from gossamer.algorithms.problems import Batches
from gossamer.algorithms.protocols import Oracle
from gossamer.runtime import Communicator

__all__ = ["LocalAverage"]


class LocalAverage(DNASA):
    """D-NASA whose average of gradients z stays on its rank; only x travels.

    x_i <- sum_j w_ij (x_j - gamma z_j / ||z_j||);  z_i <- (1 - alpha) z_i + alpha v_i
    """

    name: Literal["local-average"] = "local-average"  # type: ignore[assignment]  # another name

    def step(
        self, comm: Communicator, oracle: Oracle, state: DNASAState, batches: Batches
    ) -> Metrics:
        """One gradient at the old x, one exchange of d elements."""
        alpha, gamma = self._rates(comm)
        x = state.x
        estimate = oracle(x, batches[0])
        self._move_(comm, oracle, state, x, gamma)
        self._average_(state, estimate.grad, alpha)
        comm.neighbor_average(x, out=x)
        return {"loss": estimate.loss, "alpha": alpha, "gamma": gamma}
