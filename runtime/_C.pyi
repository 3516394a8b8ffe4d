"""
Compiled kernels; call them through gossamer.runtime.native, which checks the arguments.
"""

from collections.abc import Sequence
from typing import Annotated

import numpy
from numpy.typing import NDArray


class Group:
    """The processes of a job on one host, in shared memory."""

    @staticmethod
    def create(job: bytes, process: int, processes: int, bytes: int, cores: int) -> Group: ...

    @property
    def ticket(self) -> tuple[int, int, int]: ...

    def attach(self, tickets: Sequence[tuple[int, int, int]]) -> None: ...

    def allocate(self, bytes: int) -> object: ...

    def owns(self, address: int, bytes: int) -> bool: ...

    def average(self, plan: AveragePlan, x: int, x_stride: int, out: int, out_stride: int, y: int, y_stride: int, a: float, d: int, dtype: int, rounds: int, num_threads: int, timeout_s: float) -> int: ...

    def sum(self, x: int, x_stride: int, counts: Sequence[int], out: int, d: int, dtype: int, divisor: float, timeout_s: float) -> int: ...

    def gather(self, x: int, x_stride: int, counts: Sequence[int], out: int, row_bytes: int, timeout_s: float) -> int: ...

    def broadcast(self, x: int, root: int, out: int, row_bytes: int, timeout_s: float) -> int: ...

    def close(self) -> None: ...

class AveragePlan:
    """One process's part of a round."""

    @staticmethod
    def create(targets: Sequence[int], staged_rows: Sequence[int], most_staged: int, sources: Sequence[tuple[int, Sequence[int], Sequence[int]]], indptr: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], columns: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], weights: Annotated[NDArray[numpy.float64], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> AveragePlan: ...

class Exchange:
    """Transfers on their way."""

    def __init__(self, group: Group, sends: Sequence[tuple[int, int, int]], receives: Sequence[tuple[int, int, int]]) -> None: ...

    def wait(self, timeout_s: float) -> int: ...

    def test(self) -> int | None: ...

def instruction_set() -> str:
    """The instruction set the kernels use here."""

def weighted_sum(blocks: Sequence[tuple[int, int, int]], indptr: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], columns: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], weights: Annotated[NDArray[numpy.float64], dict(shape=(None,), order='C', device='cpu', writable=False)], out: tuple[int, int, int], addend: tuple[int, int, int] | None, a: float, d: int, dtype: int, wide: bool, num_threads: int) -> None: ...

def combine(blocks: Sequence[tuple[int, int, int]], weights: Annotated[NDArray[numpy.float64], dict(shape=(None,), order='C', device='cpu', writable=False)], out: tuple[int, int, int], d: int, dtype: int, num_threads: int) -> None: ...

def row_dot(x: tuple[int, int, int], y: tuple[int, int, int], d: int, dtype: int, out: int, num_threads: int) -> None: ...

def philox4x32(counter: Sequence[int], key: int) -> list[int]:
    """One Philox4x32-10 block: four 32-bit words."""

def fill_words(out: int, n: int, begin: int, key: int, c1: int, c2: int, c3: int) -> None: ...

def fill(kind: int, out: int, n: int, begin: int, is_double: bool, key: int, c1: int, c2: int, c3: int) -> None: ...

def triad(a: int, b: int, c: int, factor: float, n: int, stream: bool) -> None: ...
