"""A small contrastive problem, and its losses written out: what the oracle must come to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.algorithms.contrastive.contrast import unit
from gossamer.algorithms.contrastive.contrastive import Contrastive
from gossamer.algorithms.problems import Batch, Problem
from gossamer.algorithms.sampling import Sampler
from gossamer.algorithms.tasks.arrays import TensorDataset
from gossamer.runtime import Communicator, StackedTransport
from gossamer.runtime.component import validate
from gossamer.topologies import build

# N examples, B in a batch of all ranks, D elements of an embedding.

WIDTH = 5


class Towers(nn.Module):
    """An encoder for view 0 and one for view 1; without pairs the first makes all embeddings."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.image = self._tower(dropout)
        self.text = self._tower(dropout)

    def _tower(self, dropout: float) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(WIDTH, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, WIDTH)
        )


@dataclass
class Points:
    """Views of points (a ``Contrast``): a counted shift of each, one that stays, or two sides."""

    mode: str
    dtype: torch.dtype
    spread: float = 0.3

    def view(self, inputs, ids, view, random, step, draw):
        if self.mode != "infinite":
            return self.held(inputs, ids, view)
        stream = random.stream(f"shift-{view}", ids.tolist(), step, draw)
        shift = stream.normal_(torch.empty(len(ids), WIDTH)).to(self.dtype)
        return (inputs[0] + self.spread * shift,)

    def held(self, inputs, ids, view):
        if self.mode == "infinite":
            return (inputs[0],)
        sides = inputs[0] + self.spread * torch.sin((view + 1.0) * inputs[0])
        return (sides,)

    def embed(self, module, inputs, view):
        return unit((module.text if view and self.mode == "pairs" else module.image)(*inputs))


def problem(n, *, mode="finite", count=24, dtype=torch.float32, dropout=0.0, shards=None):
    generator = torch.Generator().manual_seed(7)
    points = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    torch.manual_seed(1)
    module = Towers(dropout).to(dtype)
    split = shards or [np.arange(count)[rank::n] for rank in range(n)]
    return Problem(
        module=module,
        train=TensorDataset((points,)),
        shards=tuple(np.asarray(s) for s in split),
        loss=None,
        contrast=Points(mode, dtype),
    )


def oracle(loss, **fields):
    return validate(Contrastive, {"loss": loss, **fields}, "oracle")


class Bench:
    """An oracle on stacked ranks, all at the module's own parameters.

    Attributes:
        x: (n, d), may be changed between calls.
    """

    def __init__(self, loss, n=1, *, topology="complete", of=None, seed=0, **fields) -> None:
        options = {"mode": "finite", "count": 24, "dtype": torch.float32, **(of or {})}
        self.problem = problem(n, **options)
        self.comm = Communicator(build(topology, n), StackedTransport(), seed=seed, steps=100)
        self.oracle = oracle(loss, **{"batch_size": 4, **fields})
        plan = self.oracle.setup(self.comm, self.problem)
        self.sampler = Sampler(self.problem, plan, self.comm.ranks, seed)
        layout = self.oracle.layout
        row = layout.gather(self.problem.module, torch.zeros(layout.d, dtype=layout.dtype))
        self.x = row.repeat(n, 1)

    def batches(self):
        return self.sampler.batches(self.comm.step, 1)[0]

    def batch_of(self, *ids):
        """Return a batch of the given examples, a sequence of ids for each rank."""
        places = [torch.tensor(own) for own in ids]
        return [Batch(self.problem.train[p], p, drawn=(self.comm.step, 0)) for p in places]

    def __call__(self, batch=None, **options):
        estimate = self.oracle(self.x, batch or self.batches(), **options)
        estimate.grad = None if estimate.grad is None else estimate.grad.clone()
        return estimate

    def embeddings(self, batch, row=None, draw=0):
        """Return (2, B, D) of the batches of all ranks with a graph to the leaf ``row`` (d,)."""
        contrast, sides = self.problem.contrast, []
        ids = torch.cat([b.indices for b in batch])
        inputs = self.problem.train[ids]
        for view in (0, 1):
            seen = contrast.view(inputs, ids, view, self.comm.seed, self.comm.step, draw)
            sides.append(self.embed(seen, view, row))
        return torch.stack(sides)

    def held(self, keys, row=None):
        """Return (k, D) of what chains hold, with a graph to ``row``."""
        contrast = self.problem.contrast
        rows = [
            self.embed(
                contrast.held(self.problem.train[k[None] // 2], k[None] // 2, int(k) % 2),
                int(k) % 2,
                row,
            )
            for k in keys
        ]
        return torch.cat(rows)

    def embed(self, inputs, view, row=None):
        """Return embeddings by functional_call of parameters taken from ``row``."""
        row = self.x[0] if row is None else row
        views = self.oracle.layout.views(row)
        names = [s.name for s in self.oracle.layout.slices]
        values = dict(zip(names, views, strict=True))
        contrast, module = self.problem.contrast, self.problem.module

        class Call(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.module = module

            def forward(self, inputs):
                return contrast.embed(self.module, inputs, view)

        named = {f"module.{k}": v for k, v in values.items()}
        return torch.func.functional_call(Call(), named, (inputs,))

    def leaf(self):
        return self.x[0].clone().requires_grad_()


def negatives_of(ids: Tensor, pairs: bool = False) -> Tensor:
    """Return bool (2B, 2B): which rows of a batch repel which."""
    count = len(ids)
    found = torch.zeros(2 * count, 2 * count, dtype=torch.bool)
    for r in range(2 * count):
        for k in range(2 * count):
            other = ids[r % count] != ids[k % count]
            found[r, k] = other and not (pairs and r // count == k // count)
    return found
