"""What ``gossamer.attach`` puts in an algorithm's oracle and optimizer: the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from gossamer.algorithms.estimates import PLAIN, Estimate, Origin, Sink
from gossamer.algorithms.optimizers.sgd import SGD
from gossamer.algorithms.problems import DataPlan, Problem, RankBatches
from gossamer.algorithms.protocols import Algorithm, Optimizer, Oracle
from gossamer.algorithms.registry import find
from gossamer.runtime import Communicator, ConfigError, RowLayout
from gossamer.runtime.component import validate

__all__ = ["GivenGradient", "Part", "TorchOptimizer", "TorchSGD", "find_algorithm"]


class Part(Protocol):
    """The parameters of one dtype under an algorithm."""

    state: Any
    grad: Tensor

    @property
    def layout(self) -> RowLayout:
        """How the parameters lie in the row."""
        ...


class GivenGradient(Oracle):
    """The gradient that the user's own ``backward`` computed; at the current point only."""

    name: str = "backward"
    _part: Part = PrivateAttr()

    def give(self, part: Part) -> None:
        """Say whose gradient it is."""
        self._part = part

    def setup(self, comm: Communicator, problem: Problem) -> DataPlan:
        """Never called: there is no task."""
        raise AssertionError("a loop of one's own draws its own batches")

    @property
    def layout(self) -> RowLayout:
        """How the parameters lie in the row."""
        return self._part.layout

    def __call__(
        self,
        x: Tensor,
        batch: RankBatches,
        *,
        combine: Sequence[tuple[float, Tensor]] | None = None,
        sink: Sink | None = None,
    ) -> Estimate:
        """Return the gradient row as ``backward`` left it."""
        if combine is not None or x.data_ptr() != self._part.state.x.data_ptr():
            raise ConfigError(
                "attach: this algorithm needs gradients at other points than the model's own; "
                "run it from YAML, or choose dsgd, gradient-tracking or d-nasa (grad_point: old)"
            )
        unknown = torch.full((1,), float("nan"), dtype=torch.float64)
        return Estimate(loss=unknown, grad=self._part.grad, weight=torch.ones_like(unknown))

    def loss(self, x: Tensor, batch: RankBatches) -> Tensor:
        """Never called: the loop keeps its loss."""
        raise AssertionError("the loss stays in the user's loop")


class TorchOptimizer(Optimizer):
    """A torch optimizer as the local update of one row."""

    lr: float = 1.0
    _torch: Any = PrivateAttr()
    _step: Any = PrivateAttr()
    _parameters: Any = PrivateAttr()
    _layout: Any = PrivateAttr()

    def wrap(
        self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], layout: RowLayout
    ) -> None:
        """Say which optimizer, and which of its parameters lie in the row."""
        self._torch, self._step = optimizer, optimizer.step
        self._parameters, self._layout = parameters, layout

    def init(self, x: Tensor) -> None:
        """Keep no state: the torch optimizer has its own."""

    def rate(self, comm: Communicator) -> float:
        """Return 1: the optimizer's own rates, of any group, are in the direction already."""
        return 1.0

    def rule(
        self, state: None, x: Tensor, grad: Tensor, comm: Communicator, origin: Origin
    ) -> Tensor:
        """Return x - x after the optimizer's step, on a copy: x may be on its way to others."""
        moved = x.clone()
        try:
            self._move(moved, grad)
        finally:
            for p, value in zip(self._parameters, self._layout.views(x[0]), strict=True):
                p.data = value
        return torch.sub(x, moved, out=moved)

    def update_(
        self, state: None, x: Tensor, grad: Tensor, comm: Communicator, origin: Origin = PLAIN
    ) -> Tensor:
        """Let the torch optimizer step in place with ``grad`` as the gradient."""
        self._move(x, grad)
        return x

    def _move(self, x: Tensor, grad: Tensor) -> None:
        mine = {id(p) for p in self._parameters}
        others = [p for group in self._torch.param_groups for p in group["params"]]
        aside = [(p, p.grad) for p in others if id(p) not in mine]
        for p, _ in aside:
            p.grad = None  # rows of other dtypes step by themselves; None is skipped
        views = zip(
            self._parameters, self._layout.views(x[0]), self._layout.views(grad[0]), strict=True
        )
        for p, value, g in views:
            p.data, p.grad = value, g
        self._step()
        for p, g in aside:
            p.grad = g


class TorchSGD(SGD):
    """A plain torch SGD, for the rules that make the local update themselves."""

    _torch: Any = PrivateAttr()

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> TorchSGD | None:
        """Return the adapter; None where the optimizer is not SGD alone, alike in all groups."""
        group = optimizer.param_groups[0]
        alone = type(optimizer) is torch.optim.SGD and all(
            g["momentum"] == 0 and not g["maximize"] and g["weight_decay"] == group["weight_decay"]
            for g in optimizer.param_groups
        )
        if not alone:
            return None
        adapter = cls(lr=1.0, weight_decay=float(group["weight_decay"]))
        adapter._torch = optimizer
        return adapter

    def rate(self, comm: Communicator) -> float:
        """Return the learning rate, as a scheduler left it.

        Raises:
            ConfigError: the groups' rates have come apart.
        """
        rates = {float(group["lr"]) for group in self._torch.param_groups}
        if len(rates) > 1:
            raise ConfigError(
                f"attach: this algorithm has one learning rate, the groups have {sorted(rates)}; "
                "use one, or choose dsgd or gradient-tracking"
            )
        return rates.pop()


def find_algorithm(
    section: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    layout: RowLayout,
) -> Algorithm:
    """Return the algorithm that a section names, with the user's optimizer as its local update.

    Raises:
        ConfigError: it needs an optimizer of its own, or several batches a step.
    """
    cls = find("algorithm", str(section["name"]))
    assert issubclass(cls, Algorithm), cls
    local = TorchOptimizer()
    local.wrap(optimizer, layout.parameters(model), layout)
    values = {k: v for k, v in section.items() if k != "name"}
    try:
        rule = validate(cls, {**values, "optimizer": local}, "attach: algorithm")
    except ConfigError as error:
        if "optimizer" not in str(error):
            raise
        plain = TorchSGD.of(optimizer)
        if plain is None:
            raise ConfigError(
                f"attach: {section['name']} makes the local update itself and takes "
                f"torch.optim.SGD without momentum only, not {type(optimizer).__name__}; or "
                "choose dsgd or gradient-tracking, which take any"
            ) from None
        rule = validate(cls, {**values, "optimizer": plain}, "attach: algorithm")
    if rule.batches_per_step != 1:
        raise ConfigError(
            f"attach: {section['name']} takes {rule.batches_per_step} batches a step; "
            "use dsgd with every=K for local steps"
        )
    return rule
