"""``bench memory``: what a training step of a LLaMA needs, part by part, without allocating it.

The model, its scheme and the optimizer's state are the real ones on a device without storage; a
forward and backward pass of them counts what is alive at its most. ``--measure`` makes the steps in
a fresh process on the CPU, for models that fit, and reports what was resident beside.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.algorithms.low_rank.sltrain import count_parameters, layers_of
from gossamer.algorithms.tasks.hub import load_package
from gossamer.algorithms.tasks.language import next_token_loss
from gossamer.algorithms.tasks.llama import LLAMA
from gossamer.launch.bench.children import held_by, started
from gossamer.launch.bench.live_bytes import LiveBytes
from gossamer.launch.bench.llama_steps import LlamaRequest, make_steps
from gossamer.launch.bench.measure import DTYPES, Row
from gossamer.runtime import Communicator, RowLayout, StackedTransport, native
from gossamer.runtime.rows import empty_rows
from gossamer.runtime.state import flatten
from gossamer.topologies import build

__all__ = ["memory"]


def memory(request: LlamaRequest, measure: bool, progress: Callable[[str], object]) -> list[Row]:
    """Return a row for every model and method, in bytes.

    Raises:
        ConfigError: a process that measures failed, for want of memory say.
    """
    rows: list[Row] = []
    for model in request.models:
        for method in request.methods:
            one = request.of(model, method)
            progress(f"{model}, {method}")
            row = _counted(one)
            if measure:
                row["measured"] = started("memory", 1, _measure_child, one)
                row["ratio"] = row["total"] / row["measured"]
            rows.append(row | {"settings": asdict(one)})
    return rows


def _counted(request: LlamaRequest) -> Row:
    (model,), (method,) = request.models, request.methods
    module = request.module("meta")
    layout, rule = RowLayout(module), request.rule(method)
    rule.know(layout, alike=True)
    row_bytes = layout.d * layout.dtype.itemsize
    # GaLore takes more of what it projects.
    touched = [s for s in layout.slices if method != "galore" or "layers" in s.name]
    largest = max(s.shape.numel() for s in touched) * layout.dtype.itemsize
    supports = [layer.support for _, layer in layers_of(module)]
    frozen = [p for p in module.parameters() if not p.requires_grad]
    parts = {
        "weights": row_bytes,
        "frozen": _bytes_of([*frozen, *module.buffers()]),
        "places": _bytes_of(t for s in supports for t in (s.indices, s.starts)),
        "gradients": 0 if request.per_layer else row_bytes,
        "optimizer": _bytes_of(_tensors_of(rule.init(_row(layout.d, layout, "meta")))),
        "activations": _pass_bytes(request, module, 0.0),
    }
    of_row, of_one = _update_shares(request)
    if request.per_layer:
        parts["update"] = int((of_row + of_one) * largest)
        passing = _pass_bytes(request, module, of_row + of_one)
    else:
        parts["update"] = int(of_row * row_bytes + of_one * largest)
        passing = max(parts["activations"], parts["update"])
    resting = ("weights", "frozen", "places", "gradients", "optimizer")
    total = passing + sum(parts[part] for part in resting)
    counts = count_parameters(module)
    return {
        "model": model,
        "method": method,
        "parameters": layout.size,
        **{f"parameters_{part}": count for part, count in counts.items()},
        **parts,
        "total": total,
        "measured": None,
        "ratio": None,
    }


def _row(d: int, layout: RowLayout, device: str) -> Tensor:
    return empty_rows(1, d, layout.dtype, device)


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.itemsize for t in tensors)


def _tensors_of(state: Any) -> list[Tensor]:
    return [] if state is None else list(flatten(state)[0].values())


def _pass_bytes(request: LlamaRequest, module: nn.Module, of_update: float) -> int:
    """Return the most that is alive in a forward and backward pass, parameters' rows aside.

    A gradient is alive until it is added to its row, or its parameter updated, which takes
    ``of_update`` times its size.
    """

    def take(parameter: Tensor) -> None:
        assert parameter.grad is not None
        size = int(of_update * parameter.numel() * parameter.itemsize)
        torch.empty(size, dtype=torch.uint8, device="meta")
        parameter.grad = None

    tokens = request.tokens(request.batch, "meta")
    _use_flash(module)
    hooks = [
        p.register_post_accumulate_grad_hook(take) for p in module.parameters() if p.requires_grad
    ]
    held = [*module.parameters(), *module.buffers()]
    held += [layer.support.indices for _, layer in layers_of(module)]
    with _Unpacked().ignore(held) as live:
        next_token_loss(module, (tokens,)).backward()
    for hook in hooks:
        hook.remove()
    peak: int = live.peak
    return peak


_ATTENTION = "gossamer_memory"


def _use_flash(module: nn.Module) -> None:
    """Let attention allocate what fused kernels do: without storage torch takes another way."""
    utils = load_package("transformers.modeling_utils")
    masks = load_package("transformers.masking_utils")
    utils.ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _flash)
    masks.ALL_MASK_ATTENTION_FUNCTIONS.register(_ATTENTION, _no_mask)
    model: Any = module.model
    model.set_attn_implementation(_ATTENTION)


def _no_mask(*arguments: Any, **options: Any) -> None:
    return None


def _flash(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any
) -> tuple[Tensor, None]:
    mixed: Tensor = _Flash.apply(query, key, value)  # type: ignore[no-untyped-call]
    return mixed.transpose(1, 2).contiguous(), None


class _Flash(torch.autograd.Function):
    """Keeps query, key, value, the result, and a float32 per query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = torch.empty_like(query)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mixed, sums)
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class _Unpacked(LiveBytes):
    """Says yes where transformers asks tensors without values if a sequence is one text."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True
        return super().__torch_dispatch__(func, types, args, kwargs)


def _update_shares(request: LlamaRequest) -> tuple[float, float]:
    """Return what an update takes beside the state, in sizes of the row and of a parameter.

    By two small rows: what a rule takes goes with the row, or with the parameter at hand.
    """
    few, many = (_small_update(request, count) for count in (4, 8))
    of_row = max(0.0, (many - few) / 4)
    return of_row, max(0.0, few - 4 * of_row)


def _small_update(request: LlamaRequest, count: int) -> float:
    """Return what an update of ``count`` matrices takes at most, in sizes of one of them.

    The second and third: the first makes tables, which stay.
    """
    side = 128
    matrices = {f"mlp{k}": nn.Linear(side, side, bias=False) for k in range(count)}
    layout = RowLayout(nn.ModuleDict(matrices).to(DTYPES[request.dtype]))
    rule = replace(request, rank=side // 4).rule(request.methods[0])
    rule.know(layout, alike=True)
    comm = Communicator(build("ring", 1), StackedTransport(), steps=10)
    x, grad = (_row(layout.d, layout, "cpu").normal_() for _ in range(2))
    state = rule.init(x)
    rule.update_(state, x, grad, comm)
    held = [x, grad, *_tensors_of(state)]
    with LiveBytes().ignore(held) as live:
        for _ in range(2):
            rule.update_(state, x, grad, comm)
    peak: int = live.peak
    return peak / (side * side * x.itemsize)


# --- in the processes -----------------------------------------------------------------------


def _measure_child(request: LlamaRequest, result: str) -> int:
    torch.set_num_threads(1)
    native.use_threads(1)
    tiny = replace(request, vocabulary=64, context=8, rank=4)
    shapes, name = dict(LLAMA), request.models[0]
    LLAMA[name] = LLAMA[name].model_copy(update={"hidden": 16, "layers": 1, "heads": 1, "ffn": 16})
    make_steps(tiny, 2)()  # what is loaded once is no memory of a step
    LLAMA.update(shapes)
    held = held_by(lambda: make_steps(request, 2))
    Path(result).write_text(json.dumps(held))
    return 0
