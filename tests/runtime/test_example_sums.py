"""Norms and weighted sums of the gradients of single examples, without a copy of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.runtime import native
from gossamer.runtime.native import add_rows, row_dot

EXACT = [torch.float32, torch.float64]
SIZES = [1, 7, 64, 4095, 4096, 9001]


def random_rows(m, d, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, d, generator=generator, dtype=torch.float64).to(dtype)


def reference(out, g, factors):
    """In order, every product and sum rounded by torch."""
    total = out.clone()
    for row, factor in zip(g, factors.to(out.dtype), strict=True):
        if factor != 0:
            total = total + factor * row
    return total


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@settings(deadline=None, max_examples=40)
@given(
    m=st.integers(0, 13),
    d=st.sampled_from(SIZES),
    zeros=st.sets(st.integers(0, 12)),
    padded=st.booleans(),
)
def test_rows_are_added_in_order_each_operation_rounded(dtype, m, d, zeros, padded):
    g = random_rows(m, d + 5, dtype)[:, :d] if padded else random_rows(m, d, dtype)
    factors = torch.linspace(-1, 2, m, dtype=torch.float64)
    factors[[k for k in zeros if k < m]] = 0
    out = random_rows(1, d, dtype, seed=1)[0]
    expected = reference(out, g, factors)
    assert add_rows(out, g, factors) is out
    assert torch.equal(out, expected)


def test_rows_without_a_factor_may_hold_anything():
    g = torch.tensor([[1.0, 2.0], [torch.nan, torch.inf], [3.0, 4.0]])
    out = add_rows(torch.zeros(2), g, torch.tensor([2.0, 0.0, 1.0]))
    assert out.tolist() == [5.0, 8.0]


def test_bits_do_not_depend_on_the_number_of_threads():
    g, factors = random_rows(40, 60_001, torch.float32), torch.rand(40)
    found = []
    try:
        for threads in (1, 3):
            native.use_threads(threads)
            found.append(add_rows(torch.zeros(60_001), g, factors))
    finally:
        native.use_threads(None)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("out", "g", "factors", "message"),
    [
        (torch.zeros(4).half(), torch.zeros(2, 4).half(), torch.ones(2), "out must be"),
        (torch.zeros(1, 4), torch.zeros(2, 4), torch.ones(2), "out must be"),
        (torch.zeros(4), torch.zeros(2, 5), torch.ones(2), "add_rows: g: must be"),
        (torch.zeros(4), torch.zeros(2, 4).double(), torch.ones(2), "add_rows: g: must be"),
        (torch.zeros(4), torch.zeros(4, 2).mT, torch.ones(2), "rows must be contiguous"),
        (torch.zeros(4), torch.zeros(2, 4), torch.ones(3), r"factors are \(3,\)"),
        (torch.zeros(8)[::2], torch.zeros(2, 4), torch.ones(2), "contiguous"),
    ],
)
def test_what_does_not_fit_is_refused(out, g, factors, message):
    with pytest.raises(ValueError, match=message):
        add_rows(out, g, factors)


def test_a_sum_into_one_of_its_rows_is_refused():
    g = torch.zeros(3, 8)
    with pytest.raises(ValueError, match="no row of g"):
        add_rows(g[1], g, torch.ones(3))


# --- GPU ------------------------------------------------------------------------------------------

needs_kernels = pytest.mark.skipif(
    not native.build_info()["cuda_kernels"], reason="built without CUDA"
)


@pytest.mark.cuda
@needs_kernels
@pytest.mark.parametrize("d", [*SIZES, 1_000_003])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_sums_on_the_gpu_have_the_bits_of_the_cpu(dtype, d):
    g, factors = random_rows(9, d, dtype), torch.linspace(0, 2, 9)
    g[0] = torch.nan  # its factor is 0
    out = random_rows(1, d, dtype, seed=1)[0]
    found = add_rows(out.cuda(), g.cuda(), factors.cuda())
    assert torch.equal(found.cpu(), add_rows(out, g, factors))


@pytest.mark.cuda
@needs_kernels
@pytest.mark.parametrize("d", [0, *SIZES, 1_000_003])
@pytest.mark.parametrize("dtype", [*EXACT, torch.bfloat16, torch.float16], ids=str)
def test_inner_products_on_the_gpu_are_those_of_the_cpu_to_rounding(dtype, d):
    x, y = random_rows(5, d, dtype), random_rows(5, d, dtype, seed=1)
    squares = row_dot(x.cuda(), x.cuda())
    torch.testing.assert_close(squares.cpu(), row_dot(x, x), rtol=1e-13, atol=0)
    scale = (row_dot(x, x) * row_dot(y, y)).sqrt()  # products may cancel
    apart = (row_dot(x.cuda(), y.cuda()).cpu() - row_dot(x, y)).abs()
    assert (apart <= 1e-13 * scale).all()
    assert torch.equal(squares, row_dot(x.cuda(), x.cuda()))  # the order is fixed
