"""Gradients of single examples against one backward pass per example."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gossamer.algorithms.low_rank.sltrain import layers_of, wrap
from gossamer.algorithms.oracles.per_sample import PerSampleGradients
from gossamer.algorithms.oracles.per_sample_terms import (
    Dense,
    Outer,
    add_weighted,
    full_precision,
    squared_norms,
)
from gossamer.algorithms.problems import Problem
from gossamer.algorithms.tasks.arrays import TensorDataset
from gossamer.runtime import ConfigError, RowLayout

M, CLASSES = 5, 3


@dataclass
class Bound:
    """Flat clipping that remembers the norms."""

    norm: float = 0.5
    squares: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def factors(self, squares):
        self.squares = squares
        whole = squares.sum(1, keepdim=True)
        return torch.where(torch.isfinite(whole), (self.norm / whole.sqrt()).clamp(max=1.0), 0.0)


class Tied(nn.Module):
    """A language model whose head is its embedding; positions are shared by all examples."""

    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(11, 6), nn.Embedding(4, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        places = torch.arange(tokens.shape[1])[None]
        return self.head(torch.tanh(self.norm(self.embed(tokens) + self.place(places))))


class Twice(nn.Module):
    """One layer used twice."""

    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.out(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Bare(nn.Module):
    """A parameter that no layer owns."""

    def __init__(self):
        super().__init__()
        self.scale, self.out = nn.Parameter(torch.ones(6)), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.out(x * self.scale)


class Hidden(nn.Module):
    """Uses its layer's weight behind the layer's back."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x):
        return F.linear(x, self.out.weight.square(), self.out.bias)


def sparse_low_rank(**options):
    layers = [nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4), nn.Flatten(), nn.Linear(28, CLASSES)]
    model = wrap(nn.Sequential(*layers), targets=["0", "2"], **options)
    for _, layer in layers_of(model):
        if layer.B is not None:
            nn.init.normal_(layer.B)
    return model


def picture(*layers):
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(CLASSES)), (2, 6, 6)


MODELS = {
    "linear": lambda: (nn.Linear(6, CLASSES), (6,)),
    "mlp": lambda: (nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, CLASSES)), (6,)),
    "sequence": lambda: (
        nn.Sequential(nn.Linear(6, 4), nn.RMSNorm(4), nn.Flatten(), nn.Linear(28, CLASSES)),
        (7, 6),
    ),
    "layer norm": lambda: (
        nn.Sequential(nn.LayerNorm((7, 6)), nn.Flatten(), nn.Linear(42, CLASSES)),
        (7, 6),
    ),
    "conv": lambda: picture(nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.GroupNorm(2, 4)),
    "dilated": lambda: picture(nn.Conv2d(2, 4, (3, 2), dilation=(2, 1), bias=False)),
    "grouped conv": lambda: picture(nn.Conv2d(2, 4, 3, groups=2)),
    "wide conv": lambda: picture(nn.Conv2d(2, 40, 5), nn.Tanh(), nn.Conv2d(40, 40, 2)),
    "conv 1d": lambda: (
        nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.Flatten(), nn.Linear(24, CLASSES)),
        (2, 6),
    ),
    "sparse and low rank": lambda: (sparse_low_rank(rank=2, density=0.3), (7, 6)),
    "sparse alone": lambda: (sparse_low_rank(rank=0, density=0.3), (7, 6)),
    "low rank, frozen": lambda: (sparse_low_rank(rank=2, density=0.3, freeze_a=True), (7, 6)),
    "trained scale": lambda: (sparse_low_rank(rank=2, density=0.3, train_scale=True), (7, 6)),
    "twice": lambda: (Twice(), (6,)),
    "bare parameter": lambda: (Bare(), (6,)),
    "hidden use": lambda: (Hidden(), (6,)),
}  # fmt: skip
UNTAPPED = {"bare parameter", "hidden use", "trained scale"}


def classification(name, dtype=torch.float64):
    torch.manual_seed(0)
    module, shape = MODELS[name]()
    inputs = torch.randn(M, *shape)
    module(inputs)  # lazy layers take their shape
    module, inputs = module.to(dtype), inputs.to(dtype)
    labels = torch.arange(M) % CLASSES

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    return problem_of(module, (inputs, labels), loss), (inputs, labels)


def language(dtype=torch.float64):
    torch.manual_seed(0)
    tokens = torch.randint(0, 11, (M, 4))
    tokens[0] = 3  # the same token again and again

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[0].roll(-1, 1).flatten())

    return problem_of(Tied().to(dtype), (tokens,), loss), (tokens,)


def problem_of(module, inputs, loss):
    return Problem(module, TensorDataset(inputs), (np.arange(M),), loss)


def reference(problem, layout, points, inputs):
    """Return every example's gradient, (M, d)."""
    rows = []
    for k in range(len(inputs[0])):
        total = torch.zeros(layout.d, dtype=layout.dtype)
        for c, row in points:
            grad = torch.zeros_like(total)
            layout.bind(problem.module, row, grad)
            problem.loss(problem.module, tuple(t[k : k + 1] for t in inputs)).backward()
            total += c * grad
        rows.append(total)
    return torch.stack(rows)


def found(problem, inputs, points, clip, layout):
    wide = torch.float64 if layout.dtype == torch.float64 else torch.float32
    out = torch.zeros(layout.d, dtype=wide)
    gradients = PerSampleGradients(problem, layout)
    gradients.add_clipped(points, inputs, clip, out, lambda row: layout.bind(problem.module, row))
    return gradients, out


def points_of(problem, layout, count):
    row = layout.gather(problem.module, torch.zeros(layout.d, dtype=layout.dtype))
    ahead = row + 0.3 * torch.randn(row.shape, dtype=row.dtype)
    return [(1.0, row)] if count == 1 else [(1.7, ahead), (-0.7, row)]


@pytest.mark.parametrize("count", [1, 2], ids=["one point", "two points"])
@pytest.mark.parametrize("name", [*MODELS, "tied"])
def test_norms_and_clipped_sums_are_those_of_single_backward_passes(name, count):
    problem, inputs = language() if name == "tied" else classification(name)
    layout, clip = RowLayout(problem.module), Bound()
    points = points_of(problem, layout, count)
    gradients, total = found(problem, inputs, points, clip, layout)
    assert gradients.is_tapped == (name not in UNTAPPED)
    each = reference(problem, layout, points, inputs)
    squares = torch.stack([each[:, s.begin : s.end].square().sum(1) for s in layout.slices], dim=1)
    torch.testing.assert_close(clip.squares, squares, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(total, (clip.factors(squares) * each).sum(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [*MODELS, "tied"])
def test_float32_norms_are_right_to_a_hundred_thousandth(name):
    problem, inputs = (
        language(torch.float32) if name == "tied" else classification(name, torch.float32)
    )
    layout, clip = RowLayout(problem.module), Bound()
    points = points_of(problem, layout, 2)
    found(problem, inputs, points, clip, layout)
    each = reference(problem, layout, points, inputs)
    norms, exact = clip.squares.sum(1).sqrt(), each.double().norm(dim=1)
    assert (norms >= exact * (1 - 1e-5)).all()  # what rounding may add is a part of it
    assert (norms <= exact * (1 + 1e-3) + 1e-6).all()


def test_an_example_whose_positions_cancel_is_still_bounded():
    torch.manual_seed(0)
    problem, inputs = classification("sequence", torch.float32)
    layout, clip = RowLayout(problem.module), Bound(1.0)
    row = layout.gather(problem.module, torch.zeros(layout.d))
    for apart in (1e-2, 1e-4, 1e-6):
        points = [(1e4, row), (-1e4, row + apart * torch.randn(row.shape))]
        for k in range(M):
            one = tuple(t[k : k + 1] for t in inputs)
            _, total = found(problem, one, points, clip, layout)
            assert total.norm() <= 1.0 + 1e-5


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    positions=st.sampled_from([1, 2, 9, 40]),
    width=st.sampled_from([1, 7, 256, 600]),
    powers=st.tuples(st.sampled_from([-30, -20, 0, 9]), st.sampled_from([-30, -20, 0, 9])),
    cancelled=st.sampled_from([0.0, 1e-6, 1e-3, 1.0]),
)
def test_norms_from_float32_products_are_never_too_small(seed, positions, width, powers, cancelled):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(3, positions, width, generator=generator)
    e = torch.randn(3, positions, 5, generator=generator)
    # The second half takes the first one back, but for a share.
    a[:, positions // 2 :] = a[:, : positions - positions // 2].clone()
    e[:, positions // 2 :] = (cancelled - 1) * e[:, : positions - positions // 2].clone()
    term = Outer(a * 10.0 ** powers[0], e * 10.0 ** powers[1])
    exact = torch.einsum("mtq,mtp->mqp", term.e.double(), term.a.double()).flatten(1).norm(dim=1)
    slack = term.rounding().double()
    norms = term.squares().sqrt() + slack
    assert (norms >= exact).all()
    assert (norms <= 1.011 * exact + 2.0 * slack).all()


def test_norms_in_float64_are_never_too_small_where_positions_all_but_cancel():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(1, 1, 64, generator=generator, dtype=torch.float64) * 1e6
    e = torch.randn(1, 1, 64, generator=generator, dtype=torch.float64) * 1e6
    for apart in (1e-12, 1e-10, 1e-9, 5e-9, 1e-7):
        both = Outer(torch.cat([a, a * (1 + apart)], 1), torch.cat([e, -e], 1))
        found, merged = squared_norms([both], torch.Size([64, 64]))
        assert isinstance(merged[0], Outer)  # by Gram matrices
        (left,) = a[0] - both.a[0, 1:]  # exact: neighbours in floating point
        true = float(left.norm() * e.norm())
        assert float(found.sqrt()) >= true * (1 - 1e-12)


def test_products_are_full_float32_whatever_the_caller_chose_and_however():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with full_precision():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_factors_too_small_for_their_digits_count_as_zero():
    g = torch.full((1, 4096), 3e38)
    squares, merged = squared_norms([Dense(g)], torch.Size([4096]))
    factors = (1e-4 / squares.sqrt()).float()
    out = torch.zeros(4096)
    add_weighted(merged, factors, None, out)
    assert float(out.double().norm()) <= 1e-4 * (1 + 1e-6)


@pytest.mark.parametrize("name", ["mlp", "sequence", "conv", "layer norm", "bare parameter"])
def test_norms_and_sums_of_a_bfloat16_module_are_float32(name):
    problem, inputs = classification(name, torch.bfloat16)
    layout, clip = RowLayout(problem.module), Bound()
    points = points_of(problem, layout, 1)
    gradients, total = found(problem, inputs, points, clip, layout)
    assert gradients.is_tapped == (name not in UNTAPPED)
    assert total.dtype == torch.float32
    # The gradients that came back through the module are rounded; what is made of them is not.
    each = reference(problem, layout, points, inputs).double()
    torch.testing.assert_close(
        clip.squares.double().sum(1).sqrt(), each.norm(dim=1), rtol=0.03, atol=0
    )
    alone = []
    for k in range(M):
        one, bound = tuple(t[k : k + 1] for t in inputs), Bound()
        alone.append(found(problem, one, points, bound, layout)[1])
        assert alone[-1].norm() <= bound.norm * (1 + 1e-5)
    torch.testing.assert_close(total, torch.stack(alone).sum(0), rtol=0.03, atol=0.003)


def test_a_lower_precision_of_products_is_put_back_after_the_sums():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("name", ["mlp", "conv", "layer norm", "bare parameter"])
def test_an_example_that_is_not_finite_adds_nothing(name, poison):
    problem, inputs = classification(name, torch.float32)
    layout, clip = RowLayout(problem.module), Bound()
    points = points_of(problem, layout, 1)
    bad = (inputs[0].clone(), inputs[1])
    bad[0][2] = poison
    gradients = PerSampleGradients(problem, layout)
    totals = []
    for batch in (bad, tuple(t[[0, 1, 3, 4]] for t in inputs)):
        totals.append(torch.zeros(layout.d))
        bind = lambda row: layout.bind(problem.module, row)  # noqa: E731
        gradients.add_clipped(points, batch, clip, totals[-1], bind)
    apart = (totals[0] - totals[1]).norm()
    assert apart <= clip.norm * (1 + 1e-6)
    if poison != 1e30:
        assert apart < 1e-6


def test_a_frozen_parameter_takes_no_part_in_the_norm():
    problem, inputs = classification("mlp")
    problem.module[0].weight.requires_grad_(False)
    layout, clip = RowLayout(problem.module), Bound()
    points = points_of(problem, layout, 1)
    found(problem, inputs, points, clip, layout)
    assert clip.squares.shape == (M, 3)
    torch.testing.assert_close(
        clip.squares.sum(1), reference(problem, layout, points, inputs).square().sum(1)
    )
    assert [p.requires_grad for p in problem.module.parameters()] == [False, True, True, True]


def test_batch_norm_is_refused_with_the_fix():
    module = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    problem = problem_of(module, (torch.zeros(M, 6),), lambda model, batch: model(*batch).sum())
    with pytest.raises(ConfigError, match=r"'1' is a BatchNorm1d.*GroupNorm or LayerNorm"):
        PerSampleGradients(problem, RowLayout(module))


def test_statistics_of_examples_are_refused():
    module = nn.Sequential(nn.InstanceNorm1d(2, track_running_stats=True), nn.Linear(6, 1))
    problem = problem_of(module, (torch.zeros(M, 2, 6),), lambda model, batch: model(*batch).sum())
    with pytest.raises(ConfigError, match=r"'0' is a InstanceNorm1d.*keeps their statistics"):
        PerSampleGradients(problem, RowLayout(module))


class Centred(nn.Module):
    """Subtracts the mean of the batch, in training only."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.out(x - x.mean(0) if self.training else x)


def penalised(model, batch):
    penalty = sum(p.square().sum() for p in model.parameters())
    return F.cross_entropy(model(batch[0]), batch[1]) + penalty


def class_weighted(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], weight=torch.tensor([1.0, 100.0, 1.0]))


@pytest.mark.parametrize("name", ["centred", "penalised", "weighted"])
def test_losses_in_which_examples_meet_are_taken_one_example_at_a_time(name):
    inputs = (torch.randn(M, 6), torch.arange(M) % CLASSES)
    module = Centred() if name == "centred" else nn.Linear(6, CLASSES)
    for p in module.parameters():
        nn.init.zeros_(p)
    losses = {"penalised": penalised, "weighted": class_weighted}
    loss = losses.get(name, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    problem = problem_of(module, inputs, loss)
    assert not PerSampleGradients(problem, RowLayout(module)).is_tapped


def test_examples_of_different_weight_are_taken_one_at_a_time():
    problem, inputs = classification("linear")
    problem.weigh = lambda batch: float((batch[1] + 1).sum())
    layout, clip = RowLayout(problem.module), Bound()
    points = points_of(problem, layout, 1)
    _, total = found(problem, inputs, points, clip, layout)
    each = reference(problem, layout, points, inputs)
    torch.testing.assert_close(total, (clip.factors(clip.squares) * each).sum(0))


def test_gpt2_is_tapped_and_agrees():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=13, n_positions=8, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    module = transformers.GPT2LMHeadModel(config).double()
    tokens = torch.randint(0, 13, (M, 6))

    def loss(model, batch):
        return model(input_ids=batch[0], labels=batch[0]).loss

    problem = problem_of(module, (tokens,), loss)
    layout, clip = RowLayout(module), Bound()
    points = points_of(problem, layout, 2)
    gradients, total = found(problem, (tokens,), points, clip, layout)
    assert gradients.is_tapped
    each = reference(problem, layout, points, (tokens,))
    torch.testing.assert_close(clip.squares.sum(1), each.square().sum(1), rtol=1e-6, atol=0)
    factors = clip.factors(clip.squares)
    torch.testing.assert_close(total, (factors * each).sum(0), rtol=1e-6, atol=1e-9)


def test_a_parameter_of_one_number_has_norms_and_a_sum_too():
    terms = [Dense(torch.tensor([3.0, torch.inf, 4.0])), Dense(torch.tensor([-1.0, 0.0, 1.0]))]
    squares, merged = squared_norms(terms, torch.Size([]))
    expected = torch.tensor([4.0, 25.0], dtype=torch.float64)
    torch.testing.assert_close(squares[[0, 2]], expected, rtol=1e-5, atol=0)  # with the slack
    bad, out = ~torch.isfinite(squares), torch.tensor(1.0)
    add_weighted(merged, torch.tensor([0.5, 1.0, 2.0]), bad, out)
    assert bad.tolist() == [False, True, False]
    assert out.item() == 1 + 0.5 * 2 + 2.0 * 5
