"""
Compiled kernels; call them through gossamer.runtime.native, which checks the arguments.
"""

from collections.abc import Sequence


def instruction_set() -> str:
    """The instruction set the kernels use here."""

def weighted_sum(rows: int, num_rows: int, indptr: int, columns: int, weights: int, out: int, num_out: int, addend: int, a: float, d: int, dtype: int, wide: bool, staged: bool) -> None: ...

def row_dot(x: int, y: int, num_rows: int, d: int, dtype: int, out: int) -> None: ...

def philox4x32(counter: Sequence[int], key: int) -> list[int]:
    """One Philox4x32-10 block: four 32-bit words."""

def fill_words(out: int, n: int, begin: int, key: int, c1: int, c2: int, c3: int) -> None: ...

def fill(kind: int, out: int, n: int, begin: int, is_double: bool, key: int, c1: int, c2: int, c3: int) -> None: ...
