"""CECA: exact averages in ceil(log2 n) rounds of one message, for any n."""

import numpy as np
import pytest

from gossamer.topologies import TopologyParameterError, ceca_average, ceca_rounds


@pytest.mark.parametrize("one_port", [False, True])
def test_ceca_is_exact_for_every_n(one_port):
    for n in range(1, 70):
        if one_port and n > 1 and n % 2:
            continue
        rounds = ceca_rounds(n, one_port=one_port)
        assert len(rounds) == (n - 1).bit_length()
        x = np.random.default_rng(n).standard_normal((n, 3))
        averaged = ceca_average(x, one_port=one_port)
        np.testing.assert_allclose(averaged, np.tile(x.mean(0), (n, 1)), rtol=0, atol=1e-12)


def test_sums_of_whole_numbers_come_out_to_the_bit():
    n = 43
    s, t = np.arange(n), np.zeros(n, np.int64)
    for round_ in ceca_rounds(n):
        message = (s if round_.buffer == "S" else t)[round_.sources]
        s, t = s + message, t + message
    assert np.all(s == n * (n - 1) // 2)
    np.testing.assert_array_equal(t, s - np.arange(n))


@pytest.mark.parametrize("n", [2, 5, 6, 24, 33])
def test_each_rank_sends_to_one_and_receives_from_another(n):
    for round_ in ceca_rounds(n):
        assert sorted(round_.sources) == list(range(n))
        np.testing.assert_array_equal(round_.sources[round_.targets()], np.arange(n))
        assert np.all(round_.sources != np.arange(n))


@pytest.mark.parametrize("n", [2, 6, 24])
def test_one_port_rounds_pair_the_ranks(n):
    for round_ in ceca_rounds(n, one_port=True):
        np.testing.assert_array_equal(round_.sources[round_.sources], np.arange(n))


def test_the_first_round_sends_the_value_itself():
    assert (ceca_rounds(11)[0].buffer, ceca_rounds(11)[0].window) == ("S", 0)


def test_one_port_needs_an_even_number_of_ranks():
    with pytest.raises(TopologyParameterError, match="needs an even n, got 7"):
        ceca_rounds(7, one_port=True)
