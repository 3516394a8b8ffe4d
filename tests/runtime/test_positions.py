"""Sums over the positions of single examples: squares of outer products, sums, sums of norms."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.runtime import native
from gossamer.runtime.native import gram_roundings, normal_sums, outer_squares, position_sums

UNIT = torch.finfo(torch.float32).eps / 2
SIZES = [1, 2, 3, 4, 5, 7, 13, 64, 65]
WIDTHS = [1, 3, 8, 16, 31, 64, 511, 512, 700]


def examples(m, t, width, *, layout="whole", seed=0):
    """Random numbers (m, t, width), the elements of a position side by side."""
    generator = torch.Generator().manual_seed(seed)
    if layout == "shared":  # one example for all
        return torch.randn(1, t, width, generator=generator).expand(m, t, width)
    if layout == "padded":
        return torch.randn(m + 1, t + 2, width + 5, generator=generator)[1:, 1:-1, 3:-2]
    if layout == "turned":  # positions outside
        return torch.randn(t, m, width, generator=generator).transpose(0, 1)
    return torch.randn(m, t, width, generator=generator)


layouts = st.sampled_from(["whole", "padded", "turned", "shared"])


@settings(deadline=None, max_examples=150)
@given(
    m=st.integers(0, 3),
    t=st.sampled_from(SIZES),
    p=st.sampled_from(WIDTHS),
    q=st.sampled_from(WIDTHS),
    layout=st.tuples(layouts, layouts),
)
def test_squares_are_within_their_bound_of_the_sum_written_down(m, t, p, q, layout):
    a, e = examples(m, t, p, layout=layout[0]), examples(m, t, q, layout=layout[1], seed=1)
    squares, masses = outer_squares(a, e, 0.0)
    exact = torch.einsum("mtq,mtp->mqp", e.double(), a.double()).square().sum((1, 2))
    mass = (a.double().norm(dim=2) * e.double().norm(dim=2)).sum(1)
    roundings = gram_roundings(p) + gram_roundings(q)
    assert ((squares - exact).abs() <= 1.01 * roundings * UNIT * mass.square()).all()
    torch.testing.assert_close(masses, mass, rtol=roundings * UNIT, atol=0)


def test_squares_of_whole_numbers_are_exact_across_blocks_of_positions():
    a, e = [(4 * examples(2, 150, width, seed=width)).round() for width in (1030, 2000)]
    squares, _ = outer_squares(a, e, 0.0)
    exact = torch.einsum("mtq,mtp->mqp", e.double(), a.double()).square().sum((1, 2))
    assert torch.equal(squares, exact)


def test_inner_products_are_rounded_less_often_than_they_have_elements():
    for width in (64, 512, 10_000):
        assert gram_roundings(width) <= min(width, 512) / 4 + 3
    assert gram_roundings(1) >= 1


def test_short_positions_count_as_long_as_the_floor():
    a, e = torch.zeros(1, 3, 5), torch.zeros(1, 3, 7)
    a[0, 0, 0], e[0, 0, 0], e[0, 1, 1] = 3.0, 2.0, 4.0
    squares, masses = outer_squares(a, e, 0.5)
    assert squares.tolist() == [36.0]
    assert masses.tolist() == [3 * 2 + 0.5 * 4 + 0.5 * 0.5]


def test_an_example_that_is_not_finite_leaves_the_others_alone():
    a, e = examples(3, 9, 40), examples(3, 9, 24, seed=1)
    clean, _ = outer_squares(a, e, 0.0)
    a[1, 4, 7] = torch.nan
    squares, _ = outer_squares(a, e, 0.0)
    assert torch.isnan(squares).tolist() == [False, True, False]
    assert torch.equal(squares[[0, 2]], clean[[0, 2]])


@settings(deadline=None, max_examples=100)
@given(m=st.integers(0, 3), t=st.integers(0, 9), width=st.sampled_from(WIDTHS), layout=layouts)
def test_positions_are_added_in_order_and_their_lengths_too(m, t, width, layout):
    e = examples(m, t, width, layout=layout)
    sums, masses = position_sums(e)
    expected = torch.zeros(m, width)
    for k in range(t):
        expected += e[:, k]
    assert torch.equal(sums, expected)
    lengths = e.double().norm(dim=2)
    torch.testing.assert_close(masses, lengths.sum(1), rtol=width * UNIT, atol=0)


@pytest.mark.parametrize("centred", [True, False], ids=["layer norm", "rms norm"])
@settings(deadline=None, max_examples=60)
@given(
    m=st.integers(0, 3),
    t=st.integers(0, 9),
    width=st.sampled_from(WIDTHS),
    layout=st.tuples(layouts, layouts),
)
def test_sums_of_norms_are_those_of_torch_in_float64(centred, m, t, width, layout):
    a = 3 * examples(m, t, width, layout=layout[0]) + 1
    e = examples(m, t, width, layout=layout[1], seed=1)
    norm = F.layer_norm if centred else F.rms_norm
    products = e.double() * norm(a.double(), (width,), eps=1e-3)
    (scale, scale_mass), (shift, shift_mass) = normal_sums(a, e, eps=1e-3, centred=centred)
    # Norms are of size 1, and off by some roundings of a mean of elements of size 4.
    torch.testing.assert_close(scale, products.sum(1).float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(scale_mass, products.norm(dim=2).sum(1), rtol=1e-5, atol=1e-4)
    sums, masses = position_sums(e)
    assert torch.equal(shift, sums)
    assert torch.equal(shift_mass, masses)


def test_bits_depend_neither_on_threads_nor_on_the_other_examples():
    a, e = examples(40, 65, 200), examples(40, 65, 200, seed=1)

    def all_of(a, e):
        (scale, scale_mass), (shift, shift_mass) = normal_sums(a, e, eps=1e-5, centred=True)
        squares, masses = outer_squares(a, e, 0.0)
        return [squares, masses, *position_sums(e), scale, scale_mass, shift, shift_mass]

    found = []
    try:
        for threads in (1, 3):
            native.use_threads(threads)
            found.append(all_of(a, e))
    finally:
        native.use_threads(None)
    for one, three, alone in zip(*found, all_of(a[17:18], e[17:18]), strict=True):
        assert torch.equal(one, three)
        assert torch.equal(one[17:18], alone)


WHOLE = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    "wrong",
    [WHOLE[0], WHOLE.double(), WHOLE.half(), torch.zeros(2, 4, 3).mT, WHOLE.to("meta")],
    ids=["two axes", "float64", "float16", "turned", "elsewhere"],
)
def test_what_the_kernels_cannot_read_is_refused(wrong):
    message = r"must be \(m, t, width\) float32 on the CPU, the elements of a position side by side"
    for call in (
        lambda: outer_squares(wrong, WHOLE, 0.0),
        lambda: outer_squares(WHOLE, wrong, 0.0),
        lambda: position_sums(wrong),
        lambda: normal_sums(wrong, WHOLE, eps=0.0, centred=True),
        lambda: normal_sums(WHOLE, wrong, eps=0.0, centred=True),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_examples_and_positions_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"a is \(2, 3, 4\), e \(2, 2, 4\)"):
        outer_squares(WHOLE, torch.zeros(2, 2, 4), 0.0)
    with pytest.raises(ValueError, match=r"a is \(2, 3, 4\), e \(2, 3, 5\)"):
        normal_sums(WHOLE, torch.zeros(2, 3, 5), eps=0.0, centred=True)
