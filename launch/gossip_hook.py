"""For DistributedDataParallel: a communication hook that gossips instead of all-reducing.

    state = gossamer.GossipState(topology="exponential")
    model = DistributedDataParallel(net, broadcast_buffers=False)
    model.register_comm_hook(state, gossamer.gossip_hook)

Averaged are the gradients, ``g_i <- sum_j W_ij(t) g_j``, or with ``average="parameters"`` the
parameters, ``x_i <- sum_j W_ij(t) x_j``, with each rank's own gradient left to its optimizer.

Gossip on gradients (as GossipGraD's hooks for torch do, arXiv:1803.05880) lets ranks step apart,
and nothing pulls their parameters together again: differences stay, and grow in the directions in
which W has eigenvalues of no positive real part (of ``exponential`` on 4 ranks, one pair of three).
Where ranks must stay close, and shards differ, average the parameters: that is decentralized SGD
(arXiv:1705.09056), which contracts what differs.
"""

# Without postponed annotations: torch compares those of a hook with its own classes.

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket

from gossamer.launch.attach import as_topology
from gossamer.runtime import Communicator, ConfigError
from gossamer.runtime.transports.select import join_torch
from gossamer.topologies import Topology

__all__ = ["GossipState", "gossip_hook"]


class GossipState:
    """What ``gossip_hook`` needs: the ranks of the default process group on a graph.

    One for each model; ranks are those of ``dist.get_rank()``, whatever backend the group has.

    Attributes:
        average: what is averaged.
        comm: the communicator; ``comm.round`` is t, which moves by one when a backward pass that
            synchronises has handed over its last bucket.
    """

    def __init__(
        self,
        topology: str | Mapping[str, Any] | Topology = "exponential",
        *,
        average: Literal["gradients", "parameters"] = "gradients",
        device: torch.device | str = "cpu",
        seed: int = 0,
        timeout_s: float = 300.0,
    ) -> None:
        """Join; every rank calls it after ``init_process_group``, with the same arguments.

        Args:
            topology: a name, a section as in YAML ({"name": "base", "k": 1}), or a Topology.
            average: what to average.
            device: where the gradients are.
            seed: of topologies that draw.
            timeout_s: bound of every wait for a neighbour.

        Raises:
            ConfigError: there is no process group, or the topology does not fit its size.
        """
        if average not in ("gradients", "parameters"):
            raise ConfigError(
                f"GossipState: average must be gradients or parameters, got {average!r}"
            )
        if not dist.is_initialized():
            raise ConfigError(
                "GossipState: no process group; call torch.distributed.init_process_group first"
            )
        graph = as_topology(topology, dist.get_world_size())
        transport = join_torch(torch.device(device), timeout_s)
        self.average = average
        self.comm = Communicator(graph, transport, seed=seed, timeout_s=timeout_s)

    def close(self) -> None:
        """Finish what is under way and leave; call it before ``destroy_process_group``."""
        self.comm.close()


def gossip_hook(state: GossipState, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Average a bucket's gradients, or its parameters, over the neighbours of round t, in place.

    For ``DistributedDataParallel.register_comm_hook``. All buckets of a step use the same W(t);
    under ``no_sync`` nothing is averaged and t stays. Buffers are not gradients: with
    ``broadcast_buffers=True`` each forward pass copies rank 0's to all ranks.

    Returns:
        A future of the bucket's buffer; its error names the neighbour that was lost.
    """
    comm, gradients = state.comm, bucket.buffer()
    row = gradients
    if state.average == "parameters":
        row = torch.cat([p.data.reshape(-1) for p in bucket.parameters()])
    work = comm.neighbor_average_async(row[None], out=row[None])
    if state.average == "parameters":
        parameters = [p.data for p in bucket.parameters()]

        def write_back() -> None:
            work.wait()
            parts = row.split([p.numel() for p in parameters])
            for p, part in zip(parameters, parts, strict=True):
                p.copy_(part.view(p.shape))

        # Not before: the rest of the backward pass may read the parameters (DDP hands over the
        # buckets of those that it takes for unused at once).
        torch.autograd.Variable._execution_engine.queue_callback(write_back)
    if bucket.is_last():
        comm.step += 1
        comm.round += 1

    def finish(_: object) -> Tensor:
        work.wait()
        return gradients

    devices: list[int | str | torch.device] = [] if gradients.is_cpu else [gradients.device]
    over: torch.futures.Future[None] = torch.futures.Future(devices=devices)
    result: torch.futures.Future[Tensor] = over.then(finish)  # an error raised here reaches C++
    work.add_done_callback(lambda: over.set_result(None))
    return result
