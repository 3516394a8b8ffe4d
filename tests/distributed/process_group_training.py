"""What test_process_group.py trains: with DistributedDataParallel, FSDP2 and the gossip hook."""

import pytest
import torch
from process_group_setup import GLOO, OURS, RANK, N, all_gather_single, same
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gossamer


def net():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4)
    )


def losses(model, steps=10):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(RANK)
    found = []
    for _ in range(steps):
        x = torch.randn(8, 16, generator=generator)
        loss = nn.functional.cross_entropy(model(x), x[:, :4].argmax(dim=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return [torch.stack(found)]


def check_distributed_data_parallel():
    def run(group, **options):
        model = DistributedDataParallel(net(), process_group=group, bucket_cap_mb=0.01, **options)
        return losses(model)

    same(run, exact=N == 2)  # sums of two terms have one order
    same(lambda group: run(group, static_graph=True, gradient_as_bucket_view=True), exact=N == 2)


def check_fully_shard():
    def run(group):
        model, mesh = net(), DeviceMesh.from_group(group, "cpu")
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return losses(model)

    same(run, exact=N == 2)


def gossip_steps(group, topology):
    """Train with the hook; each step's gradients must be W(t) times everyone's own."""
    state = gossamer.GossipState(topology, timeout_s=60)
    model = DistributedDataParallel(net(), process_group=group, bucket_cap_mb=0.01)
    model.register_comm_hook(state, gossamer.gossip_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(RANK)
    for t in range(5):
        batches = torch.randn(2, 8, 16, generator=generator)
        own = [torch.zeros_like(p) for p in model.parameters()]
        for x in batches:
            gradients = torch.autograd.grad(model.module(x).square().mean(), model.parameters())
            own = [a + g for a, g in zip(own, gradients, strict=True)]
        optimizer.zero_grad()
        assert state.comm.round == t
        with model.no_sync():
            model(batches[0]).square().mean().backward()
        assert state.comm.round == t
        model(batches[1]).square().mean().backward()
        assert state.comm.round == t + 1
        flat = torch.cat([g.reshape(-1) for g in own])
        rows = torch.empty(N * len(flat))
        all_gather_single(rows, flat)
        expected = state.comm.topology.round(t).apply(rows.view(N, -1).double().numpy())[RANK]
        found = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)
        optimizer.step()
    assert len(model.reducer._get_zeros_like_grad_buckets()) > 1
    state.close()


def gossip_on_parameters():
    state = gossamer.GossipState("ring", average="parameters", timeout_s=60)
    model = DistributedDataParallel(net(), bucket_cap_mb=0.01)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(RANK)
    model.register_comm_hook(state, gossamer.gossip_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for t in range(3):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(10 * t + RANK))
        before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        own = torch.autograd.grad(model.module(x).square().mean(), model.parameters())
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        rows = torch.empty(N * len(before))
        all_gather_single(rows, before)
        mixed = state.comm.topology.round(t).apply(rows.view(N, -1).numpy())[RANK]
        expected = torch.from_numpy(mixed) - 0.1 * torch.cat([g.reshape(-1) for g in own])
        found = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    state.close()


class HalfDetached(nn.Module):
    """y = u * w, in which w takes no gradient although it is a parameter."""

    def __init__(self):
        super().__init__()
        self.u, self.w = (nn.Parameter(torch.full((1,), 1.0 + RANK)) for _ in range(2))

    def forward(self, x):
        return x * self.u * self.w.detach()


def gossip_leaves_parameters_alone_until_backward_is_over():
    state = gossamer.GossipState("complete", average="parameters", timeout_s=60)
    model = DistributedDataParallel(HalfDetached(), find_unused_parameters=True)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0 + RANK)  # DDP gave everyone rank 0's
    model.register_comm_hook(state, gossamer.gossip_hook)
    model(torch.ones(1)).sum().backward()
    assert model.module.u.grad.item() == 1.0 + RANK
    assert model.module.w.item() == pytest.approx((N + 1) / 2)
    state.close()


def check_gossip_hook():
    gossip_on_parameters()
    gossip_leaves_parameters_alone_until_backward_is_over()
    for topology in ("ring", "one_peer_exponential", "complete"):
        gossip_steps(OURS, topology)
    gossip_steps(GLOO, "ring")
