"""The exact contrastive loss and its gradient, against the formula written out in float64."""

import math

import pytest
import torch
from contrastive_for_tests import written_out
from thread_ranks import on_processes

from gossamer.algorithms.contrastive import global_loss
from gossamer.algorithms.contrastive.contrast import unit
from gossamer.algorithms.contrastive.global_loss import GlobalLoss
from gossamer.algorithms.contrastive.shares import in_shares, share_of
from gossamer.runtime.collectives import RankGroup
from gossamer.runtime.transports.stacked import StackedTransport


def embeddings(n, dim=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2 * n, dim, dtype=torch.float64, generator=generator)
    return unit(rows).view(2, n, dim)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(("n", "block"), [(2, 256), (7, 3), (7, 256)])
def test_value_and_gradient_are_those_of_the_formula(monkeypatch, pairs, n, block):
    monkeypatch.setattr(global_loss, "_BLOCK", block)
    z, loss = embeddings(n).requires_grad_(), GlobalLoss(beta=3.0, pairs=pairs)
    expected = written_out(z, 3.0, pairs)
    expected.backward()
    at = z.detach()
    parts = [loss.negatives(at, range(1)), loss.negatives(at, range(1, n))]
    sums = torch.cat(parts, dim=2)[:, 0]
    assert loss.value(at, sums) == pytest.approx(expected.item(), rel=1e-13)
    found = torch.cat([loss.gradient(at, sums, part) for part in (range(1), range(1, n))], dim=1)
    torch.testing.assert_close(found, z.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("beta", [0.1, 14.28, 1000.0])
def test_equal_embeddings_have_the_loss_log_m_and_no_gradient_along_the_sphere(pairs, beta):
    n, loss = 6, GlobalLoss(beta, pairs)
    z = embeddings(1)[:1, :1].expand(2, n, 5).contiguous()
    sums = loss.negatives(z, range(n))[:, 0]
    assert loss.collapsed(n) == math.log(5 if pairs else 10)
    assert loss.value(z, sums) == pytest.approx(loss.collapsed(n), abs=1e-12 * beta)
    toward = loss.gradient(z, sums, range(n))
    tangent = toward - (toward * z).sum(dim=2, keepdim=True) * z
    assert tangent.abs().max() < 1e-14 * beta
    assert loss.pairwise_cosine(z) == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize("pairs", [False, True])
def test_the_pairwise_cosine_is_the_mean_over_rows_and_their_negatives(pairs):
    z, n = embeddings(5), 5
    each = [
        z[v, i] @ z[w, k]
        for v in (0, 1)
        for i in range(n)
        for w in ((1 - v,) if pairs else (0, 1))
        for k in range(n)
        if k != i
    ]
    assert len(each) == 2 * n * GlobalLoss(1.0, pairs).num_negatives(n)
    expected = float(torch.stack(each).mean())
    assert GlobalLoss(1.0, pairs).pairwise_cosine(z) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("pairs", [False, True])
def test_rows_are_first_where_no_negative_scores_as_high_as_the_positive(pairs):
    loss, n = GlobalLoss(2.0, pairs), 6
    z = embeddings(n)
    z[1, :3] = unit(z[0, :3] + 0.1 * z[1, :3])
    right = 0
    for v in (0, 1):
        for i in range(n):
            ways = (1 - v,) if pairs else (0, 1)
            others = torch.stack([z[w, k] for w in ways for k in range(n) if k != i])
            right += bool(z[v, i] @ z[1 - v, i] > (others @ z[v, i]).max())
    assert 0 < right < 2 * n
    assert loss.first(z, loss.negatives(z, range(n))[:, 1]) == pytest.approx(right / (2 * n))


def test_a_beta_whose_exponential_overflows_does_no_harm():
    z, loss = embeddings(4), GlobalLoss(beta=1e4)
    sums = loss.negatives(z, range(4))[:, 0]
    assert math.isfinite(loss.value(z, sums))
    assert loss.gradient(z, sums, range(4)).isfinite().all()


# --- ranks divide the rows --------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 64])
@pytest.mark.parametrize("n", [1, 3, 10])
def test_shares_are_consecutive_and_even(count, n):
    shares = [share_of(count, n, rank) for rank in range(n)]
    assert [k for share in shares for k in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("count", [1, 5, 12])
def test_shared_rows_are_all_rows_on_every_process(count):
    def rows(part):
        return torch.arange(part.start, part.stop)[:, None] * torch.tensor([1.0, 10.0, 100.0])

    expected = rows(range(count)).double()
    stacked = RankGroup(4, StackedTransport())
    assert torch.equal(in_shares(stacked, count, rows), expected)
    shared, _ = on_processes(3, lambda transport: in_shares(RankGroup(4, transport), count, rows))
    for found in shared:
        assert torch.equal(found, expected)
