"""What ``gossamer.attach`` refuses of a model and its optimizer, before anything is sent."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from gossamer.launch.attach_opacus import is_from_opacus
from gossamer.runtime import ConfigError

__all__ = ["Buffers", "check_optimizer", "check_parameters", "float_buffers"]

Buffers = Literal["keep", "average", "refuse"]


def check_optimizer(optimizer: torch.optim.Optimizer, private: bool, model: nn.Module) -> None:
    """Refuse an optimizer that cannot be the local update."""
    if hasattr(optimizer, "gossamer"):
        raise ConfigError("attach: this optimizer is attached already; make a new one")
    for thing in () if private else (optimizer, model):
        if is_from_opacus(thing):
            raise ConfigError(
                f"attach: {type(thing).__name__} is for private training, of which nothing was "
                "said; give attach privacy={'examples': N, 'sample_rate': q, 'sampler': 'poisson'}"
            )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError(
            "attach: LBFGS evaluates the loss many times a step; choose an optimizer of one "
            "gradient a step, such as SGD or AdamW"
        )


def check_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer of other parameters than the model's."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for key, name in names.items() if key not in held]
    if missing:
        raise ConfigError(
            f"attach: the optimizer does not hold trainable parameters {missing[:3]}; give it "
            "model.parameters(), or freeze them (requires_grad_(False))"
        )
    foreign = [p for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
    if any(id(p) not in names for p in foreign):
        raise ConfigError("attach: the optimizer holds trainable parameters of another model")


def float_buffers(model: nn.Module, buffers: Buffers) -> list[Tensor]:
    """Return the buffers to average; refuse them where that was asked for."""
    found = dict(model.named_buffers())
    if buffers == "refuse" and found:
        raise ConfigError(
            f"attach: the model has buffers ({next(iter(found))}, ...); use buffers='keep' or "
            "'average', or normalisation without statistics (GroupNorm)"
        )
    if buffers not in ("keep", "average", "refuse"):
        raise ConfigError(f"attach: buffers must be keep, average or refuse, got {buffers!r}")
    if buffers != "average":
        return []
    return [b for b in found.values() if b.is_floating_point()]
