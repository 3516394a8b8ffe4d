"""How far a contrastive method's mean gradient is from that of the loss it stands for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gossamer.algorithms.contrastive.contrastive import Contrastive
from gossamer.algorithms.program import TrainingProgram
from gossamer.algorithms.sampling import Sampler
from gossamer.runtime import Communicator, StackedTransport

__all__ = ["exact_gradient", "gradient_bias", "gradients"]


def gradient_bias(
    program: TrainingProgram,
    loss: Mapping[str, Any],
    batch_size: int,
    epochs: int,
    warmup_epochs: int = 20,
) -> dict[str, float]:
    """Return figures of the mean of a method's gradients at the parameters of a trained program.

    They stay as they are; what the method remembers of examples moves on from batch to batch.

    - ``bias``: |mean g - grad L| / |grad L|; Monte Carlo's error is in it.
    - ``bias_cosine``: between the two.

    Args:
        program: of one rank, after its last step; before the first one nothing is computed.
        loss: the method's section, with its ``beta``.
        batch_size: examples of a gradient.
        epochs: over which gradients are averaged.
        warmup_epochs: before these.
    """
    if program.comm.step == 0:
        return {}
    examples = sum(map(len, program.problem.shards))
    first, last = (e * examples // batch_size for e in (warmup_epochs, warmup_epochs + epochs))
    total = torch.zeros_like(program.state.x, dtype=torch.float64)
    options = {"loss": loss, "batch_size": batch_size}
    for step, gradient in enumerate(gradients(program, options, last)):
        if step >= first:
            total += gradient
    mean, exact = total / (last - first), exact_gradient(program, loss["beta"])
    return {
        "bias": float((mean - exact).norm() / exact.norm()),
        "bias_cosine": float(torch.cosine_similarity(mean, exact)),
    }


def exact_gradient(program: TrainingProgram, beta: float) -> Tensor:
    """Return grad L (1, d) at the program's parameters, float64."""
    options = {"loss": {"name": "full", "beta": beta}, "sampling": "full"}
    [gradient] = gradients(program, options, 1)
    return gradient.double()


def gradients(program: TrainingProgram, oracle: Mapping[str, Any], steps: int) -> Iterator[Tensor]:
    """Yield an oracle's gradients (1, d) on the batches of ``steps`` steps; the row is reused."""
    comm = Communicator(program.comm.topology, StackedTransport(), seed=program.comm.seed.value)
    estimates = Contrastive.model_validate(oracle)
    plan = estimates.setup(comm, program.problem)
    sampler = Sampler(program.problem, plan, comm.ranks, comm.seed.value)
    for step in range(steps):
        [batch] = sampler.batches(step, 1)
        row = estimates(program.state.x, batch).grad
        assert isinstance(row, Tensor)
        yield row
        comm.step += 1
    comm.close()
