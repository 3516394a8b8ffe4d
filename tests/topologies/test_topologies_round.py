"""One round: its edges, both ways to look at them, and its hash."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from gossamer.topologies import Round, build


@st.composite
def matrices(draw):
    n = draw(st.integers(1, 7))
    entries = st.sampled_from([0.0, 0.0, 0.25, 1.0, -0.5])
    flat = draw(st.lists(entries, min_size=n * n, max_size=n * n))
    return np.array(flat).reshape(n, n)


@settings(deadline=None)
@given(matrices())
def test_a_round_is_its_matrix(matrix):
    round_ = Round.from_matrix(matrix)
    np.testing.assert_array_equal(round_.matrix(), matrix)
    np.testing.assert_array_equal(round_.sparse().toarray(), matrix)
    x = np.arange(2.0 * len(matrix)).reshape(-1, 2)
    np.testing.assert_array_equal(round_.apply(x), matrix @ x)  # small dyadic numbers: exact
    off_diagonal = matrix - np.diag(np.diag(matrix))
    assert round_.num_messages == np.count_nonzero(off_diagonal)
    per_rank = [np.count_nonzero(off_diagonal, axis=axis).max() for axis in (0, 1)]
    assert round_.max_degree == max(per_rank)


@settings(deadline=None)
@given(matrices())
def test_what_is_sent_is_what_is_received(matrix):
    round_ = Round.from_matrix(matrix)
    n = len(matrix)
    received = {(j, i, w) for i in range(n) for j, w in zip(*round_.recv(i), strict=True)}
    sent = {(j, i, w) for j in range(n) for i, w in zip(*round_.send(j), strict=True)}
    assert sent == received
    for rank in range(n):
        assert np.all(np.diff(round_.recv(rank)[0]) > 0)
        assert np.all(np.diff(round_.send(rank)[0]) > 0)


@settings(deadline=None)
@given(matrices())
def test_sparse_dense_and_edge_lists_give_the_same_round(matrix):
    targets, sources = np.nonzero(matrix)
    edges = Round.from_edges(len(matrix), targets, sources, matrix[targets, sources], 0.0)
    from_sparse = Round.from_matrix(sparse.csc_array(matrix))
    assert edges.digest() == from_sparse.digest() == Round.from_matrix(matrix).digest()


def test_weights_of_repeated_edges_add_and_zero_weights_are_no_edges():
    round_ = Round.from_edges(3, [0, 0, 1, 2], [1, 1, 2, 0], [0.25, 0.25, 0.0, 0.5], 0.5)
    assert round_.matrix().tolist() == [[0.5, 0.5, 0], [0, 0.5, 0], [0.5, 0, 0.5]]
    assert round_.num_messages == 2


def test_a_circulant_round_is_the_same_as_from_its_edges():
    n, offsets, weights = 7, [5, 1, 3], [0.5, 0.125, 0.25]
    ranks = np.repeat(np.arange(n), 3)
    edges = Round.from_edges(
        n, ranks, (ranks + np.tile(offsets, n)) % n, np.tile(weights, n), 0.125
    )
    assert Round.circulant(n, offsets, weights, 0.125).digest() == edges.digest()


@pytest.mark.parametrize("field", ["self_weight", "indptr", "sources", "weights"])
def test_the_arrays_are_read_only(field):
    with pytest.raises(ValueError, match="read-only"):
        getattr(build("ring", 4).round(0), field)[0] = 7


def test_the_hash_sees_every_bit_of_a_weight_and_every_edge():
    matrix = build("ring", 5).round(0).matrix()
    nudged = matrix.copy()
    nudged[3, 3] = np.nextafter(nudged[3, 3], 1)
    moved = matrix.copy()
    moved[0, [1, 2]] = moved[0, [2, 1]]
    digests = {Round.from_matrix(each).digest() for each in (matrix, nudged, moved)}
    assert len(digests) == 3
    assert all(0 <= digest < 2**63 for digest in digests)


def test_the_hash_is_the_same_on_every_machine():
    # A recorded value: processes compare it over the network.
    assert build("one_peer_hypercube", 2).round(0).digest() == 6873950556268220219
