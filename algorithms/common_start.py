"""What all ranks must start from alike, compared by its digests before the first step."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gossamer.runtime import Communicator, RanksDiffer, RowLayout

__all__ = ["digests_of", "fixed_tensors", "require_common"]

_BYTES = 16
"""Of a tensor's digest that are compared."""


def fixed_tensors(module: nn.Module, layout: RowLayout) -> dict[str, Tensor]:
    """Return by name what is not trained, and makes the same numbers mean something else.

    Frozen parameters; buffers of integers (others, such as running statistics, are each rank's
    own); and what modules have in neither way and list in a method ``fixed_tensors() -> dict[str,
    Tensor]``: the support of a sparse matrix, say.

    Args:
        module: the model.
        layout: of what is trained.
    """
    trained = {s.name for s in layout.slices}
    found: dict[str, Tensor] = {
        name: p for name, p in module.named_parameters() if name not in trained
    }
    found |= {
        name: buffer
        for name, buffer in module.named_buffers()
        if not (buffer.is_floating_point() or buffer.is_complex())
    }
    for prefix, part in module.named_modules():
        listed = getattr(part, "fixed_tensors", None)
        if callable(listed):
            found |= {f"{prefix}.{k}" if prefix else k: tensor for k, tensor in listed().items()}
    return found


def digests_of(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Return the SHA-256 of each tensor with its name, dtype and shape."""
    found = {}
    for name, tensor in tensors.items():
        state = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():  # an empty one may have strides that a view refuses
            values = tensor.detach().cpu().contiguous().reshape(-1)
            state.update(values.view(torch.uint8).numpy().data)
        found[name] = state.digest()
    return found


def require_common(comm: Communicator, digests: Mapping[str, bytes]) -> None:
    """Compare tensors between processes; every process calls it. Not counted as traffic.

    Args:
        comm: the ranks; those of one process share its module.
        digests: of this process's tensors, in its module's order.

    Raises:
        RanksDiffer: on every process, with the ranks and the first tensor that differs.
    """
    if comm.transport.processes == 1:
        return
    whole = hashlib.sha256(b"".join(digests.values())).digest()
    if comm.same(int.from_bytes(whole[:8], "little") >> 1):
        return
    own = torch.full((comm.local, 1), len(digests), dtype=torch.int64, device=comm.device)
    count = int(comm.all_reduce(own, "max", count=False))
    content = b"".join(digest[:_BYTES] for digest in digests.values()).ljust(count * _BYTES, b"\0")
    row = torch.frombuffer(bytearray(content), dtype=torch.uint8).expand(comm.local, -1)
    rows = comm.all_gather(row.contiguous().to(comm.device), count=False).view(comm.n, count, -1)
    apart = (rows != rows[0]).any(dim=2)
    first = int(apart.any(dim=0).nonzero()[0])
    ranks = apart[:, first].nonzero().flatten().tolist()
    names = list(digests)
    what = f"another '{names[first]}'" if first < len(names) else "more tensors, or fewer,"
    raise RanksDiffer(
        f"start: ranks {ranks} hold {what} than rank 0, so that averaging would mix unrelated "
        "entries; give every rank the same seed and checkpoint, and build the module from them "
        "alone"
    )
