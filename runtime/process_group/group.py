"""The group itself: torch's calls, turned into operations on flat tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from gossamer.runtime.errors import CommError
from gossamer.runtime.meeting import StoreGather, hosts_of, meet_on_host
from gossamer.runtime.process_group.base import NamedGroup
from gossamer.runtime.process_group.collectives import Collectives
from gossamer.runtime.process_group.point_to_point import PointToPoint
from gossamer.runtime.process_group.tensors import (
    OLD_NAMES,
    by_device,
    cut,
    flatten,
    write_all_back,
    write_back,
)
from gossamer.runtime.process_group.work import GroupWork, Line

__all__ = ["GossamerGroup", "create"]

_ROOM = 1 << 30
"""Bytes of address space for messages under way: torch's tensors are not in shared memory."""


def create(options: Any, _: Any = None) -> GossamerGroup:
    """Join a group: what ``init_process_group("gossamer")`` and ``new_group`` call.

    Args:
        options: torch's; the store, this rank and the group's size and ranks.
        _: options of the backend's own; there are none.

    Raises:
        CommError: the ranks are on several hosts, or did not all come.
    """
    return GossamerGroup(
        options.store,
        options.group_rank,
        options.group_size,
        options.timeout,
        list(options.global_ranks_in_group) or range(options.group_size),
    )


class GossamerGroup(NamedGroup):
    """A group of ranks on one host.

    Collectives run one after another on a thread of the group's own, in the order they are called,
    the same on all its ranks; a call that its caller waits for anyway runs in the caller where
    nothing else is under way. Sends and receives go beside them. The first failure of a group is
    final: every later call raises it again.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        timeout: timedelta,
        global_ranks: Sequence[int],
    ) -> None:
        """Meet the other ranks; every one of them calls it.

        Args:
            store: where they meet; of this group alone.
            rank: this one's place in the group.
            size: how many there are.
            timeout: of every operation that is not given another.
            global_ranks: how messages call the ranks of the group.

        Raises:
            CommError: they are on several hosts, or did not all come.
        """
        super().__init__(store, rank, size, timeout)
        gather = StoreGather(store, rank, size, timeout)
        hosts = hosts_of(gather)
        if len(hosts) > 1:
            raise CommError(
                f"init_process_group: backend gossamer is for the ranks of one host, the {size} of "
                f"this group are on {len(hosts)}; use gloo or nccl for them, and gossamer for "
                "groups within a host (new_group(ranks, backend='gossamer'))"
            )
        members = list(range(size))
        shared = [meet_on_host(gather, rank, members, global_ranks, _ROOM) for _ in range(2)]
        self._collectives, self._p2p = Collectives(shared[0]), PointToPoint(shared[1])
        self._line = Line("gossamer-group")
        self._ranks = list(global_ranks)
        self._calls = 0
        self._batch: list[GroupWork] | None = None

    # --- collectives ------------------------------------------------------------------------

    @by_device
    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> GroupWork:
        """Reduce each tensor over the ranks, in place."""
        opts = opts or dist.AllreduceOptions()

        def body(operation: str, timeout_s: float) -> None:
            for x in tensors:
                flat = flatten(x)
                self._collectives.all_reduce(flat, opts.reduceOp, operation, timeout_s)
                write_back(x, flat)

        return self._start("all_reduce", body, tensors, opts)

    allreduce_coalesced = allreduce

    @by_device
    def reduce(self, tensors: list[Tensor], opts: Any = None) -> GroupWork:
        """Reduce a tensor over the ranks; the root has the result."""
        opts = opts or dist.ReduceOptions()
        (x,) = tensors

        def body(operation: str, timeout_s: float) -> None:
            flat = flatten(x)
            root = opts.rootRank
            self._collectives.reduce(flat, root, opts.reduceOp, operation, timeout_s)
            write_back(x, flat)

        return self._start("reduce", body, tensors, opts)

    @by_device
    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> GroupWork:
        """Copy the root's tensors to all ranks."""
        opts = opts or dist.BroadcastOptions()

        def body(operation: str, timeout_s: float) -> None:
            for x in tensors:
                flat = flatten(x)
                self._collectives.broadcast(flat, opts.rootRank, operation, timeout_s)
                write_back(x, flat)

        return self._start("broadcast", body, tensors, opts)

    @by_device
    def allgather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None
    ) -> GroupWork:
        """Copy every rank's tensor to all; sizes may differ between ranks."""

        def body(operation: str, timeout_s: float) -> None:
            for outs, x in zip(outputs, inputs, strict=True):
                self._check_count("all_gather", outs)
                flats = [flatten(out) for out in outs]
                self._collectives.all_gather(flats, flatten(x), operation, timeout_s)
                write_all_back(outs, flats)

        return self._start("all_gather", body, outputs, opts)

    @by_device
    def allgather_coalesced(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None
    ) -> GroupWork:
        """As ``allgather`` of several tensors, with outputs by rank and then by tensor."""
        by_tensor = [list(outs) for outs in zip(*outputs, strict=True)]
        return self.allgather(by_tensor, inputs, opts)  # type: ignore[no-any-return]

    @by_device
    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> GroupWork:
        """Copy every rank's tensor into its part of ``output``, on all."""
        return self.all_gather_single_coalesced([output], [input], opts)  # type: ignore[no-any-return]

    @by_device
    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> GroupWork:
        """As ``all_gather_single`` of several tensors."""

        def body(operation: str, timeout_s: float) -> None:
            for output, x in zip(outputs, inputs, strict=True):
                flat = flatten(output)
                self._collectives.all_gather_single(flat, flatten(x), operation, timeout_s)
                write_back(output, flat)

        return self._start("all_gather", body, outputs, opts)

    @by_device
    def gather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None
    ) -> GroupWork:
        """Copy every rank's tensor to the root."""
        opts = opts or dist.GatherOptions()
        (x,) = inputs
        outs = outputs[0] if self.rank() == opts.rootRank else []

        def body(operation: str, timeout_s: float) -> None:
            flats = [flatten(out) for out in outs]
            self._collectives.gather(flats, flatten(x), opts.rootRank, operation, timeout_s)
            write_all_back(outs, flats)

        return self._start("gather", body, outputs, opts)

    @by_device
    def scatter(
        self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None
    ) -> GroupWork:
        """Copy the root's i-th tensor to rank i."""
        opts = opts or dist.ScatterOptions()
        (out,) = outputs
        parts = inputs[0] if self.rank() == opts.rootRank else []

        def body(operation: str, timeout_s: float) -> None:
            flat, flats = flatten(out), [flatten(part) for part in parts]
            self._collectives.scatter(flat, flats, opts.rootRank, operation, timeout_s)
            write_back(out, flat)

        return self._start("scatter", body, outputs, opts)

    @by_device
    def reduce_scatter(
        self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None
    ) -> GroupWork:
        """Reduce the i-th tensors of all ranks into the output of rank i."""
        for parts in inputs:
            self._check_count("reduce_scatter", parts)
        flat_parts = [partial(map, flatten, parts) for parts in inputs]
        return self._reduce_scatter(outputs, flat_parts, opts)

    @by_device
    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> GroupWork:
        """Reduce part i of the input over the ranks, into the output of rank i."""
        return self.reduce_scatter_single_coalesced([output], [input], opts)  # type: ignore[no-any-return]

    @by_device
    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> GroupWork:
        """As ``reduce_scatter_single`` of several tensors."""
        size = self.size()
        flat_parts = [partial(cut, x, [], size) for x in inputs]
        return self._reduce_scatter(outputs, flat_parts, opts)

    @by_device
    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> GroupWork:
        """Copy rank i's j-th tensor into the i-th output of rank j."""

        def body(operation: str, timeout_s: float) -> None:
            self._check_count("all_to_all", outputs)
            flats = [flatten(out) for out in outputs]
            parts = [flatten(part) for part in inputs]
            self._collectives.all_to_all(flats, parts, operation, timeout_s)
            write_all_back(outputs, flats)

        return self._start("all_to_all", body, outputs, opts)

    @by_device
    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: list[int],
        input_splits: list[int],
        opts: Any = None,
    ) -> GroupWork:
        """As ``alltoall`` of the parts of one tensor, cut evenly where no sizes are given."""

        def body(operation: str, timeout_s: float) -> None:
            flat = flatten(output)
            outs = cut(flat.view(output.shape), output_splits, self.size())
            parts = cut(input, input_splits, self.size())
            self._collectives.all_to_all(outs, parts, operation, timeout_s)
            write_back(output, flat)

        return self._start("all_to_all", body, [output], opts)

    def barrier(self, opts: Any = None) -> GroupWork:
        """Return work that is done when every rank has called it."""
        return self._start("barrier", self._collectives.barrier, [], opts or dist.BarrierOptions())

    # --- point to point ---------------------------------------------------------------------

    @by_device
    def send(self, tensors: list[Tensor], peer: int, tag: int) -> GroupWork:
        """Start to send a tensor to rank ``peer`` of the group."""
        (x,) = tensors
        operation = f"send to rank {self._ranks[peer]}"
        future = self._p2p.send(peer, flatten(x), tag, operation, self._timeout.total_seconds())
        return self._work(future, operation, tensors)

    @by_device
    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> GroupWork:
        """Start to receive a tensor from rank ``peer`` of the group."""
        (out,) = tensors
        operation = f"recv from rank {self._ranks[peer]}"
        future = self._p2p.receive(peer, out, tag, operation, self._timeout.total_seconds())
        return self._work(future, operation, tensors)

    @by_device
    def recv_anysource(self, tensors: list[Tensor], tag: int) -> GroupWork:
        """Refuse: messages are matched by their sender.

        Raises:
            CommError: always.
        """
        raise CommError("recv: backend gossamer needs the sender's rank: recv(tensor, src=...)")

    # --- beginning and end ------------------------------------------------------------------

    def shutdown(self) -> None:
        """Finish what is under way and leave; may be called twice."""
        self._line.close(wait=True)
        self._p2p.close()
        self._collectives.close()

    def abort(self) -> None:
        """Leave; what has not started is dropped."""
        self._line.close(wait=False)

    def _start_coalescing(self, device: torch.device) -> None:
        if device.type != "cpu":
            self.group_of(device)._start_coalescing(device)
        else:
            self._batch = []

    def _end_coalescing(self, device: torch.device) -> Any:
        if device.type != "cpu":
            return self.group_of(device)._end_coalescing(device)
        batch, self._batch = self._batch or [], None
        return self._start("coalesced operations", lambda *_: [w.wait() for w in batch], [], None)

    # --- inside -----------------------------------------------------------------------------

    def _start(
        self, name: str, body: Callable[[str, float], Any], tensors: Any, opts: Any
    ) -> GroupWork:
        self._calls += 1
        operation = f"{name} (call {self._calls})"
        given = timedelta(0) if opts is None else opts.timeout
        timeout_s = (given if given > timedelta(0) else self._timeout).total_seconds()
        # torch waits at once where it is False.
        inline = opts is not None and not getattr(opts, "asyncOp", True)
        future = self._line.run(lambda: body(operation, timeout_s), inline=inline)
        return self._work(future, operation, tensors)

    def _work(self, future: Future[None], operation: str, tensors: Any) -> GroupWork:
        work = GroupWork(future, operation, tensors)
        if self._batch is not None:
            self._batch.append(work)
        return work

    def _reduce_scatter(
        self, outputs: list[Tensor], inputs: Sequence[Callable[[], Iterable[Tensor]]], opts: Any
    ) -> GroupWork:
        """Reduce parts that are cut when their turn comes: what is under way may write them."""
        opts = opts or dist.ReduceScatterOptions()

        def body(operation: str, timeout_s: float) -> None:
            for out, parts in zip(outputs, inputs, strict=True):
                flat = flatten(out)
                self._collectives.reduce_scatter(
                    flat, list(parts()), opts.reduceOp, operation, timeout_s
                )
                write_back(out, flat)

        return self._start("reduce_scatter", body, outputs, opts)

    def _check_count(self, name: str, tensors: Sequence[Tensor]) -> None:
        if len(tensors) != self.size():
            raise ValueError(
                f"{name}: needs a tensor per rank, {self.size()}, got {len(tensors)} (gossamer)"
            )


for _name, _old in OLD_NAMES.items():
    setattr(GossamerGroup, _old, getattr(GossamerGroup, _name))
