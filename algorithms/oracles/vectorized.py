"""Gradients of all hosted ranks in one pass: torch.func over stacked rows, equal to rounding."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gossamer.algorithms.problems import Problem, RankBatches
from gossamer.runtime import ConfigError, RowLayout

__all__ = ["Stateless", "vectorized_gradients"]


class Stateless(nn.Module):
    """Calls a module with given parameters; passes for the module in a task's loss."""

    def __init__(self, module: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.__dict__["_target"] = module
        self.__dict__["_given"] = dict(parameters)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Call the module with the given parameters."""
        result: Tensor = torch.func.functional_call(
            self.__dict__["_target"], self.__dict__["_given"], inputs, tie_weights=True
        )
        return result

    def named_parameters(  # type: ignore[override]  # the given tensors are not nn.Parameter
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> object:
        """Yield the given parameters with their names."""
        return iter(self.__dict__["_given"].items())

    def parameters(self, recurse: bool = True) -> object:  # type: ignore[override]  # as above
        """Yield the given parameters."""
        return iter(self.__dict__["_given"].values())


def vectorized_gradients(
    problem: Problem, layout: RowLayout, x: Tensor, batch: RankBatches, grad: Tensor
) -> Tensor:
    """Write the gradients at x (local, d) into ``grad``; return the losses (local,) float64.

    Raises:
        ConfigError: the ranks' batches differ in shape.
    """
    shapes = {tuple(t.shape for t in b.inputs) for b in batch}
    if len(shapes) > 1:
        raise ConfigError(
            "oracle.vectorize: the ranks' batches differ in shape (unequal shards?); "
            "use sampling: replacement, or vectorize: false"
        )
    local = x.shape[0]
    stacked = {s.name: x[:, s.begin : s.end].view(local, *s.shape) for s in layout.slices}
    inputs = tuple(torch.stack(parts) for parts in zip(*(b.inputs for b in batch), strict=True))

    def loss(parameters: dict[str, Tensor], *examples: Tensor) -> Tensor:
        return problem.loss(Stateless(problem.module, parameters), examples)

    each = torch.func.vmap(torch.func.grad_and_value(loss), randomness="different")
    grads, losses = each(stacked, *inputs)
    for s in layout.slices:
        grad[:, s.begin : s.end].view(local, *s.shape).copy_(grads[s.name])
    result: Tensor = losses.detach().double().cpu()
    return result
