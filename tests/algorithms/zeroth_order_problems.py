"""Small problems for estimates from losses, and runs on them."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from gossamer.algorithms.decentralized.all_reduce import AllReduce
from gossamer.algorithms.optimizers.sgd import SGD
from gossamer.algorithms.problems import Problem
from gossamer.algorithms.program import TrainingProgram
from gossamer.algorithms.tasks.arrays import TensorDataset
from gossamer.algorithms.tasks.objectives import ClassificationLoss, count_right
from gossamer.algorithms.tasks.transformer import Transformer
from gossamer.algorithms.zeroth_order.zeroth_order import ZerothOrder
from gossamer.runtime import Communicator, StackedTransport
from gossamer.topologies import build

N = 48
"""Examples."""


class Point(nn.Module):
    """A point of space."""

    def __init__(self, start):
        super().__init__()
        self.x = nn.Parameter(start)

    def forward(self, a):
        return self.x - a


def quadratic(d=12, n=1):
    """Return a problem with loss (x - a)' H (x - a) / 2, and H."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
    h = root @ root.T + 0.1 * torch.eye(d, dtype=torch.float64)
    a = torch.randn(N, d, generator=generator, dtype=torch.float64)

    def loss(model, inputs):
        apart = model(inputs[0])
        return 0.5 * ((apart @ h) * apart).sum(1).mean()

    shards = tuple(np.array_split(np.arange(N), n))
    return Problem(
        Point(torch.full((d,), 1.5, dtype=torch.float64)), TensorDataset((a,)), shards, loss
    ), h


def network(n=1, dtype=torch.float32, **penalty):
    """Return a classifier's problem, with dropout in the module."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(N, 5, generator=generator).to(dtype)
    targets = torch.randint(3, (N,), generator=generator)
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, 3)).to(dtype)
    shards = tuple(np.array_split(np.arange(N), n))
    loss = ClassificationLoss(**penalty)
    return Problem(module, TensorDataset((inputs, targets)), shards, loss, score=count_right)


def words(n=1):
    """Return a small language model's problem, with embeddings and attention."""
    torch.manual_seed(0)
    module = Transformer(vocabulary=23, context=6, layers=1, width=8, heads=2, tied=True)
    tokens = torch.randint(23, (N, 7), generator=torch.Generator().manual_seed(0))

    def loss(model, inputs):
        return F.cross_entropy(model(inputs[0]).flatten(0, -2), inputs[1].flatten())

    data = TensorDataset((tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()))
    return Problem(module, data, tuple(np.array_split(np.arange(N), n)), loss)


def program(problem, oracle, optimizer=None, n=None, seed=0, algorithm=None):
    comm = Communicator(build("ring", n or len(problem.shards)), StackedTransport(), seed=seed)
    algorithm = algorithm or AllReduce(optimizer=optimizer or SGD(lr=0.01))
    return TrainingProgram(comm, problem, oracle, algorithm).start()


def advance(run, steps):
    for _ in range(steps):
        run.step()
        run.comm.step += 1
    return run


def estimate_at(run, x=None):
    x = run.state.x if x is None else x
    batches = run._sampler.batches(run.comm.step, 1)
    return run.oracle.deferred(x, batches[0]), batches[0]


def mean_of(run):
    return estimate_at(run)[0].mean(run.comm)


def full(**options):
    return ZerothOrder(sampling="full", **options)
