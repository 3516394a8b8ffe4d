"""The backend ``gossamer`` of torch.distributed: collectives in shared memory for any torch code.

    torchrun --nproc-per-node 4 train.py     # with init_process_group("gossamer") inside

For CPU tensors of processes on one host; "cpu:gossamer,cuda:nccl" hands other devices to other
backends. Sums are added in ascending rank: the same bits on every rank, and in every run.
"""

from gossamer.runtime.process_group.group import GossamerGroup, create

__all__ = ["GossamerGroup", "create"]
