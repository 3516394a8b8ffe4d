"""``bench ddp``: a training step under DistributedDataParallel, backend gossamer beside gloo.

Both groups live in the same processes. A step is the forward and backward pass of the text task's
transformer, and AdamW. The ways run in turn, each time in another order, from a barrier on; the
slowest rank's time counts. Beside them: the step of each rank alone, without communication, and
the all-reduces alone, of buckets of the same sizes.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gossamer.algorithms.tasks.language import next_token_loss
from gossamer.algorithms.tasks.transformer import Transformer
from gossamer.launch.bench.measure import Row, spread
from gossamer.launch.processes import run_processes
from gossamer.runtime.errors import ConfigError

__all__ = ["DDPRequest", "ddp"]

_TIMEOUT = timedelta(seconds=120)
_VOCABULARY, _CONTEXT, _LAYERS, _HEADS = 256, 128, 2, 4  # the text task's own


@dataclass(frozen=True)
class DDPRequest:
    """What to measure.

    Attributes:
        ranks: numbers of processes to start.
        widths: of the transformer; each its own model.
        batch: windows per rank and step.
        iters: samples per figure.
        warmup: samples thrown away before them.
    """

    ranks: Sequence[int]
    widths: Sequence[int]
    batch: int
    iters: int
    warmup: int


def ddp(request: DDPRequest, progress: Callable[[str], object]) -> list[Row]:
    """Measure; a row of figures for every number of ranks and width.

    Raises:
        ConfigError: the processes failed.
    """
    rows: list[Row] = []
    for n in request.ranks:
        progress(f"{n} ranks")
        with tempfile.TemporaryDirectory(prefix="gossamer-") as folder:
            result = Path(folder) / "rows.json"
            status = run_processes(n, _child, request, str(result))
            if status != 0:
                raise ConfigError(f"bench ddp: the {n} processes ended with status {status}")
            rows += json.loads(result.read_text())
    return rows


def _child(request: DDPRequest, result: str) -> int:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gossamer",
        init_method=os.environ["GOSSAMER_RENDEZVOUS"],
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=_TIMEOUT,
    )
    groups = {"gossamer": dist.group.WORLD, "gloo": dist.new_group(backend="gloo")}
    rows = [_measure(request, width, groups) for width in request.widths]
    if dist.get_rank() == 0:
        Path(result).write_text(json.dumps(rows))
    dist.destroy_process_group()
    return 0


def _measure(request: DDPRequest, width: int, groups: dict[str, dist.ProcessGroup | None]) -> Row:
    torch.manual_seed(0)
    model = Transformer(
        vocabulary=_VOCABULARY,
        context=_CONTEXT,
        layers=_LAYERS,
        width=width,
        heads=_HEADS,
        tied=True,
    )
    steps = {"alone": _Step(deepcopy(model), request.batch)}
    calls: dict[str, Callable[[], object]] = {"alone": steps["alone"]}
    for name, group in groups.items():
        wrapped = DistributedDataParallel(deepcopy(model), process_group=group)
        calls[name] = steps[name] = _Step(wrapped, request.batch)
    for _ in range(2):  # the buckets are cut anew after the first
        for step in steps.values():
            step()
    for name, group in groups.items():
        calls[f"{name}_comm"] = _AllReduces(steps[name].module, group)
    times = _time(calls, request)
    _check(steps, groups)
    row: Row = {"ranks": dist.get_world_size(), "width": width, "batch": request.batch}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row["buckets"] = len(calls["gloo_comm"].buckets)  # type: ignore[attr-defined]
    for name, samples in times.items():
        s = spread(samples)
        for key, value in (("", s.median), ("_p10", s.p10), ("_p90", s.p90)):
            row[f"{name}_ms{key}"] = 1e3 * value
    row["ratio"] = row["gloo_ms"] / row["gossamer_ms"]
    row["comm_ratio"] = row["gloo_comm_ms"] / row["gossamer_comm_ms"]
    return row


class _Step:
    """A training step; every instance draws the same windows."""

    def __init__(self, module: nn.Module, batch: int) -> None:
        self.module = module
        self._optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        self._generator = torch.Generator().manual_seed(dist.get_rank())
        self._shape = batch, _CONTEXT + 1

    def __call__(self) -> None:
        tokens = torch.randint(_VOCABULARY, self._shape, generator=self._generator)
        self._optimizer.zero_grad()
        next_token_loss(self.module, (tokens,)).backward()
        self._optimizer.step()


class _AllReduces:
    """The messages of a step alone: an all-reduce of each bucket, all started at once."""

    def __init__(self, module: nn.Module, group: dist.ProcessGroup | None) -> None:
        found = module.reducer._get_zeros_like_grad_buckets()  # type: ignore[union-attr,operator]
        self.buckets: list[Tensor] = [torch.ones_like(bucket.buffer()) for bucket in found]
        self._group = group

    def __call__(self) -> None:
        works = [dist.all_reduce(b, group=self._group, async_op=True) for b in self.buckets]
        for bucket, work in zip(self.buckets, works, strict=True):
            assert work is not None
            work.wait()
            bucket.fill_(1.0)  # before it overflows


def _time(calls: dict[str, Callable[[], object]], request: DDPRequest) -> dict[str, list[float]]:
    """Return seconds of each sample, the slowest rank's."""
    names = list(calls)
    mine = torch.zeros(len(names), request.iters, dtype=torch.float64)
    for k in range(-request.warmup, request.iters):
        for c in range(len(names)):
            c = (c + k) % len(names)
            dist.barrier()
            begin = time.perf_counter()
            calls[names[c]]()
            if k >= 0:
                mine[c, k] = time.perf_counter() - begin
    dist.all_reduce(mine, dist.ReduceOp.MAX)
    return dict(zip(names, mine.tolist(), strict=True))


def _check(steps: dict[str, _Step], groups: dict[str, dist.ProcessGroup | None]) -> None:
    """Compare where the two ways have come to.

    Raises:
        ConfigError: their parameters differ by more than rounding, seen through AdamW, explains.
    """
    ours, theirs = (
        torch.cat([p.detach().reshape(-1) for p in steps[name].module.parameters()])
        for name in groups
    )
    away = float((ours - theirs).norm() / theirs.norm())
    if away > 1e-2:
        raise ConfigError(f"bench ddp: the backends' parameters are {away:.1e} apart")
