"""A small zeroth-order run on a graph, step by step."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from gossamer.algorithms.problems import Problem
from gossamer.algorithms.program import TrainingProgram
from gossamer.algorithms.tasks.arrays import TensorDataset
from gossamer.algorithms.zeroth_order.zeroth_order import ZerothOrder
from gossamer.runtime import Communicator, StackedTransport
from gossamer.topologies import Topology, build

EXAMPLES, FEATURES = 64, 6


class Faults:
    """Which ranks' losses are NaN now."""

    ranks: tuple[int, ...] = ()


def problem(n, dtype=torch.float32, faults=None, same_data=False):
    """Two classes; the last feature says whose example it is, so that a loss can fail there."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(EXAMPLES, FEATURES, generator=generator).to(dtype)
    y = (x[:, 0] > 0).long()
    everything = np.arange(EXAMPLES)
    shards = (everything,) * n if same_data else tuple(np.array_split(everything, n))
    for rank, shard in enumerate(() if same_data else shards):
        x[shard, -1] = float(rank)
    torch.manual_seed(1)

    def loss(module, inputs):
        value = F.cross_entropy(module(inputs[0]), inputs[1])
        fails = faults is not None and int(inputs[0][0, -1]) in faults.ranks
        return value * torch.nan if fails else value

    return Problem(nn.Linear(FEATURES, 2, dtype=dtype), TensorDataset((x, y)), shards, loss)


def program(algorithm, graph, n, *, dtype=torch.float32, faults=None, same_data=False, **oracle):
    topology = graph if isinstance(graph, Topology) else build(graph, n)
    comm = Communicator(topology, StackedTransport(), steps=100)
    made = ZerothOrder(**({"batch_size": 4, "directions": "own"} | oracle))
    return TrainingProgram(comm, problem(n, dtype, faults, same_data), made, algorithm).start()


def run(made, steps=1):
    for _ in range(steps):
        made.step()
        made.comm.step += 1
        made.comm.round += made.rounds_per_step
    return made
