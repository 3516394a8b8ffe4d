"""The compiled module, the only one to import it, and what its wrappers share."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from gossamer.runtime import _C
    from gossamer.runtime._C import AveragePlan, Calls, DeviceGroup, Exchange, Group
except ImportError as error:
    raise ImportError(
        "gossamer's compiled module is missing; build it with "
        "'pip install --no-build-isolation -e .' in the repository, or 'pip install .'"
    ) from error

__all__ = [
    "ALIGNMENT",
    "DTYPES",
    "_C",
    "AveragePlan",
    "Calls",
    "DeviceGroup",
    "Exchange",
    "Group",
    "build_info",
    "num_threads",
    "stream_of",
    "use_threads",
]

ALIGNMENT = 64
"""Rows and parameters start at multiples of this many bytes: a cache line, a vector register."""

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def build_info() -> dict[str, str | bool]:
    """Say what this installation can do; a run writes it into its summary."""
    return {
        "instruction_set": _C.instruction_set(),
        "torch": torch.__version__,
        "cuda": torch.cuda.is_available(),
        "cuda_kernels": _C.built_with_cuda(),
    }


_num_threads: int | None = None


def use_threads(count: int | None) -> None:
    """Let the kernels use up to ``count`` threads; None, as at first: as many as torch does.

    Bits do not depend on it. Small calls stay on the calling thread.
    """
    global _num_threads
    _num_threads = count


def num_threads() -> int:
    """Return how many threads the kernels may use."""
    return _num_threads or torch.get_num_threads()


def stream_of(tensor: Tensor) -> int:
    """Return the current CUDA stream of a tensor's device, as kernels take it."""
    return int(torch.cuda.current_stream(tensor.device).cuda_stream)
