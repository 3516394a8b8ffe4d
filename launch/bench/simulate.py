"""``bench simulate``: mixing rounds of many ranks in one process, against a plain copy.

A round has to read every row once and write it once, as a copy does: the share of the copy's speed
that mixing reaches is the copy's time over the round's, both measured in turn in one run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gossamer.launch.bench.measure import DTYPES, Options, Row, interleave
from gossamer.runtime import Communicator, StackedTransport
from gossamer.runtime.random import Random
from gossamer.topologies import build

__all__ = ["GRAPHS", "fit", "simulate"]

GRAPHS = ("ring", "torus", "random_regular", "exponential")

_MAPPED_BYTES = 32 << 20  # blocks above it come from the system and go back to it, in glibc
_CHECKED_COLUMNS = 257  # an odd number: whole vectors and a rest


def simulate(graphs: Sequence[str], ranks: Sequence[int], options: Options) -> list[Row]:
    """Measure every graph at every n and row length; a row of figures each.

    Raises:
        TopologyError: a graph does not exist at some n.
        AssertionError: a round differs from the product with W in float64.
    """
    rows = []
    for n in ranks:
        comms = {graph: Communicator(build(graph, n), StackedTransport()) for graph in graphs}
        for d in options.counts():
            rows += [_measure(graph, comm, d, options) for graph, comm in comms.items()]
    return rows


def _measure(graph: str, comm: Communicator, d: int, options: Options) -> Row:
    dtype = DTYPES[options.dtype]
    x, gradient = comm.alloc(d, dtype), comm.alloc(d, dtype)
    for state in (x, gradient):  # touched: pages that are only promised take no memory
        state.fill_(1.0)
    _fill(x)
    _check(comm, x)
    copy_bytes = x.numel() * x.element_size()
    peaks = {
        "step_copies": _peak_beyond(lambda: _step(comm, x, gradient)),
        "mix_copies": _peak_beyond(lambda: comm.neighbor_average(x)),
    }
    out = comm.alloc(d, dtype)
    found = interleave(
        {
            "copy": lambda: out.copy_(x),
            "mix": lambda: comm.neighbor_average(x, out=out),
            "in_place": lambda: comm.neighbor_average(x, out=x),
            "step": lambda: _step(comm, x, gradient),
        },
        options.iters,
        options.warmup,
    )
    edges = len(comm.topology.round(0).sources)
    row: Row = {"graph": graph, "ranks": comm.n, "d": d, "edges": edges, "dtype": options.dtype}
    for name, times in found.items():
        row |= {f"{name}_ms": 1e3 * times.median}
        row |= {f"{name}_ms_p10": 1e3 * times.p10, f"{name}_ms_p90": 1e3 * times.p90}
    copy = found["copy"].median
    return row | {
        "rank_steps_per_s": comm.n / found["step"].median,
        "copy_gbps": 2 * copy_bytes / copy / 1e9,
        "share": copy / found["mix"].median,
        "share_in_place": copy / found["in_place"].median,
        # What x and the gradient do not hold: scratch, and for the mix its result.
        **{name: _copies(peak, copy_bytes) for name, peak in peaks.items()},
    }


def _step(comm: Communicator, x: Tensor, gradient: Tensor) -> None:
    comm.neighbor_average(x, out=x, axpy=(-1e-3, gradient))  # DSGD: x <- W x - lr g


def _fill(x: Tensor) -> None:
    tile = Random(0).stream("bench", range(len(x))).normal_(torch.empty(len(x), 64))
    x.copy_(tile.repeat(1, -(-x.shape[1] // 64))[:, : x.shape[1]])


def _check(comm: Communicator, x: Tensor) -> None:
    part = x[:, :_CHECKED_COLUMNS].contiguous()
    expected = torch.from_numpy(comm.topology.round(0).apply(part.double().numpy()))
    tolerance = 8 * torch.finfo(x.dtype).eps * float(part.abs().max())
    found = comm.neighbor_average(part).double()
    assert torch.allclose(found, expected, rtol=0, atol=tolerance), "a round is not W x"


def _peak_beyond(action: Callable[[], object]) -> int | None:
    """Return how far the process's memory grows during ``action``, in bytes; None if unknown."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        return None
    before = _memory("VmRSS")
    action()
    return max(0, _memory("VmHWM") - before)


def _copies(peak: int | None, copy_bytes: int) -> float | None:
    """Return the peak in copies of x; None where x is so small that freed memory may hide it."""
    return None if peak is None or copy_bytes < _MAPPED_BYTES else peak / copy_bytes


def _memory(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None, f"/proc/self/status has no {field}"
    return int(match[1]) << 10


def fit(rows: Sequence[Row]) -> dict[str, float]:
    """Fit ``seconds = (a n + b edges) d`` to the rows of the largest n by least squares.

    Returns:
        ranks; ns_per_element and ns_per_edge_element (a and b); r2; worst, the largest relative
        difference of a row from the fit.
    """
    n = max(row["ranks"] for row in rows)
    chosen = [row for row in rows if row["ranks"] == n]
    seconds = np.array([row["mix_ms"] / 1e3 for row in chosen])
    work = np.array([[n * row["d"], row["edges"] * row["d"]] for row in chosen], np.float64)
    (a, b), *_ = np.linalg.lstsq(work / seconds[:, None], np.ones(len(chosen)), rcond=None)
    fitted = work @ np.array([a, b])
    residual = ((seconds - fitted) ** 2).sum()
    total = ((seconds - seconds.mean()) ** 2).sum()
    return {
        "ranks": float(n),
        "ns_per_element": float(1e9 * a),
        "ns_per_edge_element": float(1e9 * b),
        "r2": float(1 - residual / total) if total > 0 else 1.0,
        "worst": float(np.abs(fitted / seconds - 1).max()),
    }
