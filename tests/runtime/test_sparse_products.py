"""Products with a sparse matrix, against dense ones in float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.runtime import native
from gossamer.runtime.native import (
    Support,
    add_sparse_product,
    add_sparse_product_back,
    sampled_product,
)

TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def sparse(d, p, share, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    places = (torch.rand(d * p, generator=generator) < share).nonzero().flatten()
    values = torch.randn(len(places), generator=generator, dtype=torch.float64).to(dtype)
    support = Support.of((d, p), places)
    dense = support.scatter_(torch.zeros(d, p, dtype=torch.float64), values.double())
    return support, values, dense


def rows(n, width, dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator, dtype=torch.float64).to(dtype)


def close(found, wanted, terms, dtype):
    """Within rounding of so many terms of size 1."""
    bound = TOLERANCES[dtype] * max(1.0, terms) ** 0.5 * 8
    return found.shape == wanted.shape and bool(((found.double() - wanted).abs() <= bound).all())


@settings(max_examples=40, deadline=None)
@given(
    d=st.integers(1, 40),
    p=st.integers(1, 40),
    n=st.integers(0, 70),
    share=st.sampled_from([0.0, 0.1, 0.7, 1.0]),
    dtype=st.sampled_from(list(TOLERANCES)),
)
def test_products_and_samples_are_those_of_the_dense_matrix(d, p, n, share, dtype):
    support, values, dense = sparse(d, p, share, dtype)
    x, g = rows(n, p, dtype), rows(n, d, dtype, seed=2)
    y, back = rows(n, d, dtype, seed=3), rows(n, p, dtype, seed=4)
    wanted = y.double() + x.double() @ dense.t(), back.double() + g.double() @ dense
    assert add_sparse_product(support, values, x, y) is y
    assert add_sparse_product_back(support, values, g, back) is back
    assert close(y, wanted[0], p, dtype)
    assert close(back, wanted[1], d, dtype)
    sampled = support.gather((g.double().t() @ x.double()).contiguous())
    assert close(sampled_product(support, g, x), sampled, n, dtype)


def test_rows_may_have_room_between_them():
    support, values, dense = sparse(7, 9, 0.4, torch.float32)
    x, y = rows(5, 20, torch.float32)[:, 3:12], torch.zeros(5, 31)[:, 8:15]
    add_sparse_product(support, values, x, y)
    assert close(y, x.double() @ dense.t(), 9, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_number_of_threads(dtype):
    support, values, _ = sparse(300, 200, 0.1, dtype)
    x, g = rows(333, 200, dtype), rows(333, 300, dtype)
    found = []
    for threads in (1, 5):
        native.use_threads(threads)
        try:
            y = add_sparse_product(support, values, x, torch.zeros_like(g))
            back = add_sparse_product_back(support, values, g, torch.zeros_like(x))
            found.append((y, back, sampled_product(support, g, x)))
        finally:
            native.use_threads(None)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_tokens_product_does_not_depend_on_the_others():
    support, values, _ = sparse(60, 50, 0.2, torch.float32)
    x = rows(75, 50, torch.float32)
    whole = add_sparse_product(support, values, x, torch.zeros(75, 60))
    one = add_sparse_product(support, values, x[41:42], torch.zeros(1, 60))
    assert torch.equal(whole[41:42], one)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_is_right(isa):
    code = (
        "import test_sparse_products as t\n"
        "for dtype in t.TOLERANCES:\n"
        "    t.test_products_and_samples_are_those_of_the_dense_matrix.hypothesis.inner_test("
        "33, 29, 67, 0.3, dtype)\n"
        "print(t.native.build_info()['instruction_set'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={**os.environ, "GOSSAMER_ISA": isa},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() != isa:
        pytest.skip(f"this processor has no {isa}")


def test_places_must_rise_within_the_matrix():
    for places in ([3, 3], [4, 2], [-1, 2], [0, 6]):
        with pytest.raises(ValueError, match="must rise strictly within"):
            Support.of((2, 3), torch.tensor(places))
    with pytest.raises(ValueError, match="do not fit 31 bits"):
        Support.of((2**16, 2**15), torch.empty(0, dtype=torch.int64))


def test_what_does_not_fit_is_named():
    support, values, _ = sparse(4, 6, 0.5, torch.float32)
    x, y = rows(3, 6, torch.float32), torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"values: must be contiguous"):
        add_sparse_product(support, values[1:], x, y)
    with pytest.raises(ValueError, match=r"x: must be \(3, 6\)"):
        add_sparse_product(support, values, x[:, :5], y)
    with pytest.raises(ValueError, match=r"y: must be \(3, 4\)"):
        add_sparse_product(support, values, x, torch.zeros(4, 3).t())
    with pytest.raises(ValueError, match=r"g: is torch.float64"):
        sampled_product(support, y.double(), x)
