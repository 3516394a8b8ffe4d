"""The evaluator: its figures against slow obvious ones, and the same bits for any process split."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from thread_ranks import on_processes
from torch import nn

from gossamer.algorithms.evaluation import Evaluator
from gossamer.algorithms.oracles.buffers import BufferRows
from gossamer.algorithms.problems import Problem
from gossamer.algorithms.tasks.arrays import TensorDataset
from gossamer.algorithms.tasks.bundled import Digits, Wine
from gossamer.algorithms.tasks.least_squares import LeastSquares
from gossamer.algorithms.zeroth_order.zeroth_order import ZerothOrder
from gossamer.runtime import Communicator
from gossamer.runtime.collectives import RankGroup
from gossamer.runtime.rows import RowLayout
from gossamer.runtime.transports.stacked import StackedTransport
from gossamer.topologies import build


def rows_around(problem, n, scale=0.1):
    """Return (n, d) different rows with zero padding, and the layout."""
    layout = RowLayout(problem.module)
    x = torch.empty(n, layout.d, dtype=layout.dtype)
    layout.gather(problem.module, x[0])
    x[:] = x[0].clone()
    generator = torch.Generator().manual_seed(0)
    for row in x:
        for view in layout.views(row):
            view += scale * torch.randn(view.shape, generator=generator, dtype=layout.dtype)
    return x, layout


def evaluate(comm, problem, x, layout, **options):
    oracle = SimpleNamespace(
        weighting=None, layout=layout, backpropagates=True, examples_at_once=None
    )
    evaluator = Evaluator(comm, oracle, problem, **options)
    return evaluator.evaluate(x[comm.ranks.start : comm.ranks.stop])


def wine(n=5, **fields):
    return Wine(dtype="float64", heterogeneity="sorted", l2=0.01, **fields).build(n, 0)


def at(problem, layout, row):
    layout.bind(problem.module, row)
    return problem.module


@pytest.mark.parametrize("objective", ["ranks", "examples"])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_figures_are_what_they_say(objective, chunk):
    n, problem = 5, wine()  # 142 training examples: shards of 29 and 28
    x, layout = rows_around(problem, n)
    figures = evaluate(
        RankGroup(n, StackedTransport()),
        problem,
        x,
        layout,
        objective=objective,
        chunk=chunk,
        rank_grad_norm=True,
    )
    mean = x.mean(dim=0)
    shares = [len(s) / 142 if objective == "examples" else 1 / n for s in problem.shards]

    def f(row):
        row = row.clone().requires_grad_()
        parts = [row[s.begin : s.end].view(s.shape) for s in layout.slices]
        names = [s.name for s in layout.slices]
        losses = []
        for shard in problem.shards:
            features, labels = problem.train[torch.from_numpy(shard)]
            given = dict(zip(names, parts, strict=True))
            outputs = torch.func.functional_call(problem.module, given, (features,))
            losses.append(nn.functional.cross_entropy(outputs, labels))
        value = sum(a * b for a, b in zip(shares, losses, strict=True))
        value = value + 0.01 * row.square().sum()
        (gradient,) = torch.autograd.grad(value, row)
        return value.item(), gradient.norm().item()

    loss, grad_norm = f(mean)
    assert figures["loss"] == pytest.approx(loss, rel=1e-12)
    assert figures["grad_norm"] == pytest.approx(grad_norm, rel=1e-12)
    assert figures["rank_grad_norm"] == pytest.approx(np.mean([f(r)[1] for r in x]), rel=1e-12)
    consensus = ((x - mean).square().sum() / n).sqrt().item()
    assert figures["consensus"] == pytest.approx(consensus, rel=1e-12)

    def test_figures(row):
        module, test = at(problem, layout, row), problem.test.tensors
        with torch.no_grad():
            right = problem.score(module, test)["accuracy"].item()
            return problem.loss(module, test).item(), right / len(problem.test)

    loss, accuracy = test_figures(mean)
    assert figures["test_loss"] == pytest.approx(loss, rel=1e-12)
    assert figures["accuracy"] == pytest.approx(accuracy, rel=1e-12)
    losses, accuracies = zip(*map(test_figures, x), strict=True)
    assert figures["rank_loss"] == pytest.approx(np.mean(losses), rel=1e-12)
    assert figures["worst_rank_loss"] == pytest.approx(max(losses), rel=1e-12)
    assert figures["rank_accuracy"] == pytest.approx(np.mean(accuracies), rel=1e-12)
    assert figures["worst_rank_accuracy"] == min(accuracies)
    assert "perplexity" not in figures


def test_examples_to_choose_by_have_figures_of_their_own():
    problem = wine()
    x, layout = rows_around(problem, 5)
    plain = evaluate(RankGroup(5, StackedTransport()), problem, x, layout)
    problem.dev = problem.test
    both = evaluate(RankGroup(5, StackedTransport()), problem, x, layout)
    assert both.pop("dev_loss") == both["test_loss"]
    assert both.pop("dev_accuracy") == both["accuracy"]
    assert both == plain


def test_without_gradients_all_else_is_the_same():
    problem = wine()
    x, layout = rows_around(problem, 5)
    whole = evaluate(RankGroup(5, StackedTransport()), problem, x, layout)
    assert whole.pop("grad_norm") > 0
    assert evaluate(RankGroup(5, StackedTransport()), problem, x, layout, gradient=False) == whole


def test_forward_passes_alone_keep_no_graph_and_no_gradient_and_are_no_larger_than_a_step():
    batches, graphs = [], []

    def loss(module, inputs):
        batches.append(len(inputs[0]))
        value = module(inputs[0]).square().mean()
        graphs.append(value.requires_grad)
        return value

    data = TensorDataset((torch.randn(20, 3),))
    problem = Problem(nn.Linear(3, 1), data, (np.arange(20),), loss)
    comm = Communicator(build("ring", 1), StackedTransport())
    oracle = ZerothOrder(batch_size=8)
    oracle.setup(comm, problem)
    row = torch.zeros(1, oracle.layout.d)
    batches.clear()
    graphs.clear()
    figures = Evaluator(comm, oracle, problem).evaluate(row)
    assert set(figures) == {"loss", "consensus", "rank_loss", "worst_rank_loss"}
    assert batches == [8, 8, 4] * 2
    assert not any(graphs)
    assert "grad_norm" in Evaluator(comm, oracle, problem, gradient=True).evaluate(row)


@pytest.mark.parametrize("options", [{}, {"objective": "examples", "examples": 11}])
def test_the_split_over_processes_does_not_change_a_bit(options):
    # float32, a test set smaller than the world is large in parts, unequal shards
    def make():
        return Digits(examples=100, test_examples=7, hidden=(8,)).build(9, 0)

    def work(comm, problem):
        x, layout = rows_around(problem, 9)
        return evaluate(comm, problem, x, layout, **options)

    expected = work(RankGroup(9, StackedTransport()), make())
    for processes in (2, 4, 9):
        problems = [make() for _ in range(processes)]  # torch's generator is not the threads' own

        def on_thread(transport, problems=problems):
            return work(RankGroup(9, transport), problems[transport.process])

        for figures in on_processes(processes, on_thread)[0]:
            assert figures == expected


def test_without_a_test_set_accuracy_is_that_of_the_training_set():
    problem = wine(test_examples=0)
    x, layout = rows_around(problem, 5)
    figures = evaluate(RankGroup(5, StackedTransport()), problem, x, layout, objective="examples")
    right = problem.score(at(problem, layout, x.mean(dim=0)), problem.train.tensors)
    assert figures["accuracy"] == pytest.approx(right["accuracy"].item() / 178, rel=1e-12)
    own = {"rank_loss", "worst_rank_loss", "rank_accuracy", "worst_rank_accuracy"}
    assert set(figures) == {"loss", "grad_norm", "consensus", "accuracy"} | own


@pytest.mark.parametrize("held_out", [0, 36])
def test_a_score_is_computed_on_the_test_set_alone_where_there_is_one(held_out):
    problem, scored = wine(test_examples=held_out), []
    score = problem.score
    problem.score = lambda module, inputs: scored.append(len(inputs[0])) or score(module, inputs)
    x, layout = rows_around(problem, 5)
    options = {"per_rank": False, "rank_grad_norm": True}
    figures = evaluate(RankGroup(5, StackedTransport()), problem, x, layout, **options)
    assert 0 <= figures["accuracy"] <= 1
    trained = 0 if held_out else 178 * 6  # at the mean, and at each rank's row
    assert sum(scored) == 1 + held_out + trained  # 1: to see what scores there are


def test_a_cap_takes_examples_from_all_over_a_sorted_shard():
    labels = torch.arange(40) // 4
    seen = []
    problem = Problem(
        module=nn.Linear(1, 1),
        train=TensorDataset((labels,)),
        shards=(np.arange(40),),
        loss=lambda module, inputs: seen.append(inputs[0]) or module.weight.sum(),
    )
    x, layout = rows_around(problem, 1)
    evaluate(
        RankGroup(1, StackedTransport()), problem, x, layout, examples=10, chunk=4, per_rank=False
    )
    assert [len(part) for part in seen] == [4, 4, 2]
    assert torch.cat(seen).tolist() == list(range(10))


def test_a_capped_shard_still_weighs_what_it_holds():
    values = torch.tensor([0.0] * 90 + [1.0] * 10)
    problem = Problem(
        module=nn.Linear(1, 1),
        train=TensorDataset((values,)),
        shards=(np.arange(90), np.arange(90, 100)),
        loss=lambda module, inputs: inputs[0].mean() + 0 * module.weight.sum(),
    )
    x, layout = rows_around(problem, 2)
    comm = RankGroup(2, StackedTransport())
    for objective, loss in (("examples", 0.1), ("ranks", 0.5)):
        for cap in (None, 20, 5):
            figures = evaluate(comm, problem, x, layout, objective=objective, examples=cap)
            assert figures["loss"] == pytest.approx(loss, rel=1e-12)


def test_a_stream_is_evaluated_on_fresh_examples_of_its_own():
    problem = LeastSquares(dtype="float64", features=10, noise=0.0).build(3, 0)
    x, layout = rows_around(problem, 3)
    comm = RankGroup(3, StackedTransport())
    figures = evaluate(comm, problem, x, layout)
    assert figures == evaluate(comm, problem, x, layout)
    # E (a . (x - beta))^2 / 2 = |x - beta|^2 / 2 and its gradient is x - beta
    gap = x.mean(dim=0)[:10] - problem.train.beta
    assert figures["loss"] == pytest.approx(gap.square().sum().item() / 2, rel=0.15)
    assert figures["grad_norm"] == pytest.approx(gap.norm().item(), rel=0.15)
    assert figures["test_loss"] == pytest.approx(figures["loss"], rel=0.2)
    assert "accuracy" not in figures


def test_a_loss_per_token_gives_the_perplexity():
    problem = wine()
    seen = []
    problem.weigh = lambda inputs: seen.append(len(inputs[0])) or 2.0 * len(inputs[0])
    x, layout = rows_around(problem, 5)
    figures = evaluate(RankGroup(5, StackedTransport()), problem, x, layout)
    assert max(seen) <= 128
    assert figures["perplexity"] == pytest.approx(np.exp(figures["test_loss"]), rel=1e-12)


def test_the_module_is_given_back_and_traffic_is_not_counted():
    problem, comm = wine(), RankGroup(5, StackedTransport())
    problem.module.append(nn.Dropout(0.5))
    x, layout = rows_around(problem, 5)
    grad = torch.ones(layout.d, dtype=layout.dtype)
    layout.bind(problem.module, x[3], grad)
    before = x.clone()
    evaluate(comm, problem, x, layout)
    assert all(m.training for m in problem.module.modules())
    weight = next(problem.module.parameters())
    assert weight.data_ptr() == x[3].data_ptr()
    assert weight.grad.data_ptr() == grad.data_ptr()
    assert torch.equal(grad, torch.ones_like(grad))
    assert torch.equal(x, before)
    assert not comm.traffic.bytes_sent.any()


def test_a_diverged_run_says_so():
    problem = wine()
    x, layout = rows_around(problem, 5)
    x[2, :3] = float("nan")
    figures = evaluate(RankGroup(5, StackedTransport()), problem, x, layout)
    assert np.isnan(figures["loss"])
    assert np.isnan(figures["worst_rank_loss"])
    assert np.isnan(figures["grad_norm"])


def test_running_statistics_are_averaged_for_the_mean_row_and_kept_apart_per_rank():
    problem = wine()
    problem.module = nn.Sequential(nn.BatchNorm1d(13), nn.Linear(13, 3)).double()
    x, layout = rows_around(problem, 2)
    problem.shards = tuple(np.array_split(np.arange(142), 2))
    buffers = BufferRows(problem.module, 2)
    for i in range(2):
        buffers.bind(i)
        problem.module[0].running_mean += i
    oracle = SimpleNamespace(
        weighting=None, layout=layout, buffers=buffers, backpropagates=True, examples_at_once=None
    )
    figures = Evaluator(RankGroup(2, StackedTransport()), oracle, problem).evaluate(x)
    assert torch.equal(problem.module[0].running_mean, torch.ones(13).double())
    problem.module.eval()
    losses = []
    for row, mean in [(x[0], 0.0), (x[1], 1.0), (x.mean(dim=0), 0.5)]:
        module = at(problem, layout, row)
        module[0].running_mean.data = torch.full((13,), mean).double()
        losses.append(problem.loss(module, problem.test.tensors).item())
    assert figures["test_loss"] == pytest.approx(losses[2], rel=1e-12)
    assert figures["worst_rank_loss"] == pytest.approx(max(losses[:2]), rel=1e-12)
