"""Joins, when imported by a rank of test_process_group.py: backend gossamer, and gloo beside it."""

from datetime import timedelta

import torch
import torch.distributed as dist

torch.set_num_threads(1)
dist.init_process_group("gossamer", timeout=timedelta(seconds=60))
RANK, N, OURS = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
GLOO = dist.new_group(backend="gloo")
assert dist.get_backend() == "gossamer"

# torch before 2.13 has the other names only.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def values(*shape, dtype=torch.float32, seed=0):
    """Small integers, other ones on every rank: sums and products are exact in every dtype."""
    generator = torch.Generator().manual_seed(100 * seed + RANK)
    return torch.randint(-2, 4, shape, generator=generator).to(dtype)


def same(run, exact=True):
    """Run with both groups; every tensor must come out the same."""
    found, expected = run(OURS), run(GLOO)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        if exact:
            assert torch.equal(a, b), (a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
