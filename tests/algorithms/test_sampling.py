"""The sampler: a pure function, epochs, rates, streams, and what it refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.algorithms.problems import DataPlan, Problem
from gossamer.algorithms.sampling import Sampler
from gossamer.algorithms.tasks.arrays import TensorDataset
from gossamer.algorithms.tasks.least_squares import LeastSquares
from gossamer.runtime.errors import ConfigError

SAMPLINGS = ["shuffle", "replacement", "poisson", "full"]


def problem_of(lengths):
    """Shards of the given lengths; example k of the dataset is the number k."""
    total = sum(lengths)
    places = np.random.default_rng(0).permutation(total)
    return Problem(
        module=torch.nn.Linear(1, 1),
        train=TensorDataset((torch.arange(total), torch.arange(2.0 * total).view(total, 2))),
        shards=tuple(np.split(places, np.cumsum(lengths)[:-1])),
        loss=lambda module, inputs: inputs[0].sum(),
    )


def numbers(batches):
    return [[batch.inputs[0].tolist() for batch in draw] for draw in batches]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(3, 9), min_size=2, max_size=6),
    size=st.integers(1, 3),
    calls=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    cut=st.integers(1, 5),
)
def test_batches_depend_on_neither_call_order_nor_process_split(
    sampling, lengths, size, calls, cut
):
    problem, plan, n = problem_of(lengths), DataPlan(size, sampling), len(lengths)
    cut = min(cut, n - 1)
    whole = Sampler(problem, plan, range(n), seed=7)
    left = Sampler(problem, plan, range(cut), seed=7)
    right = Sampler(problem, plan, range(cut, n), seed=7)
    for step in calls:
        fresh = Sampler(problem, plan, range(n), seed=7)
        expected = numbers(fresh.batches(step, 2))
        assert numbers(whole.batches(step, 2)) == expected
        halves = zip(left.batches(step, 2), right.batches(step, 2), strict=True)
        assert numbers([a + b for a, b in halves]) == expected


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    size=st.integers(1, 15),
    count=st.integers(1, 3),
)
def test_every_epoch_visits_every_example_once_in_a_new_order(lengths, size, count):
    problem, epochs = problem_of(lengths), 3
    sampler = Sampler(problem, DataPlan(size), range(len(lengths)), seed=1)
    steps = -(-epochs * max(lengths) // (size * count))
    draws = [draw for step in range(steps) for draw in numbers(sampler.batches(step, count))]
    for rank, shard in enumerate(problem.shards):
        seen = [k for draw in draws for k in draw[rank]]
        assert all(len(draw[rank]) == size for draw in draws)
        for epoch in range(epochs):
            visited = seen[epoch * len(shard) : (epoch + 1) * len(shard)]
            assert sorted(visited) == sorted(shard.tolist())


def test_epochs_and_ranks_are_shuffled_apart():
    problem = problem_of([50, 50])
    sampler = Sampler(problem, DataPlan(50), range(2), seed=0)
    (first,), (second,) = numbers(sampler.batches(0, 1)), numbers(sampler.batches(1, 1))
    orders = [
        [problem.shards[rank].tolist().index(k) for k in draw[rank]]
        for draw in (first, second)
        for rank in range(2)
    ]
    assert len({tuple(order) for order in orders}) == 4
    (other,) = numbers(Sampler(problem, DataPlan(50), range(2), seed=1).batches(0, 1))
    assert other != first


def test_replacement_draws_uniformly_from_the_own_shard():
    problem = problem_of([10, 7])
    sampler = Sampler(problem, DataPlan(1000, "replacement"), range(2), seed=0)
    (draw,) = numbers(sampler.batches(0, 1))
    for rank, length in enumerate([10, 7]):
        counts = np.bincount(draw[rank], minlength=17)
        assert set(np.flatnonzero(counts)) == set(problem.shards[rank].tolist())
        assert counts.max() < 1.5 * 1000 / length  # over 4 standard deviations


def test_poisson_includes_each_example_at_its_rate_independently():
    problem = problem_of([40, 20])
    sampler = Sampler(problem, DataPlan(4, "poisson"), range(2), seed=0)
    draws, sizes = numbers(sampler.batches(0, 4000)), []
    for rank, length in enumerate([40, 20]):
        rate = 4 / length
        counts = np.bincount([k for draw in draws for k in draw[rank]], minlength=60)
        rates = counts[problem.shards[rank]] / 4000
        # 5 standard deviations of a mean of 4,000 coins
        assert np.abs(rates - rate).max() < 5 * np.sqrt(rate * (1 - rate) / 4000)
        sizes = [len(draw[rank]) for draw in draws]
        assert np.var(sizes) == pytest.approx(length * rate * (1 - rate), rel=0.15)


def test_an_empty_poisson_batch_has_the_right_shapes():
    sampler = Sampler(problem_of([100]), DataPlan(1, "poisson", indices=True), range(1), seed=0)
    empty = next(b for (b,) in sampler.batches(0, 50) if len(b) == 0)
    assert empty.inputs[0].shape == (0,)
    assert empty.inputs[1].shape == (0, 2)
    assert empty.indices.shape == (0,)
    assert empty.inputs[1].dtype == torch.float32


def test_full_is_the_whole_shard_and_indices_are_places_in_the_dataset():
    problem = problem_of([5, 3])
    for sampling in SAMPLINGS:
        sampler = Sampler(problem, DataPlan(2, sampling, indices=True), range(2), seed=0)
        for draw in sampler.batches(4, 2):
            for rank, batch in enumerate(draw):
                assert torch.equal(batch.indices, batch.inputs[0])
                if sampling == "full":
                    assert batch.indices.tolist() == problem.shards[rank].tolist()
    assert sampler.batches(0, 1)[0][0].indices.dtype == torch.int64
    without = Sampler(problem, DataPlan(2), range(2), seed=0)
    assert without.batches(0, 1)[0][0].indices is None


def test_batches_start_where_fresh_tensors_would():
    # BLAS may round by alignment: rank 3's batch must not lie elsewhere than when drawn alone.
    sampler = Sampler(problem_of([9] * 6), DataPlan(3), range(6), seed=0)
    for draw in sampler.batches(2, 3):
        assert all(t.data_ptr() % 64 == 0 for batch in draw for t in batch.inputs)


def test_a_stream_gives_fresh_examples_to_every_rank_and_draw():
    problem = LeastSquares().build(n=4, seed=0)
    sampler = Sampler(problem, DataPlan(2), range(4), seed=0)
    batches = [batch.inputs[1] for draw in sampler.batches(5, 3) for batch in draw]
    assert len({tuple(b.tolist()) for b in batches}) == 12
    (draw,) = Sampler(problem, DataPlan(2), [2], seed=0).batches(5, 3)[1]
    assert torch.equal(draw.inputs[1], batches[4 + 2])


@pytest.mark.parametrize(
    "plan", [DataPlan(1, "full"), DataPlan(1, "poisson"), DataPlan(1, "shuffle", True)]
)
def test_a_stream_has_no_finite_dataset(plan):
    with pytest.raises(ConfigError, match="needs a finite dataset, but the task is a stream"):
        Sampler(LeastSquares().build(2, 0), plan, range(2), seed=0)


def test_impossible_plans_are_refused():
    with pytest.raises(ConfigError, match=r"oracle\.batch_size: rank 1 holds 3 examples"):
        Sampler(problem_of([8, 3]), DataPlan(4, "poisson"), range(2), seed=0)
    with pytest.raises(ConfigError, match="rank 1 has no training example"):
        Sampler(problem_of([8, 0]), DataPlan(4), range(2), seed=0)


@pytest.mark.parametrize(
    ("lengths", "plan", "words"),
    [
        ([4, 0], DataPlan(2), "rank 1 has no training example"),
        ([9, 3], DataPlan(4, "poisson"), "rank 1 holds 3 examples"),
    ],
)
def test_what_is_wrong_with_one_rank_is_found_by_every_process(lengths, plan, words):
    for ranks in ([0], [1], [0, 1]):
        with pytest.raises(ConfigError, match=words):
            Sampler(problem_of(lengths), plan, ranks, seed=0)


class Ragged:
    """Sequences of 1 to 9 tokens, cut to the longest one that is looked up."""

    pads_lookups = True

    def __len__(self):
        return 9

    def __getitem__(self, indices):
        return ((torch.arange(int(indices.max()) + 1) <= indices[:, None]).long(),)


@pytest.mark.parametrize("hosted", [range(1), range(2), range(3)])
def test_a_batch_that_is_padded_does_not_depend_on_the_ranks_beside_it(hosted):
    shards = (np.arange(3), np.arange(3, 6), np.arange(6, 9))
    problem = Problem(torch.nn.Linear(1, 1), Ragged(), shards, loss=None)
    sampler = Sampler(problem, DataPlan(batch_size=2), hosted, seed=0)
    alone = Sampler(problem, DataPlan(batch_size=2), [0], seed=0)
    for step in range(4):
        (found,), (expected,) = (s.batches(step, 1) for s in (sampler, alone))
        assert torch.equal(found[0].inputs[0], expected[0].inputs[0])
