"""Strategies of correlated noise against dense matrices, and the noise step by step."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import toeplitz

from gossamer.algorithms.privacy.accounting import Segment
from gossamer.algorithms.privacy.noise_strategies import (
    StreamingNoise,
    amplified_history,
    banded,
    inverse_coefficients,
    sqrt_toeplitz,
)
from gossamer.runtime.errors import ConfigError

T = 64
EIGHT = [0.676678, 0.397713, 0.323760, 0.283046, 0.254409, 0.231377, 0.210888, 0.190427]

strategies = st.builds(
    lambda first, rest: [first, *rest],
    st.floats(0.5, 2),
    st.lists(st.floats(-0.4, 0.4), max_size=5),
)


def dense(coefficients, steps):
    """K, (steps, steps) float64."""
    column = np.zeros(steps)
    column[: len(coefficients)] = coefficients[:steps]
    return toeplitz(column, np.zeros(steps))


def errors(coefficients, steps):
    """Variances of the prefix sums of the noise, |row t of A K^-1|^2, for white noise of 1."""
    rows = np.tril(np.ones((steps, steps))) @ np.linalg.inv(dense(coefficients, steps))
    return np.square(rows).sum(axis=1)


def streamed(coefficients, z):
    """Feed z (steps, local, d) step by step; returns the noise of each."""
    noise = StreamingNoise(coefficients, z[0])
    return torch.stack([noise.correlate_(row.clone()).clone() for row in z])


# --- strategies -----------------------------------------------------------------------------


def test_the_square_root_squares_to_prefix_sums_and_has_the_published_error():
    k = sqrt_toeplitz(T)
    np.testing.assert_allclose(dense(k, T) @ dense(k, T), np.tril(np.ones((T, T))), atol=1e-13)
    assert k @ k == pytest.approx(2.38885, abs=5e-6)
    assert errors(k, T).max() == pytest.approx(2.38885, abs=5e-6)


def test_the_square_roots_inverse_is_its_difference():
    k = sqrt_toeplitz(T)
    np.testing.assert_allclose(inverse_coefficients(k, T), np.diff(k, prepend=0.0), atol=1e-14)


def test_eight_bands_reach_the_published_optimum():
    k = banded(T, 8)
    np.testing.assert_allclose(k, EIGHT, atol=2e-6)
    assert k @ k == pytest.approx(1, rel=1e-14)
    assert errors(k, T).mean() == pytest.approx(7.0968, abs=5e-5)
    assert errors(k, T).max() == pytest.approx(11.882, abs=5e-4)


def test_one_band_is_independent_noise():
    np.testing.assert_array_equal(banded(T, 1), [1.0])


@pytest.mark.parametrize("steps", [1, 2, 9, 200])
def test_more_bands_have_less_error(steps):
    bands = sorted({1, min(2, steps), min(5, steps), min(20, steps), steps})
    means = [errors(banded(steps, b), steps).mean() for b in bands]
    assert means == sorted(means, reverse=True)


@pytest.mark.parametrize("bands", [2, 5])
def test_no_neighbor_of_the_optimum_is_better(bands):
    k = banded(30, bands)
    least = errors(k, 30).mean()
    for j in range(1, bands):
        for change in (-1e-3, 1e-3):
            other = k.copy()
            other[j] += change
            assert errors(other, 30).mean() * (other @ other) > least


@given(k=strategies, steps=st.integers(1, 20))
def test_the_inverse_is_that_of_the_dense_matrix(k, steps):
    np.testing.assert_allclose(
        inverse_coefficients(k, steps), np.linalg.inv(dense(k, steps))[:, 0], atol=1e-9
    )


# --- sensitivity and accounting -------------------------------------------------------------


@pytest.mark.parametrize("bands", [1, 2, 4])
def test_participations_the_bands_apart_cost_the_norm_of_a_column_each(bands):
    steps = 12
    columns = dense(banded(steps, bands), steps)
    worst = max(
        np.square(columns[:, list(taken)].sum(axis=1)).sum()
        for taken in combinations(range(steps), 3)
        if all(b - a >= bands for a, b in pairwise(taken))
    )
    assert worst == pytest.approx(3, rel=1e-12)


def test_blocks_in_turn_are_fewer_steps_at_a_higher_rate():
    assert amplified_history(2.0, 0.01, 64, 8) == (Segment(2.0, 0.08, 8),)
    assert amplified_history(2.0, 0.01, 65, 8) == (Segment(2.0, 0.08, 9),)  # the first block's
    assert amplified_history(2.0, 0.01, 64, 1) == (Segment(2.0, 0.01, 64),)
    assert amplified_history(2.0, 1 / 49, 98, 49)[0].rate == pytest.approx(1, abs=1e-12)
    with pytest.raises(ConfigError, match=r"bands: 8 blocks with rate 0.2 .*use 5 bands or fewer"):
        amplified_history(1.0, 0.2, 64, 8)


@pytest.mark.parametrize("coefficients", [[], [0.0, 1.0], [1.0, np.nan], [0.0]])
def test_coefficients_without_an_inverse_are_refused(coefficients):
    with pytest.raises(ConfigError, match="coefficients: "):
        StreamingNoise(coefficients, torch.zeros(1, 3))


@pytest.mark.parametrize("call", [lambda: banded(8, 9), lambda: banded(8, 0), lambda: banded(0, 1)])
def test_counts_out_of_range_are_refused(call):
    with pytest.raises(ConfigError, match="must lie between 1 and"):
        call()


# --- streaming ------------------------------------------------------------------------------


@settings(deadline=None)
@given(k=strategies, steps=st.integers(1, 12), local=st.integers(1, 3), d=st.integers(1, 5))
def test_the_strategy_times_the_noise_is_the_white_noise(k, steps, local, d):
    z = torch.randn(steps, local, d, dtype=torch.float64)
    noise = streamed(k, z)
    back = dense(k, steps) @ noise.reshape(steps, -1).numpy()
    np.testing.assert_allclose(back, z.reshape(steps, -1).numpy(), atol=1e-9)


def test_float32_noise_follows_the_exact_noise_over_many_steps():
    torch.manual_seed(0)
    z = torch.randn(500, 1, 33)
    exact = streamed(banded(500, 16), z.double())
    # 1e-5: the inverse's coefficients sum to less than 10, and each step rounds at 6e-8.
    torch.testing.assert_close(streamed(banded(500, 16), z).double(), exact, rtol=0, atol=1e-5)


def test_prefix_sums_of_the_noise_have_the_stated_variance():
    torch.manual_seed(0)
    k = banded(T, 8)
    sums = streamed(k, torch.randn(T, 1, 40_000)).cumsum(0)
    variances = sums.double().var(dim=-1)
    # 40000 samples: one standard error is 0.7%.
    assert float(variances[-1, 0]) == pytest.approx(errors(k, T)[-1], rel=0.03)
    assert float(variances.mean()) == pytest.approx(errors(k, T).mean(), rel=0.03)


def test_the_noise_overwrites_its_input():
    noise = StreamingNoise([2.0, 1.0], torch.zeros(1, 3))
    z = torch.full((1, 3), 4.0)
    assert noise.correlate_(z) is z
    assert z.tolist() == [[2.0] * 3]
    assert noise.correlate_(torch.zeros(1, 3)).tolist() == [[-1.0] * 3]
    assert z.tolist() == [[2.0] * 3]
    assert StreamingNoise([2.0], z).correlate_(z).tolist() == [[1.0] * 3]


def test_the_bits_of_a_row_do_not_depend_on_the_rows_beside_it():
    z = torch.randn(6, 3, 37, generator=torch.Generator().manual_seed(1))
    k = banded(6, 4)
    together = streamed(k, z)
    for row in range(3):
        assert torch.equal(streamed(k, z[:, row : row + 1]), together[:, row : row + 1])


def test_parts_of_a_noise_may_be_correlated_apart():
    z = torch.randn(8, 4, 10, dtype=torch.float64)
    k = banded(8, 3)
    torch.testing.assert_close(
        streamed(k, z).sum(1, keepdim=True), streamed(k, z.sum(1, keepdim=True))
    )


@pytest.mark.parametrize("stop", [0, 1, 3, 7])
def test_a_resumed_noise_goes_on_bit_for_bit(stop):
    z = torch.randn(10, 2, 5, generator=torch.Generator().manual_seed(2))
    k = banded(10, 4)
    whole = streamed(k, z)
    before = StreamingNoise(k, z[0])
    for row in z[:stop]:
        before.correlate_(row.clone())
    saved = {key: block.clone() for key, block in before.state_dict().items()}
    assert {block.shape for block in saved.values()} == {(2, 5)}
    assert len(saved) == 3
    after = StreamingNoise(k, z[0])
    after.load_state_dict(saved)
    for t in range(stop, 10):
        assert torch.equal(after.correlate_(z[t].clone()), whole[t])


def test_a_state_of_other_bands_or_rows_is_refused():
    noise = StreamingNoise(banded(10, 4), torch.zeros(2, 5))
    for other in (
        StreamingNoise(banded(10, 3), torch.zeros(2, 5)),
        StreamingNoise(banded(10, 4), torch.zeros(1, 5)),
    ):
        with pytest.raises(ValueError, match="resume with the bands"):
            noise.load_state_dict(other.state_dict())
