"""Rows on GPUs: the kernel against the CPU's, and processes that share one GPU.

On a machine with a GPU: ``pytest -m cuda tests/distributed/test_native_cuda.py``.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from gossamer.launch.processes import run_processes
from gossamer.runtime import native
from gossamer.runtime.native import Terms, weighted_sum

pytestmark = pytest.mark.cuda

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def random_terms(outputs, rows, degree, seed=0):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, degree + 1, outputs)
    return Terms(
        indptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        columns=rng.integers(0, rows, counts.sum()),
        weights=rng.standard_normal(counts.sum()),
    )


def rows_of(count, d, dtype, seed, misaligned=False):
    """Rows with subnormal numbers, zeros of both signs and infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, d + misaligned, generator=generator, dtype=torch.float64).to(dtype)
    special = torch.tensor([-0.0, 0.0, torch.inf, 1e-40, 6e-8], dtype=dtype)
    where = torch.rand(rows.shape, generator=generator) < 0.05
    rows[where] = special[torch.randint(len(special), (int(where.sum()),), generator=generator)]
    return rows[:, misaligned:]


def same_bits(found, expected):
    """Equal to the bit, save that a NaN may have any payload."""
    as_int = {8: torch.int64, 4: torch.int32, 2: torch.int16}[expected.element_size()]
    bits = found.contiguous().view(as_int) == expected.contiguous().view(as_int)
    return bool((bits | (found.isnan() & expected.isnan())).all())


@pytest.fixture(autouse=True)
def built_with_kernels():
    assert native.build_info()["cuda_kernels"], "the build found no nvcc"


@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("d", [0, 1, 7, 64, 1000, 4099, 1_000_003])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_gives_the_bits_of_the_cpu(dtype, d, misaligned):
    # 3 sums of few terms travel with the launch; 40, and sums of 100 terms, through memory
    for outputs, rows, degree in ((3, 5, 3), (40, 9, 3), (2, 120, 100)):
        if rows * d > 20_000_000:
            continue
        blocks = [rows_of(rows, d, dtype, 1, misaligned), rows_of(2, d, dtype, 2, misaligned)]
        y = rows_of(outputs, d, dtype, 3, misaligned)
        terms = random_terms(outputs, rows + 2, degree)
        for axpy in (None, (-0.1, y)):
            expected = weighted_sum(blocks, terms, torch.empty(outputs, d, dtype=dtype), axpy=axpy)
            found = weighted_sum(
                [block.cuda() for block in blocks],
                terms,
                torch.empty(outputs, d, dtype=dtype, device="cuda"),
                axpy=None if axpy is None else (axpy[0], y.cuda()),
            )
            assert same_bits(found.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_may_be_sources(dtype):
    x = rows_of(6, 1000, dtype, 0)
    terms, on_gpu = random_terms(6, 6, 4), x.cuda()
    weighted_sum([on_gpu], terms, on_gpu, axpy=(0.5, on_gpu))
    weighted_sum([x], terms, x, axpy=(0.5, x))
    assert same_bits(on_gpu.cpu(), x)


# --- processes ------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch):
    """Start processes that share the GPUs."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import cuda_worker

    def start(processes, name, *arguments):
        assert run_processes(processes, getattr(cuda_worker, name), *arguments) == 0

    return start


@pytest.mark.parametrize("processes", [2, 4])
def test_every_operation_gives_the_bits_of_the_cpu(run, processes):
    run(processes, "same_as_the_cpu")


@pytest.mark.parametrize("n", [4, 9])
def test_rows_may_be_overwritten_as_soon_as_a_call_returns(run, n):
    run(4, "ahead", n, 100)


def test_an_asynchronous_average_gives_the_bits_of_the_cpu(run):
    run(4, "asynchronous", 4)


def test_a_process_that_is_gone_ends_the_others(run):
    run(4, "one_dies")
