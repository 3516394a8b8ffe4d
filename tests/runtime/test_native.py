import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.runtime import native
from gossamer.runtime.native import Terms, weighted_sum
from gossamer.runtime.rows import combine, empty_rows, row_dot, row_norm

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [0, 1, 7, 64, 65, 1000, 4099]


def make_rows(count, d, dtype, seed=0):
    """Rows with every kind of number that the arithmetic could spoil."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, d, generator=generator, dtype=torch.float64).to(dtype)
    special = torch.tensor([-0.0, 0.0, torch.inf, -torch.inf, 1e-40, 6e-8, 3e38], dtype=dtype)
    where = torch.rand(count, d, generator=generator) < 0.05
    rows[where] = special[torch.randint(len(special), (int(where.sum()),), generator=generator)]
    out = empty_rows(count, d, dtype, "cpu")
    return out.copy_(rows)


def make_terms(sums, seed=0):
    """From a list of [(row, weight), ...]."""
    flat = [term for terms in sums for term in terms]
    return Terms(
        indptr=np.cumsum([0, *map(len, sums)]).astype(np.int64),
        columns=np.array([row for row, _ in flat], np.int64),
        weights=np.array([weight for _, weight in flat], np.float64),
    )


def random_terms(num_out, num_rows, seed=0, degree=4):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, degree + 1, num_out)
    return Terms(
        indptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        columns=rng.integers(0, num_rows, counts.sum()),
        weights=rng.standard_normal(counts.sum()),
    )


def ring_terms(n):
    return make_terms([[(r, 1 / 3), ((r - 1) % n, 1 / 3), ((r + 1) % n, 1 / 3)] for r in range(n)])


def reference(blocks, terms, like, axpy=None, wide=False):
    """The sums in plain torch: one operation, one rounding."""
    table = torch.cat(list(blocks))
    accumulator = torch.float64 if wide or like.dtype == torch.float64 else torch.float32
    out = torch.zeros(like.shape, dtype=accumulator)
    for r, (first, last) in enumerate(pairwise(terms.indptr.tolist())):
        pairs = [(table[terms.columns[t]], terms.weights[t]) for t in range(first, last)]
        if axpy is not None:
            pairs.append((axpy[1][r], axpy[0]))
        products = [row.to(accumulator) * torch.tensor(w, dtype=accumulator) for row, w in pairs]
        if products:
            out[r] = products[0]
            for product in products[1:]:
                out[r] += product
    return out.to(like.dtype)


def same_bits(a, b):
    """Equal to the bit, save that a NaN may have any payload."""
    as_int = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    bits = a.contiguous().view(as_int) == b.contiguous().view(as_int)
    return bool((bits | (a.isnan() & b.isnan())).all())


@pytest.fixture
def threads():
    yield native.use_threads
    native.use_threads(None)


# --- weighted_sum ---------------------------------------------------------------------------------


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weighted_sum_is_the_torch_reference_to_the_bit(dtype, d, wide):
    blocks = [make_rows(5, d, dtype, seed=1), make_rows(4, d, dtype, seed=2)]
    y = make_rows(6, d, dtype, seed=3)
    terms = random_terms(6, 9, seed=4)
    for axpy in (None, (-0.1, y)):
        out = empty_rows(6, d, dtype, "cpu")
        assert weighted_sum(blocks, terms, out, axpy=axpy, wide=wide) is out
        assert same_bits(out, reference(blocks, terms, out, axpy, wide))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d"), [(1, 5000), (6, 130), (300, 1700)])
@pytest.mark.parametrize("graph", ["ring", "random", "all"])
def test_in_place_gives_the_bits_of_out_of_place(graph, n, d, dtype):
    if graph == "all" and n > 10:
        pytest.skip("the reference would take long")
    everyone = [[(q, 1 / n) for q in range(n)] for _ in range(n)]
    terms = {"ring": ring_terms, "random": lambda n: random_terms(n, n), "all": lambda _: everyone}
    terms = terms[graph](n)
    terms = make_terms(terms) if isinstance(terms, list) else terms
    x = make_rows(n, d, dtype)
    expected = weighted_sum([x], terms, empty_rows(n, d, dtype, "cpu"))
    if n < 10:
        assert same_bits(expected, reference([x], terms, x))
    weighted_sum([x], terms, x)
    assert same_bits(x, expected)


@settings(deadline=None, max_examples=100)
@given(
    num_rows=st.integers(1, 12),
    first=st.integers(0, 11),
    count=st.integers(1, 12),
    d=st.sampled_from([1, 3, 64, 100]),
    with_axpy=st.sampled_from(["none", "other", "out", "rows"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_outputs_may_be_any_rows_of_the_table(num_rows, first, count, d, with_axpy, seed):
    first = min(first, num_rows - 1)
    count = min(count, num_rows - first)
    table = make_rows(num_rows, d, torch.float32, seed % 1000)
    out = table[first : first + count]
    y = {
        "other": make_rows(count, d, torch.float32, 5),
        "out": out,
        "rows": table[:count],  # shifted against out: read by one sum, written by another
    }.get(with_axpy)
    axpy = None if y is None else (0.7, y)
    terms = random_terms(count, num_rows, seed)
    expected = reference([table], terms, out, axpy)
    untouched = table.clone()
    weighted_sum([table], terms, out, axpy=axpy)
    assert same_bits(out, expected)
    assert same_bits(table[:first], untouched[:first])
    assert same_bits(table[first + count :], untouched[first + count :])


def test_columns_of_one_allocation_may_be_source_and_output():
    rows = make_rows(5, 200, torch.float32)
    x, z = rows[:, :96], rows[:, 96:192]
    expected = reference([x], ring_terms(5), z, (0.5, z))
    weighted_sum([x], ring_terms(5), z, axpy=(0.5, z))
    assert same_bits(z, expected)


@pytest.mark.parametrize("misaligned", [False, True])
def test_outputs_larger_than_the_caches_are_right(misaligned):
    d = (20 << 20) // 4 + 3
    x, y = torch.arange(d, dtype=torch.float32)[None], torch.full((1, d), 3.0)
    out = torch.zeros(1, d + 1)[:, 1:] if misaligned else torch.zeros(1, d)
    weighted_sum([x, y], make_terms([[(0, 0.25), (1, 1.0)]]), out)
    assert torch.equal(out, x * 0.25 + y)


@pytest.mark.parametrize("graph", [ring_terms, lambda n: random_terms(n, n)])
def test_bits_do_not_depend_on_the_number_of_threads(graph, threads):
    n, d = 64, 50_021
    results = []
    for count in (1, 2, 5, None):
        threads(count)
        x = make_rows(n, d, torch.float32)
        out = weighted_sum([x], graph(n), empty_rows(n, d, torch.float32, "cpu"))
        weighted_sum([x], graph(n), x)
        assert same_bits(x, out)
        results.append(out)
    assert all(same_bits(results[0], r) for r in results[1:])


def test_bits_of_a_row_do_not_depend_on_its_neighbours_in_memory():
    x, y = make_rows(8, 333, torch.float32), make_rows(8, 333, torch.float32, seed=1)
    together = combine([(0.3, x), (0.6, y)])
    for r in range(8):
        assert same_bits(together[r : r + 1], combine([(0.3, x[r : r + 1]), (0.6, y[r : r + 1])]))


_SIGNATURE = """
import hashlib, sys
sys.path.insert(0, {folder!r})
import torch
from test_native import DTYPES, make_rows, random_terms, ring_terms
from gossamer.runtime import native
from gossamer.runtime.rows import empty_rows, row_dot
digest = hashlib.sha256()
for dtype in DTYPES:
    for d in [1, 65, 1000, 20_011]:
        for wide in (False, True):
            x, y = make_rows(9, d, dtype).nan_to_num_(), make_rows(9, d, dtype, 1).nan_to_num_()
            terms = random_terms(9, 9)
            out = native.weighted_sum([x], terms, torch.empty_like(x), axpy=(0.3, y), wide=wide)
            native.weighted_sum([x], ring_terms(9), x, wide=wide)
            for t in (out, x):  # infinities may have met: which NaN comes of it is the hardware's
                t = torch.where(t.isnan(), 0, t).contiguous()
                digest.update(t.view(torch.uint8).numpy().tobytes())
            finite = torch.where(y.isfinite(), y, 1)
            digest.update(row_dot(finite, finite).numpy().tobytes())
print(native.build_info()["instruction_set"], digest.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits():
    found = {}
    for isa in ("baseline", "avx2", "avx512"):
        done = subprocess.run(
            [sys.executable, "-c", _SIGNATURE.format(folder=str(Path(__file__).parent))],
            env={**os.environ, "GOSSAMER_ISA": isa},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        used, digest = done.stdout.split()
        found[used] = digest  # a machine without avx512 falls back to avx2
    assert len(set(found.values())) == 1, found
    assert "baseline" in found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {"blocks": [x.double()]}, "weighted_sum: block: must be"),
        (lambda x: {"blocks": [x[:, ::2]]}, "weighted_sum: block: must be"),
        (lambda x: {"blocks": [x.repeat(1, 2)[:, ::2]]}, "rows must be contiguous"),
        (lambda x: {"blocks": [x.to("meta")]}, "is on meta"),
        (lambda x: {"out": x[:3].clone()}, "4 sums for 3 rows"),
        (lambda x: {"out": x.long()}, "dtype torch.int64 is not one of"),
        (lambda x: {"axpy": (1.0, x[:2])}, "axpy is"),
        (lambda x: {"blocks": [x[:3]]}, "a term names a row outside the table"),
        (lambda x: {"terms": make_terms([[(-1, 1.0)]] * 4)}, "a term names a row outside"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(change, message):
    x = make_rows(4, 16, torch.float32)
    given_ = {"blocks": [x], "terms": ring_terms(4), "out": torch.full((4, 16), 7.0), "axpy": None}
    given_ |= change(x)
    before = given_["out"].clone()
    with pytest.raises(ValueError, match=message):
        weighted_sum(given_["blocks"], given_["terms"], given_["out"], axpy=given_["axpy"])
    assert torch.equal(given_["out"], before)


@pytest.mark.parametrize("shift", [1, 3, 15])
def test_an_output_that_overlaps_a_source_in_part_is_refused(shift):
    rows = torch.zeros(4, 48)
    with pytest.raises(ValueError, match="overlaps a source row in part"):
        weighted_sum([rows[:, :16]], ring_terms(4), rows[:, shift : shift + 16])


def test_terms_must_have_the_right_types():
    with pytest.raises(ValueError, match=r"Terms\.columns: must be contiguous .*int64.* int32"):
        Terms(np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0))


# --- combine --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine_adds_in_the_order_given(dtype):
    x, y, z = (make_rows(3, 77, dtype, seed) for seed in range(3))
    per_row = torch.tensor([[0.5], [-1.5], [0.1]])
    terms = make_terms([[(r, 0.25), (3 + r, float(per_row[r])), (6 + r, -1)] for r in range(3)])
    expected = reference([x, y, z], terms, x)
    assert same_bits(combine([(0.25, x), (per_row, y), (-1, z)]), expected)
    assert same_bits(combine([(0.25, x), (per_row, y), (-1, z)], out=y), expected)


def test_combine_of_numbers_is_combine_of_equal_columns():
    x, y = make_rows(3, 50, torch.float32), make_rows(3, 50, torch.float32, 1)
    column = torch.full((3, 1), 0.3, dtype=torch.float64)
    assert same_bits(combine([(0.3, x), (0.7, y)]), combine([(column, x), (0.7, y)]))


def test_combine_refuses_blocks_of_other_heights():
    with pytest.raises(ValueError, match=r"combine: 2 weights and blocks of \[3, 2\] rows"):
        combine([(1.0, torch.zeros(3, 4)), (1.0, torch.zeros(2, 4))])


# --- row_dot --------------------------------------------------------------------------------------


def lanes_dot(x, y):
    """The order of the additions that row_dot promises, in numpy."""
    x, y = x.double().numpy(), y.double().numpy()
    whole = len(x) // 32 * 32
    lanes = np.zeros(32)
    for i in range(0, whole, 32):
        lanes += x[i : i + 32] * y[i : i + 32]
    half = 16
    while half:
        lanes[:half] += lanes[half : 2 * half]
        half //= 2
    total = lanes[0]
    for i in range(whole, len(x)):
        total += x[i] * y[i]
    return total


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_dot_adds_in_its_fixed_order(dtype, d):
    x = make_rows(4, d, dtype).nan_to_num_(posinf=2.0, neginf=-2.0)
    y = make_rows(4, d, dtype, seed=1).nan_to_num_(posinf=2.0, neginf=-2.0)
    found = row_dot(x, y)
    assert found.shape == (4, 1)
    assert found.dtype == torch.float64
    for r in range(4):
        assert found[r].item() == lanes_dot(x[r], y[r])


def test_row_dot_of_a_row_does_not_depend_on_the_other_rows_or_threads(threads):
    x = torch.randn(50, 20_011, generator=torch.Generator().manual_seed(0))
    together = row_dot(x, x)
    threads(4)
    assert torch.equal(row_dot(x, x), together)
    for r in (0, 7, 49):
        assert torch.equal(row_dot(x[r : r + 1], x[r : r + 1])[0], together[r])


def test_row_norm_neither_overflows_nor_underflows():
    huge, tiny = torch.full((1, 4), 3e38), torch.full((1, 4), 1e-38)
    assert row_norm(huge).item() == pytest.approx(6e38, rel=1e-6)
    assert row_norm(tiny).item() == pytest.approx(2e-38, rel=1e-6)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.zeros(2, 4), "row_dot"),
        (torch.zeros(3, 5), "row_dot: y: must be"),
        (torch.zeros(3, 4, dtype=torch.float64), "row_dot: y: must be"),
    ],
)
def test_row_dot_refuses_what_does_not_fit(y, message):
    with pytest.raises(ValueError, match=message):
        row_dot(torch.zeros(3, 4), y)


# --- the module -----------------------------------------------------------------------------------


def test_build_info_names_the_instruction_set():
    assert native.build_info()["instruction_set"] in ("baseline", "avx2", "avx512")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("m", [0, 1, 2, 1001])
def test_the_triad_adds_a_multiple(m, stream):
    b, c = torch.arange(m, dtype=torch.float64), torch.ones(m, dtype=torch.float64)
    a = torch.full((m,), -1.0, dtype=torch.float64)
    native.triad(a, b, c, 3.0, stream=stream)
    assert torch.equal(a, b + 3)  # integers: exact
    with pytest.raises(ValueError, match="float64"):
        native.triad(a, b, c.float(), 3.0, stream=stream)
