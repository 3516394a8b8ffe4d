"""Metropolis-Hastings chains over the columns of a batch, against one test at a time."""

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gossamer.runtime import native
from gossamer.runtime.native import Moves, chain_moves

CARRIES = [None, "stale", "fresh"]


def one_by_one(
    scores, exponentials, row_ids, column_ids, held_scores, *, burn_in, carry, columns, raw
):
    """Every test in its turn, in float32: what the chains are."""
    (rows, width), b = scores.shape, len(row_ids)
    s, e, held_scores = scores.numpy(), exponentials.numpy(), held_scores.numpy()
    counts, held = np.zeros((rows, width), int), np.zeros(rows, int)
    state, score = np.zeros(rows, int), np.zeros(rows, np.float32)
    accepted, proposed = np.zeros(rows, int), np.zeros(rows, int)
    for r in range(rows):
        if r < b or carry is None:
            at, now = -1, held_scores[r]
        else:
            at, now = state[r - b], score[r - b]
            if carry == "fresh":
                now = held_scores[r] if at < 0 else s[r, at]
        for j in range(width) if columns is None else columns[r // b]:
            if column_ids[j % len(column_ids)] == row_ids[r % b]:
                continue
            proposed[r] += 1
            if np.float32(s[r, j] + e[r, j]) > now:
                at, now = j, s[r, j]
                accepted[r] += 1
            if (j if raw else proposed[r]) > burn_in[r]:
                if at >= 0:
                    counts[r, at] += 1
                elif now > -np.inf:
                    held[r] += 1
        state[r], score[r] = at, now
    return counts, held, state, score, accepted, proposed


def chains(b, size, *, seed, spread=3.0, ids=None, coarse=False, padding=0):
    """A batch with some examples twice, held states here and there, burn-in of any length."""
    generator = torch.Generator().manual_seed(seed)

    def integers(high, *shape):
        return torch.randint(high, shape, generator=generator)

    scores = spread * torch.randn(2 * b, 2 * size + padding, generator=generator)
    exponentials = -torch.rand(2 * b, 2 * size + padding, generator=generator).log()
    held = spread * torch.randn(2 * b, generator=generator)
    if coarse:  # ties
        scores, exponentials, held = scores.round(), exponentials.round(), held.round()
    odd = integers(20, *scores.shape)
    scores = scores.where(odd != 0, -torch.inf).where(odd != 1, torch.nan)
    held = held.where(integers(3, 2 * b) > 0, -torch.inf)
    ids = ids or 2 * size
    inputs = (
        scores[:, : 2 * size],
        exponentials[:, : 2 * size],
        integers(ids, b),
        integers(ids, size),
        held,
    )
    return inputs, integers(2 * size + 1, 2 * b).int()


def assert_same(moves, expected):
    for field, wanted in zip(fields(Moves), expected, strict=True):
        np.testing.assert_array_equal(getattr(moves, field.name).cpu(), wanted, field.name)


@settings(max_examples=200, deadline=None)
@given(
    b=st.integers(1, 5),
    size=st.integers(1, 40),
    seed=st.integers(0, 2**20),
    carry=st.sampled_from(CARRIES),
    raw=st.booleans(),
    coarse=st.booleans(),
    spread=st.sampled_from([0.1, 3.0, 50.0]),
    ids=st.sampled_from([1, 2, 8, None]),
    cut=st.none() | st.tuples(*[st.integers(0, 80)] * 4),
    padding=st.integers(0, 3),
)
@example(3, 33, 0, None, False, False, 3.0, None, None, 1)
def test_jumps_are_the_moves_of_one_test_at_a_time(
    b, size, seed, carry, raw, coarse, spread, ids, cut, padding
):
    inputs, burn_in = chains(
        b, size, seed=seed, spread=spread, ids=ids, coarse=coarse, padding=padding
    )
    columns = None
    if cut is not None:
        ends = [min(end, 2 * size) for end in cut]
        columns = range(*sorted(ends[:2])), range(*sorted(ends[2:]))
    options = {"burn_in": burn_in, "carry": carry, "columns": columns, "raw": raw}
    assert_same(chain_moves(*inputs, **options), one_by_one(*inputs, **options))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_makes_the_same_moves(isa):
    code = (
        "import test_chains as t\n"
        "case = t.test_jumps_are_the_moves_of_one_test_at_a_time.hypothesis.inner_test\n"
        "for k in range(24):\n"
        "    carry, cut = t.CARRIES[k % 3], (k, 3 * k, 5, 50) if k % 4 == 3 else None\n"
        "    case(3, 5 + 4 * k, k, carry, k % 2 == 1, k % 5 == 0, 3.0, None, cut, k % 3)\n"
        "print(t.native.build_info()['instruction_set'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={**os.environ, "GOSSAMER_ISA": isa},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() != isa:
        pytest.skip(f"this processor has no {isa}")


def test_moves_do_not_depend_on_the_number_of_threads():
    inputs, burn_in = chains(130, 260, seed=5)
    found = []
    try:
        for threads in (1, 3):
            native.use_threads(threads)
            found.append(chain_moves(*inputs, burn_in=burn_in, carry="fresh"))
    finally:
        native.use_threads(None)
    assert_same(found[0], [getattr(found[1], field.name) for field in fields(Moves)])


def plain(b, size, seed=0):
    """All examples differ, each row of the batch among the columns; nothing held."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2 * b, 2 * size, generator=generator)
    exponentials = -torch.rand(2 * b, 2 * size, generator=generator).log()
    empty = torch.full((2 * b,), -torch.inf)
    return scores, exponentials, torch.arange(b), torch.arange(size), empty


@pytest.mark.parametrize("carry", CARRIES)
def test_records_add_up_and_the_own_columns_have_none(carry):
    scores, exponentials, rows, columns, held = plain(6, 8)
    held[::2] = 0.3
    burn_in = torch.arange(12, dtype=torch.int32)
    moves = chain_moves(scores, exponentials, rows, columns, held, burn_in=burn_in, carry=carry)
    assert (moves.proposed == 14).all()
    assert torch.equal(moves.counts.sum(dim=1) + moves.held, 14 - burn_in)
    own = (rows[:, None] == columns).repeat(2, 2)
    assert not moves.counts[own].any()
    moved = moves.state >= 0
    here = scores.gather(1, moves.state.clamp(min=0)[:, None])[:, 0]
    if carry != "stale":
        assert torch.equal(moves.score[moved], here[moved])


def test_two_examples_test_twice_and_an_empty_chain_takes_the_first():
    scores, exponentials, rows, columns, held = plain(2, 2)
    burn_in = torch.ones(4, dtype=torch.int32)
    moves = chain_moves(scores, exponentials, rows, columns, held, burn_in=burn_in)
    assert moves.proposed.tolist() == [2] * 4
    assert (moves.counts.sum(dim=1) == 1).all()
    assert (moves.accepted >= 1).all()
    assert not moves.held.any()


def test_equal_scores_are_always_accepted_and_a_tie_of_the_sum_never():
    scores, exponentials, rows, columns, held = plain(4, 4)
    none = torch.zeros(8, dtype=torch.int32)
    alike = torch.full_like(scores, 2.5)
    moves = chain_moves(alike, exponentials, rows, columns, held, burn_in=none)
    assert torch.equal(moves.accepted, moves.proposed)
    stuck = chain_moves(alike, torch.zeros_like(alike), rows, columns, held + 3, burn_in=none)
    assert (stuck.accepted == 1).all()  # the first proposal of an empty chain


def test_a_chain_goes_on_in_the_second_row_and_is_counted_there():
    scores = torch.tensor(
        [[0.0, 5.0, 0.0, 0.0], [0.0, -9.0, 0.0, -8.5]]
    )  # columns 1, 3 are others'
    nothing = torch.zeros(2, 4)
    inputs = (torch.tensor([0]), torch.tensor([0, 1]), torch.tensor([-torch.inf, 1.0]))
    none = torch.zeros(2, dtype=torch.int32)
    stale = chain_moves(scores, nothing, *inputs, burn_in=none, carry="stale")
    assert stale.state.tolist() == [1, 1]
    assert stale.score.tolist() == [5, 5]
    assert stale.counts.tolist() == [[0, 2, 0, 0], [0, 2, 0, 0]]
    fresh = chain_moves(scores, nothing, *inputs, burn_in=none, carry="fresh")
    assert fresh.state.tolist() == [1, 3]
    assert fresh.counts.tolist() == [[0, 2, 0, 0], [0, 1, 0, 1]]
    apart = chain_moves(scores, nothing, *inputs, burn_in=none)
    assert apart.state.tolist() == [1, -1]
    assert apart.held.tolist() == [0, 2]


def test_pairs_scan_the_other_side_alone():
    scores, exponentials, rows, columns, held = plain(5, 5)
    other = range(5, 10), range(5)
    none = torch.zeros(10, dtype=torch.int32)
    moves = chain_moves(scores, exponentials, rows, columns, held, burn_in=none, columns=other)
    assert (moves.proposed == 4).all()
    assert not moves.counts[:5, :5].any()
    assert not moves.counts[5:, 5:].any()


@pytest.mark.parametrize("row", [0, 1])
def test_a_long_chain_visits_columns_as_often_as_the_softmax_says(row):
    beta, m, moves = 5.0, 12, 200_000
    generator = torch.Generator().manual_seed(row)
    values = beta * (2 * torch.rand(m, generator=generator) - 1)
    drawn = torch.randint(m, (moves,), generator=generator)  # uniform, independent
    exponentials = -torch.rand(2, moves, generator=generator).log()
    found = chain_moves(
        values[drawn].expand(2, moves),
        exponentials,
        torch.tensor([-1]),
        torch.arange(moves // 2),
        torch.tensor([-torch.inf, 0.0]),
        burn_in=torch.zeros(2, dtype=torch.int32),
    )
    visits = torch.zeros(m).index_add_(0, drawn, found.counts[row].float())
    share = visits / moves
    assert 0.5 * (share - values.softmax(dim=0)).abs().sum() < 0.02


GOOD = plain(2, 3)
NONE = torch.zeros(4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (0, torch.zeros(4, 7), r"scores must be \(4, 6\) torch.float32"),
        (0, torch.zeros(4, 6).double(), "scores must be"),
        (0, torch.zeros(6, 4).t(), "rows of scores must be contiguous"),
        (1, torch.zeros(3, 6), r"exponentials must be \(4, 6\)"),
        (2, torch.zeros(2, dtype=torch.int32), r"row_ids must be \(2,\) torch.int64"),
        (3, torch.zeros(6, dtype=torch.int64)[::2], "rows of column_ids must be contiguous"),
        (4, torch.zeros(5), r"held_scores must be \(4,\)"),
        (4, torch.zeros(4, device="meta"), "on cpu, got .* on meta"),
    ],
)
def test_what_does_not_fit_is_named(place, wrong, message):
    inputs = [*GOOD[:place], wrong, *GOOD[place + 1 :]]
    with pytest.raises(ValueError, match=message):
        chain_moves(*inputs, burn_in=NONE)


def test_options_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"burn_in must be \(4,\) torch.int32"):
        chain_moves(*GOOD, burn_in=NONE.long())
    with pytest.raises(ValueError, match="carry must be None, 'stale' or 'fresh', got 'old'"):
        chain_moves(*GOOD, burn_in=NONE, carry="old")
    for part in (range(7), range(-1, 3), range(0, 6, 2)):
        with pytest.raises(ValueError, match=r"columns must be parts of range\(6\)"):
            chain_moves(*GOOD, burn_in=NONE, columns=(range(6), part))


# --- GPU ------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("carry", CARRIES)
@pytest.mark.parametrize(("b", "size"), [(1, 1), (3, 5), (7, 33), (64, 100), (300, 300)])
def test_moves_on_the_gpu_are_those_of_the_cpu(b, size, carry):
    for seed, raw in enumerate([False, True]):
        inputs, burn_in = chains(b, size, seed=seed, padding=seed)
        half = range(size, 2 * size), range(size)
        for columns in (None, half):
            options = {"carry": carry, "columns": columns, "raw": raw}
            there = chain_moves(*(t.cuda() for t in inputs), burn_in=burn_in.cuda(), **options)
            here = chain_moves(*inputs, burn_in=burn_in, **options)
            assert_same(there, [getattr(here, field.name) for field in fields(Moves)])
