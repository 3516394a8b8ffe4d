"""``bench contrastive``: a training step of EMC^2 beside SimCLR's, a scan in Python, and LibAUC's.

Same encoder, images, augmentations and SGD for all, one rank on one thread. The ways run in turn in
one process, a few steps each, each time in another order; so do the parts that a step is made of,
alone. Ratios are of the time on the CPU, which other programs enter less than the clock's.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.launch.bench.children import started
from gossamer.launch.bench.contrastive_ways import (
    PARTS,
    WAYS,
    ContrastiveModel,
    PlainStep,
    encoder_flops,
    libauc_losses,
    make_case,
    make_program,
    plain_loss,
)
from gossamer.launch.bench.measure import Row, spread
from gossamer.launch.bench.private import Aim
from gossamer.runtime import ConfigError, native
from gossamer.runtime.errors import nearest

__all__ = ["ContrastiveRequest", "aims", "contrastive", "parse_models"]

_DATA = ("digits", "mnist")
_ENCODERS = ("mlp", "resnet18")
_STEPS = 4
"""Steps of a turn, a sample their mean: as in a run, a step finds in the caches what the last one
of its own way left there."""
_FREED_BYTES = 1 << 24


@dataclass(frozen=True)
class ContrastiveRequest:
    """What to measure.

    Attributes:
        models: what to train.
        iters: samples per figure.
        warmup: samples thrown away before them.
    """

    models: Sequence[ContrastiveModel]
    iters: int
    warmup: int


def parse_models(
    data: str, encoder: str, dims: Sequence[int], batch: int
) -> list[ContrastiveModel]:
    """Return a model for every dimension.

    Raises:
        ConfigError: a name is unknown.
    """
    for flag, name, known in (("--data", data, _DATA), ("--encoder", encoder, _ENCODERS)):
        if name not in known:
            raise ConfigError(f"{flag}: unknown '{name}'{nearest(name, known)}; use {known}")
    return [ContrastiveModel(data, encoder, dim, batch) for dim in dims]


def contrastive(request: ContrastiveRequest, progress: Callable[[str], object]) -> list[Row]:
    """Measure; a row of figures for every model and way or part.

    The figures of LibAUC's way are None where it is not installed, and ``absent`` says why.

    Raises:
        ConfigError: the process failed, or two ways of one loss have other gradients.
    """
    rows: list[Row] = []
    for model in request.models:
        progress(f"{model.encoder} on {model.data}, dim {model.dim}")
        found = started("contrastive", 1, _time_child, model, request.iters, request.warmup)
        rows += [_row(model, name, found) for name in (*WAYS, *PARTS)]
    return rows


def _row(model: ContrastiveModel, name: str, found: Mapping[str, Any]) -> Row:
    row: Row = {"dim": model.dim, "way": name, "absent": found["absent"].get(name)}
    keys = ("ms", "ms_p10", "ms_p90", "cpu_ms", "simclr_ratio", "bare_ratio", "emc2_share")
    row |= dict.fromkeys((*keys, "gflops"))
    if row["absent"] is None:
        times = spread(found["seconds"][name])
        row |= {"ms": 1e3 * times.median, "ms_p10": 1e3 * times.p10, "ms_p90": 1e3 * times.p90}
        cpu = {n: spread(samples).median for n, samples in found["cpu_seconds"].items()}
        row["cpu_ms"] = 1e3 * cpu[name]
        if name in PARTS:
            row["emc2_share"] = cpu[name] / cpu["emc2"]
        else:
            row["simclr_ratio"] = cpu[name] / cpu["simclr torch"]
            made = cpu["views"]
            row["bare_ratio"] = (cpu[name] - made) / (cpu["simclr torch"] - made)
        if name == "encoder":
            row["gflops"] = 1e-9 * found["encoder_flops"] / cpu[name]
    return row | {"settings": asdict(model)}


def aims(rows: Sequence[Row]) -> list[Aim]:
    """Return what the rows are held to: EMC^2's step over those of SimCLR."""
    held = []
    for dim in dict.fromkeys(row["dim"] for row in rows):
        own = {row["way"]: row for row in rows if row["dim"] == dim}
        emc2, made = own["emc2"]["cpu_ms"], own["views"]["cpu_ms"]
        for other, whose in (("simclr torch", "plain SimCLR's"), ("simclr", "our SimCLR's")):
            theirs = own[other]["cpu_ms"]
            held.append(Aim(f"dim {dim}: EMC^2's step over {whose}", emc2 / theirs, 1.25))
            bare = (emc2 - made) / (theirs - made)
            held.append(Aim(f"dim {dim}: EMC^2's step over {whose}, less views", bare, 1.25))
    return held


# --- in the process -----------------------------------------------------------------------------


def _time_child(model: ContrastiveModel, iters: int, warmup: int, result: str) -> int:
    torch.set_num_threads(1)
    native.use_threads(1)
    problem, absent = model.problem(), _absent()
    check(model, absent)
    names = [name for name in (*WAYS, *PARTS) if name not in absent]
    cases = {name: make_case(name, problem, model) for name in names}
    # From the first large block that is freed, in a run an evaluation's, malloc keeps what steps
    # free, instead of giving it back to the system and having it cleared again.
    torch.empty(_FREED_BYTES, dtype=torch.uint8)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    busy_s: dict[str, list[float]] = {name: [] for name in names}
    for k in range(-warmup, iters):
        batches = [model.batch_of(problem, (k + warmup) * _STEPS + s) for s in range(_STEPS)]
        for c in range(len(names)):
            name = names[(c + k) % len(names)]
            begin, busy = time.perf_counter(), time.process_time()
            for batch in batches:
                cases[name](batch)
            if k >= 0:
                seconds[name].append((time.perf_counter() - begin) / _STEPS)
                busy_s[name].append((time.process_time() - busy) / _STEPS)
    document = {
        "seconds": seconds,
        "cpu_seconds": busy_s,
        "encoder_flops": encoder_flops(problem, model),
        "absent": absent,
    }
    Path(result).write_text(json.dumps(document))
    return 0


def _absent() -> dict[str, str]:
    """Return the ways that cannot be measured, and why."""
    try:
        libauc_losses()
    except ImportError as error:
        return {"sogclr libauc": f"{error}; pip install --no-deps libauc==2.0.1, and pandas, tqdm"}
    return {}


def check(model: ContrastiveModel, absent: Mapping[str, str]) -> None:
    """Compare two steps' gradients of ours with those of others, at the same parameters.

    Raises:
        ConfigError: they differ by more than rounding.
    """
    for other, ours in (
        ("simclr torch", {"name": "simclr"}),
        ("emc2 scan", {"name": "emc2", "held": "drop"}),
        ("sogclr libauc", {"name": "sogclr"}),
    ):
        if other in absent:
            continue
        problem = model.problem()
        plain = replace(problem, module=copy.deepcopy(problem.module))
        program = make_program(problem, model, ours)
        theirs = PlainStep(plain, plain_loss(other, plain))
        for _ in range(2):
            batch = model.batch_of(problem, 0)  # the second visit finds states
            found = program.oracle(program.state.x, [batch]).grad
            program.comm.step += 1
            assert isinstance(found, Tensor)
            plain.module.zero_grad()
            theirs.differentiate(batch)
            grads = [p.grad for p in plain.module.parameters() if p.grad is not None]
            of_ours = torch.cat([g.flatten() for g in program.layout.views(found[0])]).double()
            of_theirs = torch.cat([g.flatten() for g in grads]).double()
            away = float((of_ours - of_theirs).norm() / of_theirs.norm())
            if not away < 1e-4:
                raise ConfigError(
                    f"bench contrastive: the gradients of {ours['name']} and of {other} are "
                    f"{away:.1e} apart; the times would be of different things"
                )
