"""What tests of contrastive learning share: tasks, rows, evaluations, the loss written out."""

from types import SimpleNamespace

import torch

from gossamer.algorithms.evaluation import Evaluator
from gossamer.algorithms.registry import find
from gossamer.runtime.component import validate
from gossamer.runtime.rows import RowLayout


def build(n=3, seed=0, **fields):
    values = {"name": "contrastive", **fields}
    return validate(find("task", "contrastive"), values, "task").build(n, seed)


def rows_of(problem, n, scale=0.1):
    """Return (n, d) different rows around the module's own, and the layout."""
    layout = RowLayout(problem.module)
    row = layout.gather(problem.module, torch.empty(layout.d, dtype=layout.dtype))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(n, layout.d, dtype=layout.dtype, generator=generator)
    mask = layout.gather(ones_like(problem.module), torch.empty(layout.d, dtype=layout.dtype))
    return row + scale * noise * mask, layout


def ones_like(module):
    """A module of the same parameters, all 1."""
    holder = SimpleNamespace()
    ones = [(name, torch.ones_like(p)) for name, p in module.named_parameters()]
    holder.named_parameters = lambda: iter(ones)
    return holder


def evaluate(comm, problem, x, layout, **options):
    oracle = SimpleNamespace(
        weighting=None, layout=layout, backpropagates=True, examples_at_once=None
    )
    evaluator = Evaluator(comm, oracle, problem, **options)
    return evaluator.evaluate(x[comm.ranks.start : comm.ranks.stop])


def written_out(z, beta, pairs):
    """Equation (1), a row at a time."""
    views, n, _ = z.shape
    total = 0.0
    for v in range(views):
        for i in range(n):
            others = [z[w, k] for k in range(n) if k != i for w in ((1 - v,) if pairs else (0, 1))]
            scores = beta * torch.stack(others) @ z[v, i]
            total = total + scores.exp().sum().log() - beta * z[v, i] @ z[1 - v, i]
    return total / (views * n)
