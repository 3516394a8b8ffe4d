"""Lower bounds on epsilon from canaries."""

import math

import pytest
import torch

from gossamer.algorithms.privacy.audit import Guesses, epsilon_at_least, guess, probability


@pytest.mark.parametrize("made", [10, 100, 1000])
def test_all_guesses_right_bound_epsilon_by_the_closed_form(made):
    # Without delta P[all right] = likely^made, which is 5 % at the bound.
    likely = 0.05 ** (1 / made)
    found = epsilon_at_least(Guesses(made, made, made), delta=0.0)
    assert found == pytest.approx(math.log(likely / (1 - likely)), rel=1e-6)


def test_half_of_the_guesses_right_say_nothing():
    assert epsilon_at_least(Guesses(100, 100, 50), delta=1e-5) == 0


def test_the_bound_grows_with_right_guesses_and_falls_with_delta():
    bounds = [epsilon_at_least(Guesses(200, 100, right), 1e-5) for right in range(50, 101, 5)]
    assert bounds == sorted(bounds)
    assert bounds[-1] > bounds[0]
    deltas = [epsilon_at_least(Guesses(200, 100, 95), delta) for delta in (0, 1e-6, 1e-4, 1e-2)]
    assert deltas == sorted(deltas, reverse=True)
    assert deltas[-1] < deltas[0]


def test_the_probability_is_one_where_epsilon_explains_everything():
    assert probability(Guesses(50, 50, 40), 20.0, 0.0) == pytest.approx(1.0)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_randomised_response_is_rarely_bounded_beyond_its_epsilon(epsilon):
    generator = torch.Generator().manual_seed(0)
    beyond, runs, m = 0, 400, 200
    for _ in range(runs):
        included = torch.rand(m, generator=generator) < 0.5
        honest = torch.rand(m, generator=generator) < 1 / (1 + math.exp(-epsilon))
        answers = torch.where(honest, included, ~included).float()
        answers += 0.1 * torch.rand(m, generator=generator)  # ties, by lot
        beyond += epsilon_at_least(guess(answers, included, m // 2), 0.0) > epsilon
    # 5 % are allowed: 20 of 400, and four standard deviations of that.
    assert beyond <= 20 + 4 * math.sqrt(19)
