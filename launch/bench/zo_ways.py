"""The steps that ``bench zo`` compares: two forward passes, MeZO in plain torch, ours, and Adam."""

# Shapes: B batch, T tokens, V vocabulary.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.algorithms.decentralized.all_reduce import AllReduce
from gossamer.algorithms.optimizers.adam import Adam
from gossamer.algorithms.optimizers.sgd import SGD
from gossamer.algorithms.problems import Batch, Problem
from gossamer.algorithms.program import TrainingProgram
from gossamer.algorithms.protocols import Optimizer, Oracle
from gossamer.algorithms.tasks.arrays import TensorDataset
from gossamer.algorithms.tasks.transformer import Transformer
from gossamer.algorithms.zeroth_order.transient import scratch_elements
from gossamer.algorithms.zeroth_order.zeroth_order import ZerothOrder
from gossamer.runtime import Communicator, ConfigError
from gossamer.runtime.native import Piece
from gossamer.runtime.perturb import Distribution, add_

__all__ = ["EPS", "WAYS", "Step", "ZoModel", "make_program", "make_way", "mezo", "train"]

WAYS = ("forwards", "mezo", "ours", "ours signs", "ours adam", "adam")
"""Two losses alone; plain torch; ours with normals, with signs, with Adam's update; first order."""

EPS = 1e-3
_LR = 1e-7
_HEAD = 64
_EXAMPLES = 64

Inputs = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ZoModel:
    """A transformer of GPT-2's shape, its output layer the embedding.

    Attributes:
        width: a multiple of 64, of a head each.
        layers: blocks.
        vocabulary: V.
        context: T.
        batch_size: B, per rank.
    """

    width: int
    layers: int
    vocabulary: int
    context: int
    batch_size: int

    @staticmethod
    def of_size(parameters: int, vocabulary: int, context: int, batch_size: int) -> ZoModel:
        """Return the widest one of about so many, with GPT-2's layer for every 64 of its width.

        Raises:
            ConfigError: there is none.
        """
        for width in range(_HEAD * 64, 0, -_HEAD):
            layers = round((parameters - (vocabulary + context) * width) / (12 * width**2))
            if layers >= width / _HEAD:
                return ZoModel(width, layers, vocabulary, context, batch_size)
        raise ConfigError(
            f"--parameters: no transformer with {vocabulary} tokens has {parameters:,}; use more, "
            "or a smaller --vocabulary"
        )

    def tiny(self) -> ZoModel:
        """Return the same in small."""
        return replace(self, width=_HEAD, layers=1, vocabulary=16, context=4)

    def module(self) -> nn.Module:
        """Return the module, the same parameters every time."""
        torch.manual_seed(0)
        heads = self.width // _HEAD
        shape = {"layers": self.layers, "width": self.width, "heads": heads}
        return Transformer(vocabulary=self.vocabulary, context=self.context, tied=True, **shape)

    def batch(self, seed: int, count: int | None = None) -> Inputs:
        """Return tokens (B, T) and those that follow."""
        generator = torch.Generator().manual_seed(seed)
        shape = (count or self.batch_size, self.context + 1)
        tokens = torch.randint(self.vocabulary, shape, generator=generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class Step(NamedTuple):
    """A training step on a batch, and what in it moves parameters, alone (None: nothing does)."""

    run: Callable[[Inputs], object]
    moves: Callable[[], object] | None


def make_way(way: str, model: ZoModel, comm: Communicator) -> Step:
    """Return the step called ``way``, at the first parameters."""
    if way.startswith("ours"):
        return _ours(way, model, comm)
    return {"forwards": _forwards, "mezo": mezo, "adam": _adam}[way](model.module())


def _loss(module: nn.Module, inputs: Inputs) -> Tensor:
    return F.cross_entropy(module(inputs[0]).flatten(0, -2), inputs[1].flatten())


def _forwards(module: nn.Module) -> Step:
    def run(inputs: Inputs) -> float:
        with torch.no_grad():
            return _loss(module, inputs).item() - _loss(module, inputs).item()

    return Step(run, None)


def mezo(module: nn.Module) -> Step:
    """Return MeZO as plain torch has it (arXiv:2305.17333, Algorithm 1)."""
    seeds = np.random.default_rng(0)

    def move(seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for _, p in module.named_parameters():
            z = torch.normal(mean=0.0, std=1.0, size=p.shape)
            p.data.add_(z, alpha=scale)

    def run(inputs: Inputs) -> None:
        seed = int(seeds.integers(2**31))
        with torch.no_grad():
            move(seed, EPS)
            high = _loss(module, inputs).item()
            move(seed, -2 * EPS)
            low = _loss(module, inputs).item()
            move(seed, EPS)
            move(seed, -_LR * (high - low) / (2 * EPS))

    def moves() -> None:
        for scale in (EPS, -2 * EPS, EPS, _LR):
            move(0, scale)

    return Step(run, moves)


def _adam(module: nn.Module) -> Step:
    optimizer = torch.optim.Adam(module.parameters(), lr=_LR)

    def run(inputs: Inputs) -> None:
        optimizer.zero_grad()
        _loss(module, inputs).backward()
        optimizer.step()

    return Step(run, None)


def _ours(way: str, model: ZoModel, comm: Communicator) -> Step:
    oracle = ZerothOrder(
        batch_size=model.batch_size,
        eps=EPS,
        distribution="rademacher" if way == "ours signs" else "normal",
        restore="transient",
    )
    optimizer = Adam(lr=_LR) if way == "ours adam" else SGD(lr=_LR)
    program = make_program(model, comm, oracle, optimizer)
    return Step(lambda inputs: train(program, inputs), _moves(program, oracle, optimizer, model))


def make_program(
    model: ZoModel, comm: Communicator, oracle: Oracle, optimizer: Optimizer
) -> TrainingProgram:
    """Return a run of all-reduce on the model, with a step counter of its own."""
    data = TensorDataset(model.batch(0, _EXAMPLES))
    shards = tuple(np.array_split(np.arange(_EXAMPLES), comm.n))
    problem = Problem(model.module(), data, shards, cast(Any, _loss))
    own = Communicator(comm.topology, comm.transport, timeout_s=comm.timeout_s)
    return TrainingProgram(own, problem, oracle, AllReduce(optimizer=optimizer)).start()


def train(program: TrainingProgram, inputs: Inputs) -> None:
    """Make a step on a batch."""
    program.algorithm.step(program.comm, program.oracle, program.state, [[Batch(inputs)]])
    program.comm.step += 1


def _moves(
    program: TrainingProgram, oracle: ZerothOrder, optimizer: Optimizer, model: ZoModel
) -> Callable[[], object]:
    """Return what a step does beside its forward passes: two moves through scratch, and one of x.

    Every element is moved; a step leaves out the rows of embeddings that no token looks up.
    """
    x, layout = program.state.x, program.layout
    part = scratch_elements(layout.d, x.device)
    scratch = torch.empty(part)
    elements: Distribution = "rademacher" if oracle.distribution == "rademacher" else "normal"

    def moves() -> None:
        for scale in (EPS, -EPS):
            for s, view in zip(layout.slices, layout.views(x[0]), strict=True):
                flat = view.reshape(-1)
                for begin in range(0, len(flat), part):
                    n = min(part, len(flat) - begin)
                    pieces = [Piece(0, n, begin, s.tensor)]
                    add_(scratch[:n], pieces, 0, 0, 0, scale, elements, source=flat)
        update()

    mean = oracle.deferred(x, [Batch(model.batch(0))]).mean(program.comm)
    assert mean is not None, "the losses of the first parameters are finite"
    update = partial(optimizer.apply_, program.state.optimizer, x, mean, program.comm)
    return moves
