"""EMC^2's laws on 12 negatives, enumerated; and how the released code counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gossamer.algorithms.contrastive.columns import Columns
from gossamer.algorithms.contrastive.emc2 import EMC2
from gossamer.algorithms.contrastive.global_loss import GlobalLoss
from gossamer.algorithms.contrastive.losses import Rows, Setting, Visit, Weights
from gossamer.algorithms.contrastive.owners import Owners
from gossamer.algorithms.contrastive.terms import differentiated
from gossamer.launch.reproduce import discrete_chain as chain
from gossamer.runtime import Communicator, RowLayout, StackedTransport
from gossamer.topologies import build

M = 12
SEEDS = range(4)


def problem(seed):
    """Scores of 12 negatives, uniform in -5 .. 5, and a number of each."""
    generator = torch.Generator().manual_seed(seed)
    scores = 10 * torch.rand(M, dtype=torch.float64, generator=generator) - 5
    return scores, torch.randn(M, dtype=torch.float64, generator=generator)


# --- the chain ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_the_softmax_is_stationary_and_balanced_in_detail(seed):
    p = problem(seed)[0].softmax(dim=0)
    kernel = chain.transition(p)
    flow = p[:, None] * kernel
    torch.testing.assert_close(kernel.sum(dim=1), torch.ones_like(p), rtol=0, atol=1e-15)
    torch.testing.assert_close(flow, flow.T, rtol=0, atol=1e-15)
    torch.testing.assert_close(p @ kernel, p, rtol=0, atol=1e-15)
    assert (kernel >= 0).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_second_eigenvalue_is_that_of_the_mode(seed):
    p = problem(seed)[0].softmax(dim=0)
    assert chain.second_eigenvalue(p) == pytest.approx(1 - 1 / (M * float(p.max())), abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_distance_from_the_mode_falls_by_the_second_eigenvalue_exactly(seed):
    p = problem(seed)[0].softmax(dim=0)
    rate = 1 - 1 / (M * p.max())
    expected = (1 - p.max()) * rate ** torch.arange(201, dtype=torch.float64)
    torch.testing.assert_close(chain.distances_from_the_mode(p, 200), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("seed", SEEDS)
def test_distance_from_any_state_is_below_the_power_of_that_eigenvalue(seed):
    p = problem(seed)[0].softmax(dim=0)
    kernel, rate = chain.transition(p), 1 - 1 / (M * float(p.max()))
    laws = torch.eye(M, dtype=torch.float64)
    for t in range(1, 100):
        laws = laws @ kernel
        assert 0.5 * (laws - p).abs().sum(dim=1).max() <= rate**t + 1e-13


@pytest.mark.parametrize("seed", SEEDS)
def test_expected_shares_tend_to_the_softmax_as_more_states_are_recorded(seed):
    p = problem(seed)[0].softmax(dim=0)
    rate = 1 - 1 / (M * float(p.max()))
    for records in (10, 1000):
        for start in range(M):
            found = chain.expected_shares(p, start, 3, records)
            assert float(found.sum()) == pytest.approx(1, abs=1e-12)
            bound = rate**4 / (1 - rate) / records  # the sum of a geometric series
            assert 0.5 * float((found - p).abs().sum()) <= bound


@pytest.mark.parametrize(("burn_in", "records"), [(0, 6), (3, 3), (5, 1), (7, 7)])
def test_the_kernel_records_what_powers_of_the_transition_say(burn_in, records):
    scores, _ = problem(0)
    p, chains = scores.float().double().softmax(dim=0), 20_000
    start = int(p.argsort()[-3])
    found = chain.sampled_shares(scores, start, burn_in, records, chains, seed=burn_in)
    expected = chain.expected_shares(p, start, burn_in, records)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(2 * chains, dtype=torch.float64))
    error = found.std(dim=0) / math.sqrt(2 * chains) + 1e-5  # a state seen never has no deviation
    assert ((found.mean(dim=0) - expected) / error).abs().max() < 5


def test_a_long_run_of_the_kernel_comes_near_the_softmax_as_one_over_the_root_of_its_length():
    scores, _ = problem(1)
    p, distance = scores.softmax(dim=0), {}
    for moves in (2_000, 200_000):
        runs = [chain.sampled_shares(scores, 0, 0, moves, 1, seed) for seed in range(8)]
        distance[moves] = 0.5 * (torch.cat(runs) - p).abs().sum(dim=1).mean()
    assert distance[200_000] < 0.02
    assert 5 < distance[2_000] / distance[200_000] < 20  # 10 expected


# --- in-batch negatives ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_a_softmax_over_some_negatives_is_biased_until_they_are_all(seed):
    scores, values = problem(seed)
    bias = [chain.in_batch_bias(scores, values, b) for b in range(1, M + 1)]
    assert bias[0] == pytest.approx(float(values.mean() - scores.softmax(dim=0) @ values))
    assert min(abs(b) for b in bias[:-1]) > 1e-5
    assert abs(bias[-1]) < 1e-15


@pytest.mark.parametrize("seed", SEEDS)
def test_sogclrs_weights_with_the_exact_mean_have_no_bias_in_any_batch(seed):
    scores, values = problem(seed)
    assert max(abs(chain.sogclr_bias(scores, values, b)) for b in range(1, M + 1)) < 2e-15


@pytest.mark.parametrize("seed", SEEDS)
def test_the_expected_log_mean_exp_grows_with_the_batch_up_to_that_of_all(seed):
    scores, _ = problem(seed)
    found = chain.mean_log_mean_exps(scores)
    assert (found.diff() > 0).all()
    assert float(found[0]) == pytest.approx(float(scores.mean()))
    assert float(found[-1]) == pytest.approx(float(scores.logsumexp(dim=0)) - math.log(M))


# --- weights --------------------------------------------------------------------------------------


def batch(examples, dim=5, seed=0, dtype=torch.float64):
    """All examples in one batch of one rank, float64."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(2 * examples, dim, dtype=dtype, generator=generator)
    z = z / z.norm(dim=1, keepdim=True)
    ids = torch.arange(examples)
    return Rows(
        place=0,
        ids=ids,
        z=z,
        columns=Columns(z, ids, slice(0, examples)),
        cosines=z @ z.T,
        valid=(ids[:, None] != ids).repeat(2, 2),
        positives=torch.cat([ids + examples, ids]),
    )


def test_the_surrogate_with_the_softmax_over_all_has_the_gradient_of_the_loss():
    rows, n, beta = batch(7), 7, 6.0
    softmax = (beta * rows.cosines).masked_fill(~rows.valid, -torch.inf).softmax(dim=1)
    terms = differentiated(rows, Weights(softmax, beta))
    assert terms.columns is not None
    z = rows.z.view(2, n, -1)
    loss = GlobalLoss(beta)
    log_sums = loss.negatives(z, range(n))[:, 0]
    expected = loss.gradient(z, log_sums, range(n)).view_as(rows.z)
    torch.testing.assert_close(terms.rows + terms.columns, expected, rtol=0, atol=1e-14)


# --- the released code's counts -------------------------------------------------------------------


def first_visit(mode, examples=6, score=0.0, **options):
    """Weights of the first visit of 6 examples, whose chains are empty or hold ``score``."""
    topology = build("complete", 1)
    comm = Communicator(topology, StackedTransport(), seed=0)
    loss = EMC2(beta=3.0, held="drop", **options)
    owners = Owners([np.arange(examples + 1)], 1, examples + 1)
    layout = RowLayout(torch.nn.Linear(1, 1))
    loss.setup(Setting(comm, owners, mode, examples, layout, 5, torch.float32))
    if score:
        state = loss.state_dict()
        state["keys"].fill_(2 * examples)  # an example that is not in the batch
        state["scores"].fill_(score)
    rows = batch(examples, dtype=torch.float32)
    visit = Visit(
        x=torch.zeros(1, 1),
        rows=[rows],
        step=0,
        draw=0,
        number=0,
        advances=True,
        recall=lambda keys, gradient: pytest.fail("nothing is recalled"),
        look=lambda place, keys: pytest.fail("nothing is looked at"),
        look_at_batch=lambda place, row: pytest.fail("nothing is looked at"),
    )
    [weights] = loss.weigh(visit)
    return weights


def test_shares_of_a_visit_add_up_to_one():
    for mode in ("finite", "infinite"):
        total = first_visit(mode).columns.sum(dim=1)
        torch.testing.assert_close(total, torch.ones(12))


def test_the_released_code_divides_four_records_by_five_with_fixed_views():
    """6 examples: 10 proposals, 5 of them burnt; of the 5 records that are left it makes 4."""
    total = first_visit("finite", compat="official").columns.sum(dim=1)
    torch.testing.assert_close(total, torch.full((12,), 4 / 5))


def test_the_released_code_counts_110_of_120_states_without_burn_in():
    """It leaves column 0 out, which ten of the twelve rows propose."""
    shares = first_visit("infinite", burn_in=0.0, compat="official").columns
    assert float((10 * shares).sum()) == pytest.approx(110, abs=1e-4)
    assert float((10 * first_visit("infinite", burn_in=0.0).columns).sum()) == pytest.approx(120)


def test_the_released_code_is_right_about_changing_views_at_a_burn_in_of_half():
    """Of the columns beyond the fifth it counts one of the own pair, as proposals would have it."""
    ours, theirs = (first_visit("infinite", compat=c).columns for c in ("none", "official"))
    torch.testing.assert_close(theirs.sum(dim=1), torch.ones(12))
    torch.testing.assert_close(ours[:1], theirs[:1])


@pytest.mark.parametrize("mode", ["finite", "infinite"])
def test_the_released_code_forgets_a_held_state_from_a_burn_in_of_half_on(mode):
    """A state that nothing displaces has all records, from which it takes the burn-in once more."""
    assert first_visit(mode, score=100.0).figures["held_share"] == 1.0
    assert first_visit(mode, score=100.0, compat="official").figures["held_share"] == 0.0
    early = first_visit(mode, score=100.0, burn_in=0.2, compat="official").figures["held_share"]
    assert 0.0 < early < 1.0
