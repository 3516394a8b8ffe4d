"""F1 and exact match of answers in words."""

import string
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.algorithms.tasks.words import exact_match, word_f1


@pytest.mark.parametrize(
    ("text", "answer", "f1", "exact"),
    [
        ("Rome", "rome.", 1, 1),
        ("The red house", "a red house!", 1, 1),
        ("the red house", "red roof", 1 / 2, 0),  # red of red house, red roof
        ("in Rome", "Rome", 2 / 3, 0),
        ("house red", "red house", 1, 0),
        ("to to to", "to be", 2 / 5, 0),  # a word counts as often as both have it
        ("Oslo", "Rome", 0, 0),
        ("", "Rome", 0, 0),
        ("An", "the", 1, 1),  # nothing is left of both
        ("anthem", "the anthem", 1, 1),  # articles are whole words
        ("3,000  km", "3000 km", 1, 1),
    ],
)
def test_f1_and_exact_match_of_cases_by_hand(text, answer, f1, exact):
    assert word_f1(text, answer) == pytest.approx(f1)
    assert exact_match(text, answer) == exact


PLAIN = st.lists(st.sampled_from(["red", "house", "to", "be", "rome"]), max_size=6)


@given(PLAIN, PLAIN)
def test_f1_is_the_harmonic_mean_of_precision_and_recall(found, right):
    f1 = word_f1(" ".join(found), " ".join(right))
    common = sum(min(found.count(w), right.count(w)) for w in set(found))
    if common:
        precision, recall = common / len(found), common / len(right)
        assert f1 == pytest.approx(2 / (1 / precision + 1 / recall))
    else:
        assert f1 == float(found == right == [])
    assert f1 == word_f1(" ".join(right), " ".join(found))
    assert (f1 == 1) == (Counter(found) == Counter(right))
    assert exact_match(" ".join(found), " ".join(right)) <= f1


@given(PLAIN, st.lists(st.sampled_from(["a", "An", "THE", *string.punctuation]), max_size=4))
def test_case_articles_and_punctuation_count_for_nothing(words, noise):
    assert exact_match("  ".join([*noise, *(w.title() for w in words), *noise]), " ".join(words))
