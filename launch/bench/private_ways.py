"""The steps that ``bench private`` compares: plain torch, ours, and Opacus' two modes."""

# Shapes: B batch, T tokens, V vocabulary.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector

from gossamer.algorithms.decentralized.all_reduce import AllReduce
from gossamer.algorithms.optimizers.sgd import SGD
from gossamer.algorithms.oracles.backprop import Backprop
from gossamer.algorithms.privacy.disk import Disk
from gossamer.algorithms.privacy.dp import DP
from gossamer.algorithms.problems import Batch, Problem
from gossamer.algorithms.program import TrainingProgram
from gossamer.algorithms.protocols import Oracle
from gossamer.algorithms.tasks.arrays import TensorDataset
from gossamer.algorithms.tasks.transformer import Transformer
from gossamer.runtime import Communicator

__all__ = ["WAYS", "PrivateModel", "Step", "make_way"]

WAYS = ("plain", "dp", "disk one", "disk two", "opacus", "opacus ghost")
"""No privacy; ours; ours behind DiSK with one and with two evaluations; per-sample gradients that
are held; norms alone and a second backward pass."""

Inputs = tuple[Tensor, Tensor]

_LR = 0.1
_VOCABULARY, _HEADS = 256, 4
_CLASSES = 10
_EXAMPLES = 1024


@dataclass(frozen=True)
class PrivateModel:
    """A model and how it is trained; the same for every way.

    Attributes:
        name: ``transformer``: GPT-2's shape, of 256 tokens; ``cnn``: three convolutions on 32 x 32
            pictures, with GroupNorm.
        batch_size: examples per rank and step.
        width: of the transformer; channels of the last convolution.
        layers: blocks of the transformer.
        context: its tokens T.
        noise_multiplier: sigma.
        clip_norm: C.
    """

    name: Literal["transformer", "cnn"]
    batch_size: int
    width: int
    layers: int = 2
    context: int = 64
    noise_multiplier: float = 1.0
    clip_norm: float = 0.5

    def tiny(self) -> PrivateModel:
        """Return the same in small."""
        return replace(self, batch_size=2, width=16, context=8)

    def module(self) -> nn.Module:
        """Return the module, the same parameters every time."""
        torch.manual_seed(0)
        if self.name == "cnn":
            return _convolutions(self.width)
        return _Positioned(
            vocabulary=_VOCABULARY,
            context=self.context,
            layers=self.layers,
            width=self.width,
            heads=_HEADS,
            tied=False,
        )

    def examples(self, count: int, seed: int) -> Inputs:
        """Return what goes in, and the targets: (B,) classes or (B, T) tokens."""
        generator = torch.Generator().manual_seed(seed)
        if self.name == "cnn":
            pictures = torch.randn(count, 3, 32, 32, generator=generator)
            return pictures, torch.randint(_CLASSES, (count,), generator=generator)
        tokens = torch.randint(_VOCABULARY, (count, self.context + 1), generator=generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def batch(self, rank: int, step: int) -> Inputs:
        """Return a rank's examples of one step, the same for every way."""
        return self.examples(self.batch_size, 1 + rank + 1000 * (step + 100))


class Step(NamedTuple):
    """A training step on a batch, and a copy of the parameters (d,)."""

    run: Callable[[Inputs], None]
    flat: Callable[[], Tensor]


def make_way(way: str, model: PrivateModel, comm: Communicator) -> Step:
    """Return the step called ``way``, at the first parameters; every process calls it."""
    module = model.module()
    if way == "plain":
        return _plain(module, comm)
    if way == "opacus":
        return _opacus(module, model, comm)
    if way == "opacus ghost":
        return _opacus_ghost(module, model, comm)
    return _ours(way, module, model, comm)


def _plain(module: nn.Module, comm: Communicator) -> Step:
    wrapped = DistributedDataParallel(module) if comm.n > 1 else module
    optimizer = torch.optim.SGD(module.parameters(), lr=_LR)

    def step(inputs: Inputs) -> None:
        optimizer.zero_grad()
        _loss(wrapped, inputs).backward()
        optimizer.step()

    return Step(step, lambda: parameters_to_vector(module.parameters()).detach())


def _ours(way: str, module: nn.Module, model: PrivateModel, comm: Communicator) -> Step:
    data = TensorDataset(model.examples(_EXAMPLES, seed=0))
    shards = tuple(np.array_split(np.arange(_EXAMPLES), comm.n))
    problem = Problem(module, data, shards, cast(Any, _loss))
    oracle: Oracle = DP(
        noise_multiplier=model.noise_multiplier,
        clip_norm=model.clip_norm,
        inner=Backprop(batch_size=model.batch_size),
    )
    if way.startswith("disk"):
        oracle = Disk(kappa=0.7, gamma=0.0 if way == "disk one" else 0.5, inner=oracle)
    # The step counter is the way's own: the communicator is shared.
    own = Communicator(comm.topology, comm.transport, timeout_s=comm.timeout_s)
    program = TrainingProgram(own, problem, oracle, AllReduce(optimizer=SGD(lr=_LR))).start()

    def step(inputs: Inputs) -> None:
        program.algorithm.step(own, oracle, program.state, [[Batch(inputs, drawn=(own.step, 0))]])
        own.step += 1

    return Step(step, lambda: program.layout.values(program.state.x[0]))


def _opacus(module: nn.Module, model: PrivateModel, comm: Communicator) -> Step:
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DistributedDPOptimizer, DPOptimizer

    wrapped = GradSampleModule(module)
    cls = DistributedDPOptimizer if comm.n > 1 else DPOptimizer
    optimizer = cls(torch.optim.SGD(module.parameters(), lr=_LR), **_dp_options(model))

    def step(inputs: Inputs) -> None:
        optimizer.zero_grad()
        _loss(wrapped, inputs).backward()
        optimizer.step()

    return Step(step, lambda: parameters_to_vector(module.parameters()).detach())


def _opacus_ghost(module: nn.Module, model: PrivateModel, comm: Communicator) -> Step:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import (
        DistributedDPOptimizerFastGradientClipping,
        DPOptimizerFastGradientClipping,
    )
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(module, max_grad_norm=model.clip_norm)
    cls = DistributedDPOptimizerFastGradientClipping if comm.n > 1 else None
    cls = cls or DPOptimizerFastGradientClipping
    optimizer = cls(torch.optim.SGD(module.parameters(), lr=_LR), **_dp_options(model))
    criterion = DPLossFastGradientClipping(wrapped, optimizer, nn.CrossEntropyLoss())

    def step(inputs: Inputs) -> None:
        optimizer.zero_grad()
        scores, targets = wrapped(inputs[0]), inputs[1]
        if scores.dim() == 3:
            shape = scores.shape
            loss = criterion(scores.flatten(0, 1), targets.flatten(), shape=shape)
        else:
            loss = criterion(scores, targets)
        loss.backward()
        optimizer.step()

    return Step(step, lambda: parameters_to_vector(module.parameters()).detach())


def _dp_options(model: PrivateModel) -> dict[str, Any]:
    return {
        "noise_multiplier": model.noise_multiplier,
        "max_grad_norm": model.clip_norm,
        "expected_batch_size": model.batch_size,
    }


def _loss(module: nn.Module, inputs: Inputs) -> Tensor:
    """Return the mean over examples (of means over tokens)."""
    scores = module(inputs[0])
    return F.cross_entropy(scores.flatten(0, -2), inputs[1].flatten())


class _Positioned(Transformer):
    """With a position of its own for every example, as Opacus' layers need."""

    def forward(self, tokens_BT: Tensor) -> Tensor:
        places_BT = torch.arange(tokens_BT.shape[-1]).repeat(len(tokens_BT), 1)
        h_BTD = self.tokens(tokens_BT) + self.positions(places_BT)
        logits: Tensor = self.output(self.norm(self.blocks(h_BTD)))
        return logits


def _convolutions(width: int) -> nn.Module:
    def block(into: int, out: int) -> list[nn.Module]:
        convolution = nn.Conv2d(into, out, 3, padding=1)
        return [convolution, nn.GroupNorm(4, out), nn.ReLU(), nn.MaxPool2d(2)]

    layers = [*block(3, width // 2), *block(width // 2, width), *block(width, width)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * width, _CLASSES))
