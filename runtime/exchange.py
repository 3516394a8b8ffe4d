"""What one process does in one round: which rows it sends, receives and adds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gossamer.runtime.native import Terms
from gossamer.runtime.placement import Placement
from gossamer.topologies import Round

__all__ = ["ExchangePlan", "ReturnPlan", "plan_exchange", "plan_return"]


@dataclass(frozen=True)
class ExchangePlan:
    """One process's part of a round.

    A rank's row travels once to a process however many of its ranks want it. The table of rows is
    the hosted rows, then the received ones.

    Attributes:
        sends: (peer, hosted rows it wants, ascending).
        receives: (peer, how many rows come from it), peers ascending: ranks ascend too.
        num_received: rows received in all.
        staged: hosted rows that any other process wants, ascending.
        most_staged: how many those are on the process that has most.
        peer_rows: per entry of ``receives``, the wanted rows as rows of the peer's block.
        peer_staged: the same, as places in the peer's ``staged``.
        terms: the weighted sums over the table: own row first, then ascending rank.
        sources: int64 (edges,), the sending rank of each in-edge of the hosted ranks, by target.
        columns: int64 (edges,), its place in the table.
        targets: int64 (edges,), the hosted row that receives.
        weights: float64 (edges,).
        degree: int64 (local,), messages each hosted rank sends.
    """

    sends: tuple[tuple[int, tuple[int, ...]], ...]
    receives: tuple[tuple[int, int], ...]
    num_received: int
    staged: tuple[int, ...]
    most_staged: int
    peer_rows: tuple[tuple[int, ...], ...]
    peer_staged: tuple[tuple[int, ...], ...]
    terms: Terms
    sources: np.ndarray
    columns: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    degree: np.ndarray


def plan_exchange(round_: Round, placement: Placement, process: int) -> ExchangePlan:
    """Work out what ``process`` does in ``round_``; vectorised over edges."""
    ranks = placement.ranks(process)
    first, last = ranks.start, ranks.stop
    local = len(ranks)
    edges = slice(int(round_.indptr[first]), int(round_.indptr[last]))
    sources, weights = round_.sources[edges], round_.weights[edges]
    indptr = (round_.indptr[first : last + 1] - round_.indptr[first]).astype(np.int64)
    targets = np.repeat(np.arange(local, dtype=np.int64), np.diff(indptr))

    here = (sources >= first) & (sources < last)
    remote = np.unique(sources[~here])
    columns = np.where(here, sources - first, local + np.searchsorted(remote, sources))
    peers, counts = np.unique(placement.owner(remote), return_counts=True)

    # All rows that travel; each process's are a contiguous part.
    travelling, per_process = _travelling(round_, placement)
    begins = np.concatenate([[0], np.cumsum(per_process)])
    mine = travelling[begins[process] : begins[process + 1]]
    wanted = np.split(remote, np.cumsum(counts)[:-1]) if len(peers) else []

    return ExchangePlan(
        sends=_sends(round_, placement, process),
        receives=tuple(zip(peers.tolist(), counts.tolist(), strict=True)),
        num_received=len(remote),
        staged=tuple((mine - first).tolist()),
        most_staged=int(per_process.max(initial=0)),
        peer_rows=tuple(
            tuple((rows - placement.ranks(int(p)).start).tolist())
            for p, rows in zip(peers, wanted, strict=True)
        ),
        peer_staged=tuple(
            tuple((np.searchsorted(travelling, rows) - begins[int(p)]).tolist())
            for p, rows in zip(peers, wanted, strict=True)
        ),
        terms=_with_self(round_.self_weight[first:last], indptr, columns, weights),
        sources=sources,
        columns=columns,
        targets=targets,
        weights=weights,
        degree=np.bincount(round_.sources, minlength=round_.n)[first:last],
    )


@dataclass(frozen=True)
class ReturnPlan:
    """One process's part of a round run backwards: each message goes back to its source.

    The table of rows is the messages of the in-edges of the hosted ranks, by target then source,
    then those received.

    Attributes:
        sends: (peer, messages that go back to it, int64 ascending).
        receives: (peer, how many come back from it), peers ascending: targets ascend too.
        num_received: messages received in all.
        num_edges: in-edges of the hosted ranks.
        terms: per hosted rank the sum over its targets, ascending; every weight is 1.
        degree: int64 (local,), messages each hosted rank sends.
    """

    sends: tuple[tuple[int, np.ndarray], ...]
    receives: tuple[tuple[int, int], ...]
    num_received: int
    num_edges: int
    terms: Terms
    degree: np.ndarray


def plan_return(round_: Round, placement: Placement, process: int) -> ReturnPlan:
    """Work out what ``process`` does in ``round_`` run backwards; vectorised over edges."""
    ranks = placement.ranks(process)
    first, last = ranks.start, ranks.stop
    begin, end = int(round_.indptr[first]), int(round_.indptr[last])
    owners = placement.owner(round_.sources[begin:end])
    peers = np.unique(owners[owners != process])

    # Edges are by target, then source, at both ends of a pair of processes.
    edges = np.flatnonzero((round_.sources >= first) & (round_.sources < last))
    holders = placement.owner(round_.targets[edges])
    away = holders != process
    columns = np.where(away, end - begin + np.cumsum(away) - 1, edges - begin)
    sources = round_.sources[edges] - first
    counts = np.bincount(sources, minlength=len(ranks))
    senders, coming = np.unique(holders[away], return_counts=True)
    return ReturnPlan(
        sends=tuple((int(peer), np.flatnonzero(owners == peer)) for peer in peers),
        receives=tuple(zip(senders.tolist(), coming.tolist(), strict=True)),
        num_received=int(away.sum()),
        num_edges=end - begin,
        terms=Terms(
            indptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            columns=columns[np.argsort(sources, kind="stable")].astype(np.int64),
            weights=np.ones(len(edges)),
        ),
        degree=np.diff(round_.indptr[first : last + 1]),
    )


def _travelling(round_: Round, placement: Placement) -> tuple[np.ndarray, np.ndarray]:
    """Return the ranks whose rows leave their process, ascending, and how many per process."""
    targets = np.repeat(np.arange(round_.n), np.diff(round_.indptr))
    away = placement.owner(targets) != placement.owner(round_.sources)
    ranks = np.unique(round_.sources[away])
    return ranks, np.bincount(placement.owner(ranks), minlength=placement.processes)


def _sends(
    round_: Round, placement: Placement, process: int
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    if placement.processes == 1:
        return ()
    ranks = placement.ranks(process)
    all_targets = np.repeat(np.arange(round_.n), np.diff(round_.indptr))
    mine = (round_.sources >= ranks.start) & (round_.sources < ranks.stop)
    owners, rows = placement.owner(all_targets[mine]), round_.sources[mine] - ranks.start
    away = owners != process
    pairs = np.unique(np.stack([owners[away], rows[away]], axis=1), axis=0)
    peers = np.unique(pairs[:, 0])
    return tuple((int(p), tuple(pairs[pairs[:, 0] == p, 1].tolist())) for p in peers)


def _with_self(
    self_weight: np.ndarray, indptr: np.ndarray, columns: np.ndarray, weights: np.ndarray
) -> Terms:
    """Put the own row first in each sum; a zero weight is no edge."""
    kept = np.flatnonzero(self_weight)
    return Terms(
        indptr=indptr + np.concatenate([[0], np.cumsum(self_weight != 0)]).astype(np.int64),
        columns=np.insert(columns, indptr[kept], kept).astype(np.int64),
        weights=np.insert(weights, indptr[kept], self_weight[kept]),
    )
