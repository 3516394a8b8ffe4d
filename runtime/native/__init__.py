"""The compiled kernels behind argument checks."""

from gossamer.runtime.native.compiled import (
    ALIGNMENT,
    DTYPES,
    AveragePlan,
    Calls,
    DeviceGroup,
    Exchange,
    Group,
    build_info,
    num_threads,
    use_threads,
)
from gossamer.runtime.native.draws import (
    Direction,
    Piece,
    add_random,
    fill,
    fill_random,
    fill_words,
    normals_of_words,
    subtract_random,
    words_,
)
from gossamer.runtime.native.sums import Terms, combine, row_dot, triad, weighted_sum

__all__ = [
    "ALIGNMENT",
    "DTYPES",
    "AveragePlan",
    "Calls",
    "DeviceGroup",
    "Direction",
    "Exchange",
    "Group",
    "Piece",
    "Terms",
    "add_random",
    "build_info",
    "combine",
    "fill",
    "fill_random",
    "fill_words",
    "normals_of_words",
    "num_threads",
    "row_dot",
    "subtract_random",
    "triad",
    "use_threads",
    "weighted_sum",
    "words_",
]
