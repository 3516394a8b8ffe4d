"""The steps that ``bench contrastive`` compares: ours, plain torch, a scan in Python, LibAUC's."""

# Shapes: B examples with two views each, so 2B rows and columns, view 0 of all, then view 1.

from __future__ import annotations

import contextlib
import copy
import importlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.algorithms.contrastive.contrast import unit
from gossamer.algorithms.contrastive.contrastive import Contrastive
from gossamer.algorithms.decentralized.all_reduce import AllReduce
from gossamer.algorithms.optimizers.sgd import SGD
from gossamer.algorithms.problems import Batch, Dataset, Problem
from gossamer.algorithms.program import TrainingProgram
from gossamer.algorithms.tasks.contrastive import Contrastive as ContrastiveTask
from gossamer.runtime import Communicator, StackedTransport
from gossamer.runtime.component import validate
from gossamer.runtime.native.chains import chain_moves
from gossamer.runtime.random import Random
from gossamer.topologies import build

__all__ = [
    "BETA",
    "OURS",
    "PARTS",
    "WAYS",
    "Case",
    "ContrastiveModel",
    "PlainStep",
    "libauc_losses",
    "make_case",
    "make_program",
    "plain_loss",
]

OURS = ("simclr", "dcl", "sogclr", "emc2")
WAYS = ("simclr torch", *OURS, "emc2 scan", "sogclr libauc")
"""Autograd's cross-entropy over the Gram matrix; ours; EMC^2's chains by a loop in Python over
columns; LibAUC's loss."""
PARTS = ("views", "encoder", "uniforms", "chains")
"""What a step is made of, alone: both views of the batch; the encoder forward and backward; EMC^2's
-log U; its chains, at the first parameters, where most proposals are taken."""

BETA = 14.28
_LR = 0.01
_BURN_IN = 0.5

Case = Callable[[Batch], object]
PlainLoss = Callable[[Tensor, Tensor, int], Tensor]
"""(rows (2B, dim), ids (B,), step) -> loss with its graph, whose gradient is that of (1)'s kind."""


@dataclass(frozen=True)
class ContrastiveModel:
    """What is trained.

    Attributes:
        data: digits, 8 x 8, or mnist, 28 x 28.
        encoder: mlp or resnet18.
        dim: of an embedding.
        batch: B.
    """

    data: str
    encoder: str
    dim: int
    batch: int

    def problem(self) -> Problem:
        """Return the task, built anew: the same images and parameters every time.

        Raises:
            ConfigError: the encoder's package, or the data, are not there.
        """
        encoder = {"name": self.encoder, "dim": self.dim}
        fields = {"data": self.data, "encoder": encoder}
        return validate(ContrastiveTask, fields, "task").build(1, 0)

    def batch_of(self, problem: Problem, number: int) -> Batch:
        """Return the batch of a step, with the places of its examples."""
        train = cast(Dataset, problem.train)
        generator = torch.Generator().manual_seed(number)
        ids = torch.randperm(len(train), generator=generator)[: self.batch]
        return Batch(train[ids], ids)


def make_case(name: str, problem: Problem, model: ContrastiveModel) -> Case:
    """Return the step, or the part of one, called ``name``, at the first parameters.

    Raises:
        ImportError: LibAUC is not installed.
    """
    problem = replace(problem, module=copy.deepcopy(problem.module))
    if name in OURS:
        program = make_program(problem, model, {"name": name})
        return partial(_train, program)
    if name in PARTS:
        parts: dict[str, Callable[[Problem, ContrastiveModel], Case]] = {
            "views": _views,
            "encoder": _encoder,
            "uniforms": _uniforms,
            "chains": _chains,
        }
        return parts[name](problem, model)
    step = PlainStep(problem, plain_loss(name, problem))
    optimizer = torch.optim.SGD(step.module.parameters(), lr=_LR)

    def train(batch: Batch) -> None:
        optimizer.zero_grad()
        step.differentiate(batch)
        optimizer.step()

    return train


# --- ours ---------------------------------------------------------------------------------------


def make_program(
    problem: Problem, model: ContrastiveModel, loss: Mapping[str, object]
) -> TrainingProgram:
    """Return a run of one rank with all-reduce and SGD."""
    fields = {"batch_size": model.batch, "loss": {"beta": BETA, **loss}}
    oracle = validate(Contrastive, fields, "oracle")
    comm = Communicator(build("ring", 1), StackedTransport())
    return TrainingProgram(comm, problem, oracle, AllReduce(optimizer=SGD(lr=_LR))).start()


def _train(program: TrainingProgram, batch: Batch) -> None:
    program.algorithm.step(program.comm, program.oracle, program.state, [[batch]])
    program.comm.step += 1


# --- as a user would write it -------------------------------------------------------------------


class PlainStep:
    """An encoder and a loss that autograd differentiates."""

    def __init__(self, problem: Problem, loss: PlainLoss) -> None:
        """Take the problem's module."""
        self.problem, self.module, self.loss = problem, problem.module, loss
        self.step = 0

    def differentiate(self, batch: Batch) -> None:
        """Add the gradient of a batch to the parameters', and count the step."""
        z = F.normalize(self.module(_both_views(self.problem, batch, self.step)))
        assert batch.indices is not None
        self.loss(z, batch.indices, self.step).backward()
        self.step += 1


def plain_loss(way: str, problem: Problem) -> PlainLoss:
    """Return the loss of a way that is not ours, its states empty.

    Raises:
        ImportError: LibAUC is not installed.
    """
    examples = len(cast(Dataset, problem.train))
    if way == "simclr torch":
        return _simclr
    return _Scan(examples) if way == "emc2 scan" else _LibAUC(examples)


def _simclr(z: Tensor, ids: Tensor, step: int) -> Tensor:
    """Return cross-entropy over the other 2B - 1 rows (arXiv:2002.05709)."""
    scores = (BETA * z @ z.T).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(scores, torch.arange(len(z)).roll(len(ids)))


class _Scan:
    """EMC^2 (arXiv:2404.10575), a column at a time; held states repel nobody."""

    def __init__(self, examples: int) -> None:
        self.scores = torch.full((examples,), -torch.inf)

    def __call__(self, z: Tensor, ids: Tensor, step: int) -> Tensor:
        b = len(ids)
        cosines = z @ z.T
        drawn = Random(0).stream("chain", ids.tolist(), step).uniform_(torch.empty(b, 4 * b))
        exponentials = drawn.log_().neg_().view(b, 2, 2 * b).transpose(0, 1)
        scores = (BETA * cosines.detach()).view(2, b, 2 * b)
        proposals = 2 * (b - 1)
        burnt = int(_BURN_IN * proposals)
        counts, self.scores[ids] = scan(scores, exponentials, self.scores[ids], burnt)
        weights = counts.view(2 * b, 2 * b) / (proposals - burnt)
        own = torch.arange(2 * b)
        attracted = cosines[own, own.roll(b)]
        return BETA * ((weights * cosines).sum(dim=1) - attracted).mean()


def scan(scores: Tensor, exponentials: Tensor, held: Tensor, burn_in: int) -> tuple[Tensor, Tensor]:
    """Return how often each column was recorded, (2, B, 2B), and the states' scores at the end.

    Args:
        scores: (2, B, 2B), of an example's two rows; an image's chain goes through both.
        exponentials: likewise, -log U.
        held: (B,), of the states carried in; -inf: the chain is empty.
        burn_in: proposals of a row before the first recorded state.
    """
    _, b, width = scores.shape
    rows, counts = torch.arange(b), torch.zeros_like(scores)
    state, score = torch.full((b,), -1), held
    for view in (0, 1):
        tests = torch.zeros(b, dtype=torch.int64)
        for j in range(width):
            is_other = rows != j % b
            new = scores[view, :, j]
            moves = is_other & (new + exponentials[view, :, j] > score)
            state, score = torch.where(moves, j, state), torch.where(moves, new, score)
            tests += is_other
            records = is_other & (tests > burn_in) & (state >= 0)
            counts[view, rows, state.clamp_min(0)] += records
    return counts, score


def libauc_losses() -> Any:
    """Return LibAUC's module of contrastive losses.

    Raises:
        ImportError: it, or what it imports, is not installed.
    """
    return importlib.import_module("libauc.losses.contrastive")


class _LibAUC:
    """SogCLR (arXiv:2202.12387) by LibAUC, times beta / 2: its loss is a sum over both views."""

    def __init__(self, examples: int) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its schedule
            self.loss = libauc_losses().GCLoss_v1(N=examples, tau=1 / BETA, device="cpu")

    def __call__(self, z: Tensor, ids: Tensor, step: int) -> Tensor:
        found: Tensor = self.loss(*z.split(len(ids)), ids)
        return BETA / 2 * found


# --- parts --------------------------------------------------------------------------------------


def _both_views(problem: Problem, batch: Batch, step: int) -> Tensor:
    """Return the views of the batch, (2B, C, H, W)."""
    contrast, ids = problem.contrast, batch.indices
    assert contrast is not None
    assert ids is not None
    views = [contrast.view(batch.inputs, ids, v, Random(0), step, 0)[0] for v in (0, 1)]
    return torch.cat(views)


def _views(problem: Problem, model: ContrastiveModel) -> Case:
    return lambda batch: _both_views(problem, batch, 0)


def _encoder(problem: Problem, model: ContrastiveModel) -> Case:
    images = _both_views(problem, model.batch_of(problem, 0), 0)
    grad = torch.randn(len(images), model.dim, generator=torch.Generator().manual_seed(0))

    def run(batch: Batch) -> None:
        problem.module.zero_grad()
        unit(problem.module(images)).backward(grad)

    return run


def _uniforms(problem: Problem, model: ContrastiveModel) -> Case:
    random, out = Random(0), torch.empty(model.batch, 4 * model.batch)

    def run(batch: Batch) -> None:
        assert batch.indices is not None
        random.stream("chain", batch.indices.tolist()).uniform_(out).log_().neg_()

    return run


def _chains(problem: Problem, model: ContrastiveModel) -> Case:
    batch = model.batch_of(problem, 0)
    ids, rows = batch.indices, 2 * model.batch
    assert ids is not None
    with torch.no_grad():
        z = unit(problem.module(_both_views(problem, batch, 0)))
    scores = BETA * z @ z.T
    exponentials = torch.empty(rows, rows).exponential_(generator=torch.Generator().manual_seed(0))
    empty = torch.full((rows,), -torch.inf)
    burn_in = torch.full((rows,), int(_BURN_IN * (rows - 2)), dtype=torch.int32)

    def run(_: Batch) -> None:
        chain_moves(scores, exponentials, ids, ids, empty, burn_in=burn_in, carry="stale")

    return run


def encoder_flops(problem: Problem, model: ContrastiveModel) -> int:
    """Return the floating-point operations of products in the part ``encoder``."""
    from torch.utils.flop_counter import FlopCounterMode

    run = _encoder(replace(problem, module=copy.deepcopy(problem.module)), model)
    with FlopCounterMode(display=False) as counter:
        run(model.batch_of(problem, 0))
    return int(counter.get_total_flops())
