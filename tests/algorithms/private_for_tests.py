"""A small private run, step by step."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from gossamer.algorithms.decentralized.all_reduce import AllReduce
from gossamer.algorithms.decentralized.dsgd import DSGD
from gossamer.algorithms.optimizers.sgd import SGD
from gossamer.algorithms.oracles.backprop import Backprop
from gossamer.algorithms.privacy.dp import DP
from gossamer.algorithms.problems import Problem
from gossamer.algorithms.program import TrainingProgram
from gossamer.algorithms.tasks.arrays import TensorDataset
from gossamer.runtime import Communicator, StackedTransport
from gossamer.runtime.component import validate
from gossamer.topologies import build

EXAMPLES, FEATURES = 240, 12


def problem(n=1, examples=EXAMPLES, hidden=0):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, FEATURES, generator=generator)
    y = (x[:, 0] > 0).long()
    torch.manual_seed(1)
    module = nn.Linear(FEATURES, 2)
    if hidden:
        module = nn.Sequential(nn.Linear(FEATURES, hidden), nn.Tanh(), nn.Linear(hidden, 2))

    def loss(model, inputs):
        return F.cross_entropy(model(inputs[0]), inputs[1])

    shards = tuple(np.array_split(np.arange(examples), n))
    data = TensorDataset((x, y))
    return Problem(module, data, shards, loss, test=data)


def program(
    n=1,
    *,
    algorithm=None,
    task=None,
    backprop=None,
    steps=None,
    seed=0,
    topology=None,
    around=lambda oracle: oracle,
    **dp,
):
    graph = topology or build("ring", n)
    comm = Communicator(graph, StackedTransport(), steps=steps, seed=seed)
    inner = Backprop(**(backprop or {"batch_size": 60 // n}))
    oracle = validate(DP, {"noise_seed": 5, **dp, "inner": inner}, "oracle")
    algorithm = algorithm or AllReduce(optimizer=SGD(lr=0.5))
    made = TrainingProgram(comm, task or problem(n), around(oracle), algorithm)
    return made.start()


def run(made, steps):
    for _ in range(steps):
        made.step()
        made.comm.step += 1
    return made


def noisy(n, calls, width=16, dtype=torch.float32, task=None, gossip=True, **options):
    """Return the noise of so many sums, (calls, n, elements), and the program that made it.

    The model's gradient is zero, so that what is left of an estimate times its divisor is noise.
    """
    wide = task or problem(n)
    wide.module = nn.Linear(FEATURES, width, bias=False).to(dtype)
    wide.train = TensorDataset((wide.train[torch.arange(len(wide.train))][0].to(dtype),))
    wide.loss = lambda model, inputs: model(inputs[0]).sum() * 0
    algorithm = DSGD(optimizer=SGD(lr=0.1)) if gossip else None
    made = program(n, task=wide, algorithm=algorithm, **{"noise_multiplier": 2.0, **options})
    found = []
    sizes = torch.tensor(made.oracle._sizes, dtype=dtype)[:, None]
    for _ in range(calls):
        estimate = made.oracle(made.state.x, made._batches()[0])
        found.append(torch.stack([made.layout.values(row) for row in estimate.grad * sizes]))
        made.comm.step += 1
    return torch.stack(found), made, estimate
