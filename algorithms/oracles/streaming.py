"""Gradients handed on one parameter after the other, while backward goes on, and freed after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gossamer.runtime import ConfigError, RowLayout

__all__ = ["completion_order", "streamed"]

Take = Callable[[slice, Tensor], object]


def completion_order(
    layout: RowLayout, module: nn.Module, backward: Callable[[], object]
) -> list[int]:
    """Return the places in ``layout.slices`` in the order in which backward completes gradients.

    Those that get none come last. No gradient is kept.

    Args:
        layout: of the module.
        module: whose parameters have no gradient; has none afterwards.
        backward: one forward and backward pass.
    """
    parameters, found = layout.parameters(module), []

    def note(k: int) -> None:
        parameters[k].grad = None
        found.append(k)

    with _completed(parameters, note):
        backward()
    seen = dict.fromkeys(found)
    return [*seen, *(k for k in range(len(parameters)) if k not in seen)]


@contextmanager
def streamed(
    layout: RowLayout, module: nn.Module, order: Sequence[int], take: Take
) -> Iterator[None]:
    """Hand each gradient of the backward pass inside to ``take``, with its columns of the row.

    ``take`` gets (1, size), and keeps it as it is: another gradient, or what backward still reads,
    may share its memory (of ``a.view(-1) + b.view(-1)``, say). It comes in ``order`` whatever this
    pass's graph is: a gradient that comes too early waits for its turn. What ``grad`` of a
    parameter has before is added in, and must have memory of its own. Parameters without any give
    zeros, when the pass is over.

    ``take`` may write the parameter in the row while backward goes on. Its gradient is complete
    when every node that differentiates through it has run, so nothing that is still to run reads
    it, unless it was taken past autograd (``detach``) into another's gradient: the parameter's
    version moves, and torch then raises where the old value is asked for.

    Raises:
        ConfigError: a gradient was completed twice in the pass.
    """
    parameters = layout.parameters(module)
    ready: set[int] = set()
    coming = list(reversed(order))

    def hand_on(k: int) -> None:
        s, parameter = layout.slices[k], parameters[k]
        grad, parameter.grad = parameter.grad, None
        take(slice(s.begin, s.end), _as_row(grad, parameter))
        torch.autograd.graph.increment_version(parameter)

    def complete(k: int) -> None:
        if k in ready:
            raise ConfigError(
                f"algorithm.per_layer: the gradient of '{layout.slices[k].name}' is completed "
                "twice in one backward pass (reentrant checkpointing of a shared parameter?); "
                "checkpoint with use_reentrant=False, or use per_layer: false"
            )
        ready.add(k)
        while coming and coming[-1] in ready:
            hand_on(coming.pop())

    with _completed(parameters, complete):
        yield
    while coming:
        hand_on(coming.pop())


@contextmanager
def _completed(parameters: Sequence[nn.Parameter], then: Callable[[int], None]) -> Iterator[None]:
    """Call ``then(k)`` in a backward pass as soon as parameter k has its gradient.

    On the caller's thread, a GPU's backward too: ``then`` may use the communicator, whose calls
    belong to one thread. What it raises comes out of ``backward`` as it is.
    """
    hooks = [
        p.register_post_accumulate_grad_hook(lambda _, k=k: then(k))
        for k, p in enumerate(parameters)
    ]
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _as_row(grad: Tensor | None, parameter: nn.Parameter) -> Tensor:
    if grad is None:
        return torch.zeros(1, parameter.numel(), dtype=parameter.dtype, device=parameter.device)
    dense = grad.to_dense() if grad.is_sparse else grad
    # -0.0 becomes 0.0, as where gradients are added to a row of zeros: the same bits. In place:
    # where gradients share memory, a second time changes nothing.
    return dense.reshape(1, -1).add_(0.0)
