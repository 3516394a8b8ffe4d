"""Training steps of LLaMA models as benchmarks compare them: models, methods, optimizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.algorithms.decentralized.all_reduce import AllReduce
from gossamer.algorithms.low_rank.product import Shape, choose_plan
from gossamer.algorithms.low_rank.schemes import LowRank, ReLoRA, SLTrain
from gossamer.algorithms.low_rank.sltrain import layers_of
from gossamer.algorithms.optimizers.base import Optimizer
from gossamer.algorithms.oracles.backprop import Backprop
from gossamer.algorithms.problems import Problem
from gossamer.algorithms.program import TrainingProgram
from gossamer.algorithms.registry import find
from gossamer.algorithms.tasks.arrays import TensorDataset
from gossamer.algorithms.tasks.hub import Logits
from gossamer.algorithms.tasks.language import count_next_tokens, next_token_loss
from gossamer.algorithms.tasks.llama import LLAMA, SLTRAIN, build_llama
from gossamer.launch.bench.low_rank import OfficialLinear
from gossamer.launch.bench.measure import DTYPES
from gossamer.runtime import Communicator, ConfigError, StackedTransport
from gossamer.runtime.component import validate
from gossamer.runtime.errors import nearest
from gossamer.topologies import build

__all__ = ["METHODS", "LlamaRequest", "make_steps"]

METHODS = ("full", "low-rank", "sltrain", "relora", "galore", "official")
"""``official``: SLTrain by the released code's operations."""
_LR = 1e-3


@dataclass(frozen=True)
class LlamaRequest:
    """Which steps.

    Attributes:
        models: names of LLaMA shapes.
        methods: of METHODS.
        optimizer: its name; the method ``galore`` has its own.
        per_layer: update each parameter as soon as its gradient is there.
        batch: sequences of a pass.
        context: tokens of a sequence.
        vocabulary: tokens there are.
        rank: of the methods that have one; 0: the paper's for the model.
        density: of SLTrain; None: the paper's.
        dtype: of parameters, gradients and moments.
        device: whose plans the layers follow: cpu or cuda.
    """

    models: Sequence[str]
    methods: Sequence[str]
    optimizer: str
    per_layer: bool
    batch: int
    context: int
    vocabulary: int
    rank: int
    density: float | None
    dtype: str
    device: str

    def __post_init__(self) -> None:
        for flag, given, known in (
            ("--model", self.models, LLAMA),
            ("--method", self.methods, METHODS),
            ("--dtype", [self.dtype], DTYPES),
            ("--device", [self.device], ("cpu", "cuda")),
        ):
            for name in given:
                if name not in known:
                    raise ConfigError(f"{flag}: unknown '{name}'{nearest(name, known)}")
        if self.density is not None and not 0 < self.density <= 1:
            raise ConfigError(f"--density: must be above 0 and at most 1, got {self.density:g}")
        self.rule("full")

    def of(self, model: str, method: str) -> LlamaRequest:
        """Return the request for one model and method, rank and density known."""
        rank, _, density = SLTRAIN[model]
        return replace(
            self,
            models=[model],
            methods=[method],
            rank=self.rank or rank,
            density=density if self.density is None else self.density,
        )

    def rule(self, method: str) -> Optimizer:
        """Return the optimizer of a method."""
        values: dict[str, Any] = {"name": self.optimizer, "lr": _LR}
        if method == "galore":
            values = {"name": "galore", "lr": _LR, "rank": self.rank, "refresh": 2}
        cls: Any = find("optimizer", values["name"])
        rule = validate(cls, values, "--optimizer")
        assert isinstance(rule, Optimizer)
        return rule

    def module(self, device: str) -> nn.Module:
        """Return the model of the one method."""
        (name,), (method,) = self.models, self.methods
        model = build_llama(
            LLAMA[name],
            vocabulary=self.vocabulary,
            context=self.context,
            dtype=DTYPES[self.dtype],
            seed=0,
            device=device,
        )
        alpha = SLTRAIN[name].alpha
        if method == "low-rank":
            model = LowRank(rank=self.rank).apply(model, 0)
        elif method == "relora":
            model = ReLoRA(rank=self.rank, alpha=alpha, every=1000).apply(model, 0)
        elif method in ("sltrain", "official"):
            assert self.density is not None
            model = SLTrain(rank=self.rank, alpha=alpha, density=self.density).apply(model, 0)
        tokens = self.batch * self.context
        for _, layer in layers_of(model):
            nnz = 0 if layer.v is None else len(layer.v)
            shape = Shape(tokens, layer.out_features, layer.in_features, layer.rank, nnz)
            layer.plan = choose_plan(shape, torch.device(self.device), backward=True)
        if method == "official":
            for layer_name, layer in list(layers_of(model)):
                model.set_submodule(layer_name, OfficialLinear(layer))
        return Logits(model)

    def tokens(self, count: int, device: str = "cpu") -> Tensor:
        """Return ``count`` sequences, and the token after each."""
        if device == "meta":
            return torch.empty(count, self.context + 1, dtype=torch.int64, device="meta")
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.vocabulary, (count, self.context + 1), generator=generator)


def make_steps(request: LlamaRequest, count: int) -> Callable[[], None]:
    """Return what makes ``count`` steps, each on the same batch."""
    comm = Communicator(build("ring", 1), StackedTransport(), steps=count)
    problem = Problem(
        module=request.module("cpu"),
        train=TensorDataset((request.tokens(request.batch),)),
        shards=(np.arange(request.batch),),
        loss=next_token_loss,
        weigh=count_next_tokens,
    )
    rule = request.rule(request.methods[0])
    algorithm = AllReduce(optimizer=rule, per_layer=request.per_layer)
    oracle = Backprop(batch_size=request.batch, sampling="full")
    program = TrainingProgram(comm, problem, oracle, algorithm).start()

    def run() -> None:
        for k in range(count):
            comm.step = k
            program.step()

    return run
