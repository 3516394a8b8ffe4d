"""The accountants against published figures, the exact Gaussian, and what a run must state."""

from __future__ import annotations

import json
import math
import sys
from importlib.util import find_spec

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.algorithms.privacy.accounting import (
    Segment,
    accountant_version,
    calibrate,
    check_delta,
    default_delta,
    resolve,
    spent,
)
from gossamer.algorithms.privacy.exact_gaussian import gaussian_delta, gaussian_epsilon, gaussian_mu
from gossamer.algorithms.privacy.statement import PrivacyStatement
from gossamer.runtime.errors import ConfigError

DELTA = 1e-5
# Figures of Opacus 1.6.0 and of dp_accounting 0.6.0 (PLD: optimal composition on a fine grid).
ROWS = [
    # noise, rate, steps, RDP, PRV, PLD
    (1.0, 0.01, 1000, 2.1014, 1.8384, 1.828),
    (2.0, 0.5, 100, 15.3925, 14.2951, 14.284),
    (0.5, 0.001, 100, 3.5981, 2.1191, 2.109),
]
TWO = [Segment(1.0, 0.01, 1000), Segment(2.0, 0.1, 100)]  # PLD: 2.9903
LIGHT = Segment(1.0, 0.01, 10)


needs_opacus = pytest.mark.skipif(find_spec("opacus") is None, reason="the extra 'privacy'")


# --- figures --------------------------------------------------------------------------------


@needs_opacus
@pytest.mark.parametrize(("noise", "rate", "steps", "rdp", "prv", "pld"), ROWS)
def test_both_accountants_give_the_published_epsilon(noise, rate, steps, rdp, prv, pld):
    history = [Segment(noise, rate, steps)]
    by_rdp, by_prv = spent(history, DELTA, "rdp"), spent(history, DELTA)
    assert by_rdp == pytest.approx(rdp, abs=1e-3)
    assert by_prv == pytest.approx(prv, abs=1e-3)
    # PRV promises an upper bound within 0.01 (its eps_error) of an estimate good to 1e-3.
    assert pld < by_prv < pld + 0.012 < by_rdp


@needs_opacus
def test_two_segments_cost_more_than_each_and_less_than_their_sum():
    whole = spent(TWO, DELTA)
    assert whole == pytest.approx(3.0005, abs=1e-3)
    parts = [spent([segment], DELTA) for segment in TWO]
    assert max(parts) < whole < sum(parts)
    assert whole < spent(TWO, DELTA, "rdp")


@needs_opacus
def test_sampled_and_full_steps_compose():
    history = [Segment(1.0, 0.01, 1000), Segment(20.62, 1, 30)]
    assert spent(history, DELTA) == pytest.approx(2.1239, abs=1e-3)
    assert spent(history, DELTA) < spent(history, DELTA, "rdp")


@needs_opacus
@pytest.mark.parametrize("history", [TWO, [Segment(2.0, 0.9, 20)]])
def test_prv_lies_at_most_its_own_error_above_another_librarys_composition(history):
    pld = pytest.importorskip("dp_accounting.pld")
    from dp_accounting import dp_event

    other = pld.PLDAccountant()
    for s in history:
        gaussian = dp_event.GaussianDpEvent(s.noise_multiplier)
        other.compose(dp_event.PoissonSampledDpEvent(s.rate, gaussian), s.steps)
    # 0.012: eps_error 0.01 and the grid of the other.
    assert 0 < spent(history, DELTA) - other.get_epsilon(DELTA) < 0.012


@needs_opacus
@pytest.mark.parametrize(
    ("accountant", "epsilon", "noise"),
    [
        ("prv", 0.5, 18.44),
        ("prv", 2, 5.20),
        ("rdp", 0.5, 19.69),
        ("rdp", 1, 10.39),
        ("rdp", 2, 5.59),
        ("rdp", 4, 3.10),
    ],
)
def test_calibration_gives_the_published_noise(accountant, epsilon, noise):
    found = calibrate(epsilon, DELTA, 256 / 1437, 200, accountant)
    assert found == pytest.approx(noise, abs=5.1e-3)  # published to two digits
    used = spent([Segment(found, 256 / 1437, 200)], DELTA, accountant)
    assert epsilon - 0.01 <= used <= epsilon


@needs_opacus
def test_equal_steps_cost_the_same_in_however_many_segments_and_whatever_order():
    a, b = Segment(1.0, 0.01, 5), Segment(2.0, 0.02, 3)
    apart = [a, b, a, Segment(3.0, 0.0, 4), Segment(2.0, 0.02, 0)]
    for accountant in ("prv", "rdp"):
        together = spent([b, Segment(1.0, 0.01, 10)], DELTA, accountant)
        assert spent(apart, DELTA, accountant) == together


# --- full batches ---------------------------------------------------------------------------


@needs_opacus
def test_full_batches_are_accounted_for_exactly_by_default():
    history = [Segment(20.62, 1, 30)]
    assert resolve(history) == "gaussian"
    assert spent(history, DELTA) == pytest.approx(0.99007, abs=1e-5)
    assert spent(history, DELTA, "rdp") == pytest.approx(1.0816, abs=1e-3)
    assert spent([Segment(20.62, 1, 10), Segment(20.62 * 2, 1, 80)], DELTA) == pytest.approx(
        spent(history, DELTA), rel=1e-9
    )


@pytest.mark.parametrize(
    ("epsilon", "noise"), [(0.5, 38.515), (1, 20.434), (2, 10.921), (4, 5.922), (8, 3.288)]
)
def test_exact_calibration_spends_its_budget_to_the_last_digit(epsilon, noise):
    found = calibrate(epsilon, DELTA, 1, 30)
    assert found == pytest.approx(noise, abs=1e-3)
    assert epsilon * (1 - 1e-8) <= spent([Segment(found, 1, 30)], DELTA) <= epsilon


@settings(deadline=None)
@given(
    mu=st.floats(1e-3, 50),
    delta=st.floats(-250, -1e-3).map(math.exp),
)
def test_exact_epsilon_is_the_least_that_holds(mu, delta):
    epsilon = gaussian_epsilon(mu, delta)
    # 1e-9: rounding of the formula itself, which subtracts logarithms of size epsilon.
    assert gaussian_delta(epsilon, mu) <= delta * (1 + 1e-9)
    if epsilon > 1e-6:
        assert gaussian_delta(epsilon * (1 - 1e-5), mu) > delta
        assert gaussian_mu(epsilon, delta) == pytest.approx(mu, rel=1e-5)


@given(epsilon=st.floats(0, 20), mu=st.floats(1e-2, 20))
def test_exact_delta_is_the_textbook_formula(epsilon, mu):
    def phi(x):
        return math.erfc(-x / math.sqrt(2)) / 2

    plain = phi(mu / 2 - epsilon / mu) - math.exp(epsilon) * phi(-mu / 2 - epsilon / mu)
    # 1e-14: the plain difference cancels.
    assert gaussian_delta(epsilon, mu) == pytest.approx(plain, rel=1e-6, abs=1e-14)


# --- edges and refusals ---------------------------------------------------------------------


@needs_opacus
def test_nothing_looked_at_costs_nothing_and_no_noise_costs_everything():
    for accountant in ("prv", "rdp", "gaussian"):
        assert spent([], DELTA, accountant) == 0
        assert spent([Segment(1.0, 0.0, 9), Segment(0.0, 1.0, 0)], DELTA, accountant) == 0
    for accountant in ("prv", "rdp"):
        assert spent([LIGHT, Segment(0.0, 0.5, 1)], DELTA, accountant) == math.inf
    assert spent([Segment(1000.0, 0.01, 1)], 0.1) == 0  # where Opacus reports -0.095


def test_the_central_limit_accountant_is_refused_with_the_reason():
    for call in (
        lambda: spent([LIGHT], DELTA, "gdp"),
        lambda: calibrate(1.0, DELTA, 0.1, 10, "gdp"),
        lambda: accountant_version("gdp"),
    ):
        with pytest.raises(ConfigError, match=r"accountant: gdp .* no bound.*use prv, or rdp"):
            call()


def test_unknown_accountants_are_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="accountant: unknown 'prw'; did you mean 'prv'"):
        spent([LIGHT], DELTA, "prw")


def test_the_exact_accountant_is_refused_for_sampled_batches():
    with pytest.raises(ConfigError, match=r"accountant: gaussian .* rate 0.01; use prv"):
        spent([LIGHT, Segment(1.0, 1, 3)], DELTA, "gaussian")


@needs_opacus
@pytest.mark.parametrize(
    ("segment", "delta", "message"),
    [
        # Opacus gives 3.914 for 3.920 there, and 4.15 for 4.29 at 1e-13.
        (Segment(1.0, 0.01, 1000), 1e-12, "delta: 1e-12 is below what accountant prv"),
        (Segment(0.05, 0.5, 10), DELTA, "accountant: prv would need a grid"),  # infinity in Opacus
        (Segment(0.3, 0.5, 100_000), DELTA, "accountant: prv would need a grid"),  # 450 GiB
    ],
)
def test_prv_refuses_what_it_cannot_compute_and_names_rdp(segment, delta, message):
    with pytest.raises(ConfigError, match=f"{message}.*use accountant: rdp"):
        spent([segment], delta)
    assert math.isfinite(spent([segment], delta, "rdp"))


@needs_opacus
def test_a_numerical_failure_is_an_error_and_not_another_figure(monkeypatch):
    from opacus.accountants import PRVAccountant

    def fail(self, delta, **kwargs):
        raise RuntimeError("Discrete mean differs")

    monkeypatch.setattr(PRVAccountant, "get_epsilon", fail)
    message = r"prv failed on .*\(1, 0.01, 10\).*Discrete mean.*use accountant: rdp"
    with pytest.raises(ConfigError, match=message):
        spent([LIGHT], DELTA)
    monkeypatch.setattr(PRVAccountant, "get_epsilon", lambda self, delta, **kwargs: math.nan)
    with pytest.raises(ConfigError, match=r"came out as nan; use accountant: rdp"):
        spent([LIGHT], DELTA)


@needs_opacus
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, DELTA, 0.01, 100), "epsilon: 0.0 must be"),
        ((1.0, 0.0, 0.01, 100), "delta: 0.0 must lie between 0 and 1"),
        ((1.0, 1.0, 1, 100), "delta: 1.0 must lie between 0 and 1"),
        ((1.0, DELTA, 1.5, 100), "rate: 1.5 is no probability"),
        ((1.0, DELTA, 0.0, 100), "no noise is needed"),
        ((1.0, DELTA, 0.01, 0), "no noise is needed"),
        ((0.005, DELTA, 0.01, 100), "prv reports at least 0.00999"),
        ((0.05, DELTA, 0.01, 100, "rdp"), "rdp reports at least 0.1029 .* use prv"),
        ((900.0, DELTA, 0.01, 100), "grid .*use accountant: rdp"),
        ((1.0, DELTA, 0.01, 100, "gaussian"), "rate 0.01; use prv"),
        ((1.0, DELTA, 0.01, 100, "prv", 0.0), "tolerance: 0.0 must be above 0"),
    ],
)
def test_impossible_budgets_are_refused_with_the_way_out(arguments, message):
    with pytest.raises(ConfigError, match=message):
        calibrate(*arguments)


@pytest.mark.parametrize(
    "segment", [(-1.0, 0.1, 1), (math.nan, 0.1, 1), (1, -0.1, 1), (1, 0.1, -1)]
)
def test_segments_that_no_mechanism_has_are_refused(segment):
    with pytest.raises(ConfigError):
        Segment(*segment)


def test_delta_must_be_below_one_over_the_number_of_examples():
    check_delta(0.99 / 1437, 1437)
    for delta in (1 / 1437, 1e-3, 0.0, math.nan):
        with pytest.raises(ConfigError, match="delta: "):
            check_delta(delta, 1437)
    with pytest.raises(ConfigError, match=r"1 / 1437: .*use 1437\^-1.1 = 0.000336"):
        check_delta(1e-3, 1437)
    assert default_delta(1437) == pytest.approx(1437**-1.1)
    check_delta(default_delta(2), 2)
    with pytest.raises(ConfigError, match="delta: 1 examples"):
        default_delta(1)


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus.accountants.utils", None)
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(ConfigError, match=r"needs opacus .*install gossamer\[privacy\]"):
        spent([LIGHT], DELTA)
    assert spent([Segment(20.62, 1, 30)], DELTA) < 1  # exact without it


@needs_opacus
def test_the_accountant_is_reported_with_its_version():
    import opacus

    assert accountant_version() == f"PRV, opacus {opacus.__version__}"
    assert accountant_version("rdp").startswith("RDP, opacus ")
    assert accountant_version("gaussian").startswith("exact Gaussian")


# --- statement ------------------------------------------------------------------------------


def statement(**changes):
    fields = {
        "epsilon": 1.84,
        "epsilon_target": 2.0,
        "delta": DELTA,
        "accountant": "PRV, opacus 1.6.0",
        "unit": "example",
        "examples": 1437,
        "sampler": "poisson",
        "noise_multiplier": 1.0,
        "rate": 0.01,
        "steps": 1000,
        "clip": "flat",
        "clip_norm": 1.0,
        "noise_mode": "split",
        "ranks": 4,
        "filter": {"name": "doppler", "kind": "ema", "beta": 0.9, "rho_inf": 1 / 19},
    }
    return PrivacyStatement(**(fields | changes)).as_dict()


def test_a_statement_names_everything_a_reader_needs():
    shown = statement()
    assert shown["private"]
    assert shown["reservations"] == []
    assert shown["epsilon"] == 1.84
    assert shown["neighbors"] == "add or remove one"
    assert "1/4 of the noise variance" in shown["trust"]
    assert "must not be published" in shown["seeds"]
    assert shown["filter"]["rho_inf"] == 1 / 19
    assert "segments" not in shown
    json.dumps(shown, allow_nan=False)


def test_seeded_noise_is_not_private():
    shown = statement(noise_seeded=True)
    assert not shown["private"]
    assert shown["reservations"][0].startswith("NOT PRIVATE: noise_seed")
    assert "epsilon" not in shown


def test_shuffled_batches_are_never_called_private():
    shown = statement(sampler="shuffle")
    assert not shown["private"]
    assert "accounting: shuffled-approx" in shown["reservations"][0]
    assert "epsilon" not in shown
    assert "epsilon_approx" in shown


def test_steps_without_noise_are_not_private():
    shown = statement(epsilon=math.inf, noise_multiplier=0.0)
    assert not shown["private"]
    assert shown["epsilon"] == "infinite"
    json.dumps(shown, allow_nan=False)


@pytest.mark.parametrize("mode", ["split", "rank0", "replicated", "local", "pairwise"])
def test_each_noise_mode_has_its_own_trust_model(mode):
    trust = statement(noise_mode=mode)["trust"]
    central = mode in ("split", "rank0", "replicated")
    assert ("All ranks and the network between them are trusted" in trust) == central
    assert statement(noise_mode=mode, ranks=1)["trust"].startswith("One rank")


def test_several_segments_are_listed():
    shown = statement(segments=((1.0, 0.01, 500), (2.0, 0.01, 500)))
    assert shown["segments"][1] == {"noise_multiplier": 2.0, "rate": 0.01, "steps": 500}


def test_ranks_that_answer_for_themselves_are_listed():
    shown = statement(noise_mode="local", epsilon=math.inf, epsilon_per_rank=(1.0, math.inf))
    assert shown["epsilon_per_rank"] == [1.0, "infinite"]
    assert "epsilon_per_rank" not in statement()
