"""One rank of test_process_group.py: every check compares backend gossamer with gloo."""

import itertools
import sys

import process_group_training
import pytest
import torch
import torch.distributed as dist
from process_group_setup import (
    GLOO,
    OURS,
    RANK,
    N,
    all_gather_single,
    reduce_scatter_single,
    same,
    values,
)
from torch import nn

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32]
SIZES = [0, 1, 7, 1000, 300_001]  # in the message, staged whole, in pieces
OPS = ["SUM", "PRODUCT", "MIN", "MAX"]


def check_all_reduce():
    for dtype, size, op in itertools.product(DTYPES, [*SIZES[:-1], 70_001], OPS):

        def run(group, dtype=dtype, size=size, op=op):
            x = values(size, dtype=dtype)
            dist.all_reduce(x, getattr(dist.ReduceOp, op), group=group)
            return [x]

        same(run)


def check_reductions_that_gloo_lacks():
    ops = dist.ReduceOp
    for size in (5, 70_000):
        everyone = torch.empty(N, size, dtype=torch.int64)
        all_gather_single(everyone.view(-1), values(size, dtype=torch.int64), group=GLOO)
        for name, combine in [("BAND", "and"), ("BOR", "or"), ("BXOR", "xor")]:
            x, expected = values(size, dtype=torch.int64), everyone[0]
            for row in everyone[1:]:
                expected = getattr(torch, f"bitwise_{combine}")(expected, row)
            dist.all_reduce(x, getattr(ops, name))
            assert torch.equal(x, expected), name
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            x = values(size, dtype=dtype)
            dist.all_reduce(x, ops.AVG)
            assert torch.equal(x, everyone.sum(0).to(dtype) / N)
        x = values(size, dtype=torch.int64)
        dist.all_reduce(x, ops.AVG)
        assert torch.equal(x, everyone.sum(0).div(N, rounding_mode="trunc"))
        x = values(size)
        dist.all_reduce(x, ops.PREMUL_SUM(0.5))
        assert torch.equal(x, everyone.sum(0) * 0.5)
        flags = values(size) > 0
        dist.all_reduce(flags)
        assert torch.equal(flags, (everyone > 0).any(0))


def check_sums_have_the_same_bits_on_all_ranks():
    x = torch.randn(300_001, generator=torch.Generator().manual_seed(RANK))
    dist.all_reduce(x)
    rows = torch.empty(N, len(x))
    all_gather_single(rows.view(-1), x)
    assert (rows == rows[0]).all()


def check_broadcast_and_reduce():
    for root, size in itertools.product(range(N), SIZES):

        def broadcast(group, root=root, size=size):
            x = values(size)
            dist.broadcast(x, root, group=group)
            return [x]

        def reduce(group, root=root, size=size):
            x = values(size)
            dist.reduce(x, root, group=group)
            return [x] if root == RANK else []

        same(broadcast)
        same(reduce)


def check_all_gather():
    for dtype, size in itertools.product([*DTYPES, torch.bool], SIZES):

        def run(group, dtype=dtype, size=size):
            x = values(size, dtype=dtype)
            rows = [torch.empty_like(x) for _ in range(N)]
            dist.all_gather(rows, x, group=group)
            return rows

        same(run)

        def single(group, dtype=dtype, size=size):
            out = torch.empty(N * size, dtype=dtype)
            all_gather_single(out, values(size, dtype=dtype), group=group)
            return [out]

        same(single)
    for size in SIZES:  # in place
        out = torch.empty(N * size)
        out.view(N, size)[RANK] = values(size)
        all_gather_single(out, out[RANK * size : (RANK + 1) * size])
        rows = [torch.empty(size) for _ in range(N)]
        dist.all_gather(rows, values(size), group=GLOO)
        assert torch.equal(out, torch.cat(rows))
    uneven = [torch.empty(3 * p + 1) for p in range(N)]  # gloo needs equal sizes
    dist.all_gather(uneven, torch.full((3 * RANK + 1,), float(RANK)))
    assert all((row == p).all() for p, row in enumerate(uneven))


def check_gather_and_scatter():
    for root, size in itertools.product(range(N), SIZES):

        def gather(group, root=root, size=size):
            rows = [torch.empty(size) for _ in range(N)] if root == RANK else None
            dist.gather(values(size), rows, root, group=group)
            return rows or []

        def scatter(group, root=root, size=size):
            out = torch.empty(size)
            rows = [values(size, seed=k) for k in range(N)] if root == RANK else None
            dist.scatter(out, rows, root, group=group)
            return [out]

        same(gather)
        same(scatter)


def check_reduce_scatter():
    for dtype, size in itertools.product([torch.float32, torch.bfloat16, torch.int64], SIZES):

        def single(group, dtype=dtype, size=size):
            out = torch.empty(size, dtype=dtype)
            reduce_scatter_single(out, values(N * size, dtype=dtype), group=group)
            return [out]

        def listed(group, dtype=dtype, size=size):
            out = torch.empty(size, dtype=dtype)
            parts = [values(size, dtype=dtype, seed=k) for k in range(N)]
            dist.reduce_scatter(out, parts, dist.ReduceOp.MAX, group=group)
            return [out]

        same(single)
        same(listed)
    out = torch.empty(10)
    reduce_scatter_single(out, torch.arange(10.0 * N), dist.ReduceOp.AVG)
    assert torch.equal(out, torch.arange(10.0) + 10 * RANK)


def check_all_to_all():
    for size in SIZES:

        def even(group, size=size):
            out = torch.empty(N * size, 2)
            dist.all_to_all_single(out, values(N * size, 2), group=group)
            return [out]

        same(even)

    def uneven(group):
        sent = [RANK + p for p in range(N)]
        x = values(sum(sent), 3)
        out = torch.empty(sum(sent), 3)
        dist.all_to_all_single(out, x, sent, sent, group=group)
        return [out]

    same(uneven)
    outs = [torch.empty(RANK + 1) for _ in range(N)]
    dist.all_to_all(outs, [torch.full((p + 1,), 10.0 * RANK + p) for p in range(N)])
    assert all((out == 10 * p + RANK).all() for p, out in enumerate(outs))


def check_tensors_that_are_not_contiguous():
    turned, strided = values(6, 10).t(), values(40)[::2]
    dist.all_reduce(turned)
    dist.broadcast(strided, 1)
    x, y = values(6, 10), values(40)  # gloo takes contiguous ones
    dist.all_reduce(x, group=GLOO)
    dist.broadcast(y, 1, group=GLOO)
    assert torch.equal(turned, x.t())
    assert torch.equal(strided, y[::2])
    out = torch.empty(5, 2).t()
    if RANK == 0:
        dist.send(torch.arange(10.0).view(2, 5), 1)
    if RANK == 1:
        dist.recv(out, 0)
        assert torch.equal(out, torch.arange(10.0).view(2, 5))
    with torch.inference_mode():
        x = values(6, 10).t()
        dist.all_reduce(x, async_op=True).wait()
    parameter = nn.Parameter(values(5))
    dist.broadcast(parameter, 0)


def check_coalesced_forms():
    def run(group):
        xs = [values(size) for size in (3, 70_000, 1)]
        with dist._coalescing_manager(group):
            for x in xs:
                dist.all_reduce(x, group=group)
        outs = [torch.empty(N * size) for size in (4, 5)]
        with dist._coalescing_manager(group, async_ops=True) as together:
            for size, out in zip((4, 5), outs, strict=True):
                all_gather_single(out, values(size), group=group)
        together.wait()
        return xs + outs

    found = run(OURS)
    for x, size in zip(found, (3, 70_000, 1), strict=False):
        expected = values(size)
        dist.all_reduce(expected, group=GLOO)
        assert torch.equal(x, expected)
    for out, size in zip(found[3:], (4, 5), strict=True):
        expected = torch.empty(N * size)
        all_gather_single(expected, values(size), group=GLOO)
        assert torch.equal(out, expected)
    parts = [torch.empty(4), torch.empty(5)]
    with dist._coalescing_manager(OURS):
        for part in parts:
            reduce_scatter_single(part, torch.ones(N * len(part)))
    assert all((part == N).all() for part in parts)
    with dist._coalescing_manager(OURS, torch.device("cpu"), async_ops=True) as together:
        x, y = torch.ones(3), torch.ones(4)
        dist.broadcast(x, 0)
        dist.reduce(y, 0)
    together.wait()


def check_asynchronous_calls_keep_their_order():
    x = torch.ones(50_000)
    works = [dist.all_reduce(x, async_op=True) for _ in range(3)]
    futures = [work.get_future() for work in works]
    after = futures[2].then(lambda future: future.value()[0].sum().item())
    assert [work.wait() for work in works] == [True] * 3
    assert (x == N**3).all()
    assert futures[2].wait()[0] is x
    assert after.wait() == N**3 * 50_000
    assert all(work.is_completed() and work.is_success() for work in works)
    # Two groups, called in another order on each rank.
    other = dist.new_group()
    pair = [(OURS, torch.ones(10)), (other, torch.ones(10))]
    works = [dist.all_reduce(t, group=g, async_op=True) for g, t in pair[:: -1 if RANK else 1]]
    for work in works:
        work.wait()
    assert all((t == N).all() for _, t in pair)


def check_sends_and_receives():
    right, left = (RANK + 1) % N, (RANK - 1) % N
    for size in (0, 1, 1000, 5_000_000):  # the last is more than the staging area holds
        out = torch.empty(size)
        work = dist.isend(torch.full((size,), float(RANK)), right)  # all send first
        dist.recv(out, left)
        work.wait()
        assert (out == left).all()
    # A send on its way does not hold up what comes between.
    work = dist.isend(torch.full((5_000_000,), float(RANK)), right)
    dist.barrier()
    out = torch.empty(5_000_000)
    dist.recv(out, left)
    work.wait()
    assert (out == left).all()
    outs = [torch.empty(3) for _ in range(4)]
    operations = [dist.P2POp(dist.irecv, o, left, tag=k) for k, o in enumerate(outs)]
    operations += [
        dist.P2POp(dist.isend, torch.full((3,), float(k)), right, tag=k) for k in range(4)
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    assert all((o == k).all() for k, o in enumerate(outs))
    with pytest.raises(RuntimeError, match="needs the sender's rank"):
        dist.recv(torch.empty(1))


def check_objects():
    found = [None] * N
    dist.all_gather_object(found, {"rank": RANK, "text": "x" * (100 * RANK)})
    assert [entry["rank"] for entry in found] == list(range(N))
    objects = [RANK, "from 0"] if RANK == 0 else [None, None]
    dist.broadcast_object_list(objects, 0)
    assert objects == [0, "from 0"]


def check_groups_of_some_ranks():
    evens = dist.new_group(list(range(0, N, 2)))
    last = dist.new_group([N - 1, 0])  # its ranks are in ascending order
    if RANK % 2 == 0:
        x = torch.full((3,), float(RANK))
        dist.all_reduce(x, group=evens)
        assert (x == sum(range(0, N, 2))).all()
    if RANK in (0, N - 1):
        rows = [torch.empty(1), torch.empty(1)]
        dist.all_gather(rows, torch.tensor([float(RANK)]), group=last)
        assert [row.item() for row in rows] == [0, N - 1]
        dist.destroy_process_group(last)
    alone = [dist.new_group([p]) for p in range(N)][RANK]
    x = values(100_000)
    dist.all_reduce(x, group=alone)
    assert torch.equal(x, values(100_000))


def check_what_cannot_work_is_refused():
    for call, message in [
        (lambda: dist.all_gather([torch.empty(1)], torch.ones(1)), "a tensor per rank"),
        (lambda: dist.all_reduce(torch.eye(3).to_sparse()), "dense"),
        (lambda: dist.all_to_all_single(torch.empty(N + 1), torch.empty(N + 1)), "equal parts"),
        (
            lambda: all_gather_single(torch.empty(4 * N, dtype=torch.bfloat16), torch.ones(4)),
            "one dtype and device, got torch.bfloat16 on cpu and torch.float32 on cpu",
        ),
        (lambda: dist.broadcast(torch.ones(3), group_src=N), f"no rank {N} in a group of {N}"),
        (lambda: dist.reduce(torch.ones(3), group_dst=N), f"no rank {N} in a group of {N}"),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=message):
            call()


def check_other_devices_go_to_their_own_backend():
    both = dist.new_group(backend="cpu:gossamer,cuda:gloo")
    assert dist.get_backend_config(both) == "cpu:gossamer,cuda:gloo"
    x = torch.ones(3)
    dist.all_reduce(x, group=both)
    assert (x == N).all()
    other = both.group_of(torch.device("cuda"))
    assert other.rank() == RANK
    assert dist.get_backend_config(other) == "cuda:gloo"
    if torch.cuda.is_available():
        for group in (both, other):
            x = torch.ones(3, device="cuda")
            dist.all_reduce(x, group=group)
            assert (x == N).all()
    with pytest.raises(RuntimeError, match="'cpu:gossamer,meta:nccl'"):
        dist.all_reduce(torch.ones(3, device="meta"))


if __name__ == "__main__":
    checks = {**globals(), **vars(process_group_training)}
    for name in sys.argv[1:] or [name for name in checks if name.startswith("check_")]:
        if RANK == 0:
            sys.stdout.write(f"{name}\n")
            sys.stdout.flush()
        checks[name]()
        dist.barrier()
    dist.destroy_process_group()
