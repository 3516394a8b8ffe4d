"""Replaying a run from its records: the model again, to the bit, without an example or a loss.

Directions are made again from their counters and added as the run added them, with the same
optimizer, so that base model and records (16 bytes a number) are a checkpoint of any step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gossamer.algorithms.zeroth_order.probes import Along, Probes
from gossamer.launch.config import Experiment, resolve
from gossamer.launch.record_log import NAME, pack, sealed, unpack, unsealed
from gossamer.launch.recorder import write_whole
from gossamer.runtime import Communicator, ConfigError, RowLayout, StackedTransport
from gossamer.runtime.perturb import Mask

__all__ = ["Exported", "export", "read_exported", "replay"]


_FIELDS = ("steps", "dtype", "device", "optimizer", "base_sha256", "configuration", "tensors")
_RECIPE = ("seed", "distribution", "sparsity", "mask_interval")


@dataclass(frozen=True)
class Exported:
    """What an exported file says, checked.

    Attributes:
        header: as ``records.zo`` has it.
        records: (m,) of ``RECORD``.
        steps: of the run.
        parameters_sha256: what they came to.
    """

    header: dict[str, Any]
    records: NDArray[np.void]
    steps: int
    parameters_sha256: str

    def sets(self) -> Iterator[tuple[int, NDArray[np.void]]]:
        """Yield each step that was applied, and its records."""
        bounds = np.flatnonzero(np.diff(self.records["step"])) + 1
        for records in np.split(self.records, bounds) if len(self.records) else []:
            yield int(records["step"][0]), records


def export(run: Path, out: Path) -> Exported:
    """Write header, records and the run's parameters' hash into one file.

    Raises:
        ConfigError: the run has no records, or has not ended.
    """
    log, summary = run / NAME, run / "summary.json"
    if not log.is_file():
        raise ConfigError(
            f"{run}: has no {NAME}; runs of oracle zeroth-order with algorithm all-reduce or flood "
            "write one"
        )
    if not summary.is_file():
        raise ConfigError(f"{run}: has not ended; go on with --resume {run}")
    header, records = unpack(log.read_bytes(), log)
    found = json.loads(summary.read_text())
    outcome = {"steps": found["steps"], "parameters_sha256": found["parameters_sha256"]}
    exported = _checked({**header, "outcome": outcome}, records, log)
    with _output(out):
        out.write_bytes(sealed(pack(exported.header, records)))
    return exported


def read_exported(path: Path) -> Exported:
    """Read an exported file and check it: bytes, order, completeness of sets, finite numbers.

    Raises:
        ConfigError: names what is wrong.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    header, records = unpack(unsealed(content, path), path)
    return _checked(header, records, path)


def _checked(header: dict[str, Any], records: NDArray[np.void], path: Path) -> Exported:
    try:
        recipe, outcome = header["recipe"], header["outcome"]
        own = recipe["directions"] == "own"
        per_set = recipe["queries"] * (header["ranks"] if own else 1)
        last = outcome["steps"] - header["delay"]
        exported = Exported(header, records, outcome["steps"], outcome["parameters_sha256"])
        for fields, names in ((header, _FIELDS), (recipe, _RECIPE)):
            for name in names:
                fields[name]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path}: its header lacks {error}; export it again") from error
    before = -1
    for step, found in exported.sets():
        if step <= before or step >= last:
            where = f"after step {before}" if step <= before else f"in a run of {last} sets"
            raise ConfigError(f"{path}: records of step {step} stand {where}; export it again")
        if not np.array_equal(found["probe"], np.arange(per_set)):
            raise ConfigError(
                f"{path}: step {step} has probes {_listed(found['probe'])} in place of "
                f"0..{per_set - 1}; export it again"
            )
        if not np.isfinite(found["coefficient"]).all():
            raise ConfigError(f"{path}: step {step} has a coefficient that is not finite")
        before = step
    return exported


def _listed(probes: NDArray[np.uint32]) -> str:
    return ", ".join(map(str, probes[:8])) + (", .." if len(probes) > 8 else "")


def replay(exported: Exported, out: Path | None = None) -> str:
    """Make the run's parameters again and return their hash, as ``summary.json`` has it.

    Args:
        exported: what to replay.
        out: folder for ``model.safetensors`` and the run's ``config.yaml``; None: for neither.

    Raises:
        ConfigError: the model that the configuration builds is not the one that the run began with,
            or the device is missing here.
    """
    header = exported.header
    config = resolve(header["configuration"])
    torch.set_num_threads(config.threads)
    experiment = Experiment(config, header["ranks"])
    comm = Communicator(
        experiment.topology,
        _Alone(header["ranks"], _device(header["device"])),
        seed=config.seed,
        steps=header["steps"],
        check_rounds=False,
    )
    module = experiment.task.build(comm.n, config.seed).module.to(comm.device)
    layout = RowLayout(module)
    x = comm.alloc(layout.d, layout.dtype)
    layout.gather(module, x[0])
    tensors = [[s.name, list(s.shape)] for s in layout.slices]
    if tensors != header["tensors"] or layout.digest(x[0]).hex() != header["base_sha256"]:
        raise ConfigError(
            "task: builds another model here than the run began with; the same data, seed and "
            "versions (see the run's summary.json) give the same"
        )
    _apply(exported, experiment, comm, layout, x)
    if out is not None:
        views = zip(layout.slices, layout.views(x[0]), strict=True)
        with _output(out):
            out.mkdir(parents=True, exist_ok=True)
            save_file({s.name: v.cpu().contiguous() for s, v in views}, out / "model.safetensors")
            written = yaml.safe_dump(header["configuration"], sort_keys=False)
            write_whole(out / "config.yaml", written)
    return hashlib.sha256(layout.digest(x[0]) * comm.n).hexdigest()


def _apply(
    exported: Exported, experiment: Experiment, comm: Communicator, layout: RowLayout, x: Tensor
) -> None:
    """Make the run's updates of one row."""
    header, optimizer = exported.header, experiment.optimizer
    assert optimizer is not None
    recipe = header["recipe"]
    mask = Mask(recipe["sparsity"], recipe["mask_interval"]) if recipe["sparsity"] else None
    optimizer.know(layout, alike=True)
    state = optimizer.init(x)
    for step, records in exported.sets():
        comm.step = step + header["delay"]
        along = [[Along(step, k) for k in records["probe"].tolist()]] * comm.n
        coefficients = torch.tensor(records["coefficient"][None])
        mean = Probes(
            comm, layout, recipe["seed"], along, coefficients, recipe["distribution"], mask
        )
        optimizer.apply_(state, x, mean, comm)


class _Alone(StackedTransport):
    """Hosts rank 0 of n; the others are not there, and nothing is exchanged."""

    def __init__(self, n: int, device: torch.device) -> None:
        super().__init__(device)
        self.processes = n


@contextmanager
def _output(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: cannot be written ({error}); name another") from error


def _device(kind: str) -> torch.device:
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device: the run was on a GPU, whose normal numbers differ from a CPU's in their last "
            "bits; replay it on a machine with one"
        )
    return torch.device(kind)
