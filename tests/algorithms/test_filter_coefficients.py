"""Linear filters as numbers: responses, variance gains, and what is refused."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import signal

from gossamer.algorithms.privacy.filter_coefficients import (
    Coefficients,
    bilinear,
    butter2,
    cheby_default,
    ema,
    none,
)

NAMED = {
    "none": (none(), 1.0),
    "ema .9": (ema(0.9), 0.0526),
    "ema .5": (ema(0.5), 0.3333),
    "bilinear .9": (bilinear(0.9), 0.05),
    "butter2 .1": (butter2(0.1), 0.1097),
    "cheby_default": (cheby_default(), 0.0712),
}


@st.composite
def stable(draw):
    """Return a filter with poles of modulus up to .95, none of whose gains vanishes."""
    poles = []
    for _ in range(draw(st.integers(0, 2))):
        modulus, angle = draw(st.floats(0, 0.95)), draw(st.floats(0, np.pi))
        poles += [modulus * np.exp(1j * angle), modulus * np.exp(-1j * angle)]
    if draw(st.booleans()):
        poles.append(draw(st.floats(-0.95, 0.95)))
    b = draw(st.lists(st.floats(0.1, 1), min_size=1, max_size=4))
    found = Coefficients(tuple(np.atleast_1d(np.poly(poles)).real[1:].tolist()), tuple(b))
    assume(np.abs(found.gains(60)).min() > 1e-6)
    return found


def impulse(count):
    return np.eye(1, count)[0]


@settings(max_examples=60, deadline=None)
@given(stable())
def test_the_impulse_response_is_scipys(found):
    theirs = signal.lfilter(found.b, [1, *found.a], impulse(60))
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(found.impulse_response(60), theirs, rtol=0, atol=1e-12 * scale)


@settings(max_examples=60, deadline=None)
@given(stable())
def test_gains_and_variance_gains_follow_from_the_impulse_response(found):
    h = found.impulse_response(60)
    c, rho = found.gains(60), found.variance_gains(60)
    np.testing.assert_allclose(c, np.cumsum(h), rtol=0, atol=1e-12 * np.abs(h).sum())
    # rho * c^2 and not rho: where c is small, its rounding is magnified
    np.testing.assert_allclose(rho * c**2, np.cumsum(h**2), rtol=1e-9, atol=0)
    assert rho[0] == 1


@settings(max_examples=60, deadline=None)
@given(stable())
def test_the_limit_of_the_variance_gain_is_that_of_the_sums(found):
    h = found.impulse_response(1200)  # .95^1200 = 2e-27
    limit = (h**2).sum() / h.sum() ** 2
    assert found.rho_inf == pytest.approx(limit, rel=1e-7)


@pytest.mark.parametrize("name", NAMED)
def test_a_named_filter_has_the_variance_gain_of_the_table(name):
    found, rho = NAMED[name]
    assert found.rho_inf == pytest.approx(rho, abs=5.1e-5)


@pytest.mark.parametrize("found", [butter2(0.1), butter2(0.5), cheby_default()])
def test_order_two_has_its_closed_form(found):
    (a1, a2), (b0, b1, b2) = found.a, found.b
    e = 1 + a2
    sums = (b0 * b0 + b1 * b1 + b2 * b2, 2 * (b0 * b1 + b1 * b2), 2 * b0 * b2)
    top = sums[0] * e - sums[1] * a1 + sums[2] * (a1 * a1 - a2 * e)
    squares = top / ((1 - a2 * a2) * e - (a1 - a1 * a2) * a1)
    # the poles of the last lie within .008 of the circle: both forms cancel to about 1e-10
    assert found.rho_inf * found.dc_gain**2 == pytest.approx(squares, rel=1e-9)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.9, 0.99])
def test_a_moving_average_has_its_closed_form(beta):
    t = np.arange(200)
    rho = (1 - beta) / (1 + beta) * (1 + beta ** (t + 1)) / (1 - beta ** (t + 1))
    np.testing.assert_allclose(ema(beta).variance_gains(200), rho, rtol=1e-12)


def test_a_moving_average_of_nine_tenths_has_the_figures_of_the_table():
    rho = ema(0.9).variance_gains(21)
    np.testing.assert_allclose(rho[[0, 1, 5, 20]], [1, 0.50139, 0.17202, 0.06556], atol=5e-6)


@pytest.mark.parametrize("cutoff", [0.02, 0.1, 0.5, 0.9])
def test_butterworth_is_scipys(cutoff):
    b, a = signal.butter(2, cutoff)
    np.testing.assert_allclose(butter2(cutoff).b, b, rtol=1e-9)
    np.testing.assert_allclose(butter2(cutoff).a, a[1:], rtol=1e-9, atol=1e-12)


def test_the_released_codes_default_rings():
    found = cheby_default()
    c = found.gains(1000)
    assert found.radius == pytest.approx(0.9927, abs=5e-5)
    assert found.dc_gain == pytest.approx(0.3162, abs=5e-5)
    assert c.argmax() == 69
    np.testing.assert_allclose(c[[69, 139]], [0.506, 0.202], atol=5e-4)
    assert found.rings(200)
    assert not found.rings(1000)
    assert not ema(0.9).rings(10)
    assert not butter2(0.1).rings(200)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((-1.0,), (1.0,), "unstable: its largest pole has modulus 1,"),
        ((0.5, -1.2), (1.0,), "unstable"),
        ((1.0, -0.9), (0.1,), "leave out the leading a_0"),
        ((-0.9,), (), "b_0 must not be 0"),
        ((-0.9,), (0.0, 0.1), "b_0 must not be 0"),
        ((-0.9,), (1.0, -1.0), "answers a constant by 0"),
        ((-0.9,), (float("nan"),), "must be finite"),
    ],
)
def test_a_filter_that_cannot_serve_is_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        Coefficients(a, b)


def test_the_fix_offered_for_an_unstable_filter_is_one():
    with pytest.raises(ValueError, match=r"r < 0\.8333"):
        Coefficients((-1.2,))
    assert Coefficients((-1.2 * 0.8333,)).radius < 1


def test_a_gain_that_vanishes_on_the_way_is_found_within_the_run():
    found = Coefficients((), (1.0, -1.0, 1.0))  # c = 1, 0, 1, 1, ...
    found.require_gain(1)
    for calls in (2, 100, None):
        with pytest.raises(ValueError, match="is 0 at call 1"):
            found.require_gain(calls)
