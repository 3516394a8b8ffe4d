"""A run's mean model as a plain checkpoint, which other programs load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gossamer.algorithms.low_rank.sltrain import to_dense
from gossamer.launch.config import Experiment, resolve
from gossamer.runtime.checkpoint import Checkpoint
from gossamer.runtime.errors import ConfigError

__all__ = ["export_model"]

_BUFFERS = "oracle/buffers."


@torch.no_grad()
def export_model(run: Path, out: Path) -> str:
    """Write the mean over ranks of a run's model, with plain layers alone.

    Weights scale B A + S become dense. A model of ``transformers`` is written as its
    ``save_pretrained`` does, any other as ``model.safetensors``. Low-rank adapters of peft, and
    what the schemes prefix and prompt add, stay as they are in the names of the parameters.

    Args:
        run: its folder, or one of its checkpoints.
        out: folder to write, new or empty.

    Returns:
        What was written, in words.

    Raises:
        ConfigError: no checkpoint, another model than its configuration describes, or ``out`` has
            files.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: is there already; name a new folder")
    checkpoint = Checkpoint.open(run)
    n = checkpoint.meta["n"]
    experiment = Experiment(resolve(checkpoint.meta["configuration"]), n)
    module = experiment.task.build(n, experiment.config.seed).module
    _fill(module, checkpoint)
    to_dense(module)
    model: Any = getattr(module, "model", None)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(out)
    else:
        model = module
        out.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
        save_file(_once(state), out / "model.safetensors")
    size = sum(p.numel() for p in model.parameters())
    return f"{type(model).__name__} of {size:,} parameters, step {checkpoint.meta['step']}"


def _fill(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Give the module the ranks' mean parameters, and their mean buffers."""
    parameters, mean = dict(module.named_parameters()), checkpoint.mean()
    for name, value in mean.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise ConfigError(
                f"{checkpoint.folder}: holds '{name}' {tuple(value.shape)}, which the model of its "
                "configuration has not; were data or models changed since?"
            )
        parameters[name].copy_(value)
    rows = checkpoint.rows(range(checkpoint.meta["n"]))
    for name, buffer in module.named_buffers():
        kept = rows.get(_BUFFERS + name)
        if kept is not None:
            buffer.copy_(kept.double().mean(0) if kept.is_floating_point() else kept[0])


def _once(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return each memory once: a file cannot hold tied tensors twice."""
    seen: set[int] = set()
    kept = {}
    for name, tensor in state.items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            kept[name] = tensor
            seen.add(tensor.data_ptr())
    return kept
