"""How examples are split over ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.algorithms.tasks.bundled import Digits
from gossamer.runtime.errors import ConfigError

KINDS = ["iid", "sorted", "contiguous", "dirichlet"]


def task(kind, **fields):
    alpha = {"alpha": 1.0} if kind == "dirichlet" else {}
    return Digits(heterogeneity=kind, **{**alpha, **fields})


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=40, max_size=80),
    n=st.integers(1, 5),
    seed=st.integers(-(2**40), 2**70),
)
def test_every_example_lands_on_exactly_one_rank(kind, labels, n, seed):
    labels = np.array(labels)
    shards = task(kind).split(labels, n, seed)
    assert len(shards) == n
    assert all(len(s) > 0 and s.dtype == np.int64 for s in shards)
    assert sorted(np.concatenate(shards)) == list(range(len(labels)))
    again = task(kind).split(labels, n, seed)
    assert all(map(np.array_equal, shards, again))


@pytest.mark.parametrize("kind", KINDS[:3])
@settings(max_examples=20, deadline=None)
@given(size=st.integers(7, 60), n=st.integers(1, 7))
def test_cut_shards_differ_by_one_example_or_drop_the_remainder(kind, size, n):
    labels = np.arange(size) % 3
    sizes = [len(s) for s in task(kind).split(labels, n, 0)]
    assert max(sizes) - min(sizes) <= 1
    dropped = task(kind, drop_remainder=True).split(labels, n, 0)
    assert {len(s) for s in dropped} == {size // n}


def test_sorted_is_stable_and_contiguous_keeps_the_order():
    labels = np.array([1, 0, 2, 0, 1, 2, 0])
    assert [s.tolist() for s in task("sorted").split(labels, 3, 0)] == [[1, 3, 6], [0, 4], [2, 5]]
    assert np.concatenate(task("contiguous").split(labels, 3, 0)).tolist() == list(range(7))


def test_smaller_alpha_means_fewer_classes_per_rank():
    labels = np.arange(2000) % 10

    def classes_per_rank(alpha):
        shards = task("dirichlet", alpha=alpha).split(labels, 8, 0)
        shares = [np.bincount(labels[s], minlength=10) / len(s) for s in shards]
        return np.mean([1 / (share**2).sum() for share in shares])  # effective number

    few, some, many = (classes_per_rank(alpha) for alpha in (0.1, 1.0, 100.0))
    assert few < 5 < some < 9 < many


def test_a_dirichlet_split_is_drawn_again_until_no_rank_is_empty():
    # alpha = .1 over 25 ranks leaves one empty in most single draws of 200 examples.
    labels = np.arange(400) % 10
    for seed in range(5):
        assert min(map(len, task("dirichlet", alpha=0.1).split(labels, 25, seed))) > 0


def test_an_impossible_dirichlet_split_names_the_way_out():
    with pytest.raises(
        ConfigError, match=r"task\.alpha: Dirichlet\(0\.01\) over 30 ranks .* larger"
    ):
        task("dirichlet", alpha=0.01).split(np.zeros(30, np.int64), 30, 0)
