"""AD-PSGD: asynchronous pair averaging, replayed in one order of events (arXiv:1710.06952)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import networkx as nx
import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from gossamer.algorithms.conditions import require_static
from gossamer.algorithms.decentralized.fixed_rule import FixedRule
from gossamer.algorithms.estimates import Metrics
from gossamer.algorithms.problems import Batches
from gossamer.algorithms.protocols import Oracle
from gossamer.runtime import Communicator, ConfigError, Random, combine
from gossamer.topologies import Round, Topology

__all__ = ["ADPSGD", "ADPSGDState", "PairAverages"]


class PairAverages(Topology):
    """The order of events: who finishes a gradient in round t, and who averages with whom.

    W(t) is the product of the round's pair averages, one after the other, hence doubly stochastic.
    Every event is a function of (seed, t), the same on every process.
    """

    def __init__(self, graph: Topology, *, slowest: int, seed: int) -> None:
        """Split the ranks of a static graph into active and passive ones.

        Raises:
            ConfigError: the graph is directed, or not bipartite.
        """
        params = {**graph.params, "slowest": slowest, "seed": seed}
        super().__init__(graph.name, graph.n, self._product, kind="DS", period=None, params=params)
        once = graph.round(0)
        self._random = Random(seed)
        self._active = _active_side(graph)
        self._neighbors = [once.recv(i)[0] for i in range(graph.n)]
        speeds = self._random.stream("ad-psgd speed", ids=range(graph.n))
        self._duration = speeds.integers(slowest, 1)[:, 0].numpy() + 1

    def finished(self, t: int) -> np.ndarray:
        """Return bool (n,): whose gradient is done in round t."""
        done: np.ndarray = (t + 1) % self._duration == 0
        return done

    def pairs(self, t: int) -> list[tuple[int, int]]:
        """Return the pairs (active, passive) that average in round t, first to last."""
        order = self._random.stream("ad-psgd order", step=t).permutation(self.n)[0].tolist()
        draws = self._random.stream("ad-psgd partner", ids=range(self.n), step=t)
        draw = draws.integers(2**32, 1)[:, 0].tolist()
        done, pairs = self.finished(t), []
        for i in order:
            near = self._neighbors[i]
            if self._active[i] and done[i] and len(near):
                pairs.append((i, int(near[draw[i] * len(near) >> 32])))
        return pairs

    def _product(self, t: int) -> Round:
        rows = [{i: 1.0} for i in range(self.n)]  # halves of halves: exact
        for i, j in self.pairs(t):
            mean = {k: rows[i].get(k, 0.0) / 2 for k in rows[i] | rows[j]}
            for k, weight in rows[j].items():
                mean[k] += weight / 2
            rows[i] = rows[j] = mean
        edges = [(i, j, weight) for i, row in enumerate(rows) for j, weight in row.items()]
        targets, sources, weights = zip(*edges, strict=True)
        return Round.from_edges(self.n, targets, sources, weights, 0.0)


def _active_side(graph: Topology) -> np.ndarray:
    """Return bool (n,): the larger side of the bipartite graph, rank 0's if they are equal."""
    undirected = nx.Graph(graph.graph())
    undirected.remove_edges_from(list(nx.selfloop_edges(undirected)))
    if not graph.round(0).is_undirected or not nx.is_bipartite(undirected):
        raise ConfigError(
            f"topology: ad-psgd needs an undirected bipartite graph, so that no cycle of ranks "
            f"waits for each other, but {graph.name} of {graph.n} is not; use a ring of an even "
            "number of ranks, path, star, hypercube or an even torus"
        )
    color = nx.bipartite.color(undirected)
    side = np.array([color[i] == color[0] for i in range(graph.n)])
    return side if 2 * side.sum() >= graph.n else ~side


@dataclass
class ADPSGDState:
    """Parameters, and the copies at which gradients are being computed.

    Attributes:
        x: (local, d), the parameters.
        read: (local, d), x as it was when the rank began its gradient.
        averages: int64 (local,), how often x was averaged with another's since then.
    """

    x: Tensor
    read: Tensor
    averages: Tensor


class ADPSGD(FixedRule):
    """AD-PSGD (arXiv:1710.06952, Alg. 1) replayed: pairs average while gradients are computed.

    This is NOT wall-clock asynchrony: the ranks go in step and replay one order of events that an
    asynchronous run could have had, drawn from ``seed``, so that it is the same on any transport
    and number of processes, and after a resume. In round t:

    1. every rank computes g_i at the copy it read when it began (``read``);
    2. meanwhile each active rank that finishes picks a passive neighbour j at random, and one
       pair after the other x_i, x_j <- (x_i + x_j) / 2; their product is W(t), one exchange of d;
    3. every rank that finished: x_i -= lr g_i, a gradient that is stale by those averages and, on
       a slow rank, by the rounds it took; then it reads x_i again.

    A rank needs 1 to ``slowest`` rounds for a gradient (drawn once, kept), so fast ranks and their
    data weigh more, as in a real asynchronous run. The graph must be static, undirected and
    bipartite; its weights are not used. Pair averages keep the mean. Bytes are counted along the
    edges of W(t), which join more ranks than the pairs do. Figures: ``staleness``, averages
    between reading and now; ``finished``, the share of ranks that updated. What a slow rank's
    oracle says before its last round is thrown away.
    """

    sends: ClassVar[str] = "its parameters"
    name: Literal["ad-psgd"] = "ad-psgd"
    slowest: int = Field(default=1, ge=1)
    """Most rounds that a rank needs for a gradient; 1: all are equally fast."""
    seed: int = Field(default=0, ge=0)
    """With t, decides who meets whom and in which order; with the rank, its speed."""

    def adapt(self, topology: Topology) -> Topology:
        """Return the order of events over a static bipartite graph."""
        graph = require_static(self.name, topology)
        return PairAverages(graph, slowest=self.slowest, seed=self.seed)

    def init(self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches) -> ADPSGDState:
        """Start at x, which every rank has just read."""
        averages = torch.zeros(comm.local, dtype=torch.int64)
        return ADPSGDState(x=x, read=x.clone(), averages=averages)

    def step(
        self, comm: Communicator, oracle: Oracle, state: ADPSGDState, batches: Batches
    ) -> Metrics:
        """One gradient at the copy read; the round's pair averages as one exchange of d."""
        x, read, events = state.x, state.read, comm.topology
        assert isinstance(events, PairAverages), "the topology must come from adapt()"
        hosted = slice(comm.ranks.start, comm.ranks.stop)
        done = torch.from_numpy(events.finished(comm.round)[hosted])[:, None]
        touched = np.bincount(np.ravel(events.pairs(comm.round)).astype(int), minlength=comm.n)

        averaging = comm.neighbor_average_async(x)
        estimate, g = self.estimate(comm, oracle, read, batches[0])
        combine([(1.0, averaging.wait()), (-self.optimizer.rate(comm) * done.double(), g)], out=x)

        state.averages += torch.from_numpy(touched[hosted])
        figures = {"staleness": state.averages.double(), "finished": done[:, 0].double()}
        state.averages[done[:, 0]] = 0
        torch.where(done.to(x.device), x, read, out=read)
        return {"loss": estimate.loss, **figures, **estimate.metrics}
