"""``bench pretraining``: tokens per second of training steps, methods beside each other.

A step is a forward and backward pass and an update of a whole LLaMA on one thread. The methods run
in turn in one process, each time in another order; ratios are of the time on the CPU.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from gossamer.launch.bench.children import started
from gossamer.launch.bench.llama_steps import LlamaRequest, make_steps
from gossamer.launch.bench.measure import Row, spread
from gossamer.launch.bench.private import Aim
from gossamer.runtime import native

__all__ = ["aims", "pretraining"]


def pretraining(
    request: LlamaRequest, iters: int, warmup: int, progress: Callable[[str], object]
) -> list[Row]:
    """Measure; a row of figures for every model and method.

    Raises:
        ConfigError: a process failed.
    """
    rows: list[Row] = []
    tokens = request.batch * request.context
    for model in request.models:
        progress(model)
        requests = [request.of(model, method) for method in request.methods]
        samples = started("pretraining", 1, _time_child, requests, iters, warmup)
        cpu = {method: spread(times["cpu"]).median for method, times in samples.items()}
        for one in requests:
            (method,) = one.methods
            found = spread(samples[method]["clock"])
            row: Row = {"model": model, "method": method, "tokens": tokens}
            row |= {"ms": 1e3 * found.median, "ms_p10": 1e3 * found.p10, "ms_p90": 1e3 * found.p90}
            row["cpu_ms"], row["tokens_per_s"] = 1e3 * cpu[method], tokens / cpu[method]
            row["full_ratio"] = cpu["full"] / cpu[method] if "full" in cpu else None
            rows.append(row | {"settings": asdict(one)})
    return rows


def aims(rows: Sequence[Row]) -> list[Aim]:
    """Return what the rows are held to: SLTrain's time for a token, over full rank's."""
    return [
        Aim(f"{row['model']}: time over full rank's", 1 / row["full_ratio"], 1 / 0.85)
        for row in rows
        if row["method"] == "sltrain" and row["full_ratio"] is not None
    ]


def _time_child(requests: Sequence[LlamaRequest], iters: int, warmup: int, result: str) -> int:
    torch.set_num_threads(1)
    native.use_threads(1)
    steps = {request.methods[0]: make_steps(request, 1) for request in requests}
    names = list(steps)
    samples: dict[str, dict[str, list[float]]] = {n: {"clock": [], "cpu": []} for n in names}
    for k in range(-warmup, iters):
        for c in range(len(names)):
            name = names[(c + k) % len(names)]
            begin, busy = time.perf_counter(), time.process_time()
            steps[name]()
            if k >= 0:
                samples[name]["clock"].append(time.perf_counter() - begin)
                samples[name]["cpu"].append(time.process_time() - busy)
    Path(result).write_text(json.dumps(samples))
    return 0
