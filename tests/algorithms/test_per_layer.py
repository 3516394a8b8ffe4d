"""Updates parameter by parameter: the bits of whole gradients, without ever holding one."""

import threading
from dataclasses import replace

import pytest
import torch
from private_for_tests import problem as small_problem
from thread_ranks import on_processes
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from gossamer.algorithms.decentralized.all_reduce import AllReduce
from gossamer.algorithms.optimizers.adam import Adam, AdamW
from gossamer.algorithms.optimizers.adam8bit import Adam8bit
from gossamer.algorithms.optimizers.galore import GaLore
from gossamer.algorithms.optimizers.sgd import SGD, Momentum
from gossamer.algorithms.oracles.backprop import Backprop
from gossamer.algorithms.problems import Batch, Problem
from gossamer.algorithms.program import TrainingProgram
from gossamer.algorithms.tasks.arrays import TensorDataset
from gossamer.algorithms.tasks.language import Windows, count_next_tokens, next_token_loss
from gossamer.algorithms.tasks.transformer import Transformer
from gossamer.runtime import Communicator, ConfigError, PeerLost, StackedTransport
from gossamer.topologies import build

OPTIMIZERS = {
    "sgd": SGD(lr=0.3, weight_decay=0.01),
    "momentum": Momentum(lr=0.1, nesterov=True),
    "adam": Adam(lr=0.01),
    "adamw": AdamW(lr=0.01, decay_except=("norm", "bias")),
    "adam8bit": Adam8bit(lr=0.01, weight_decay=0.1),
    "galore": GaLore(lr=0.01, rank=4, refresh=2, targets=("weight",), weight_decay=0.1),
}


class WithIdle(nn.Module):
    """A transformer whose output is its embedding, and a layer between that gets no gradient.

    The embedding is large enough for 8-bit moments, one idle matrix small enough for galore's rank.
    """

    def __init__(self):
        super().__init__()
        self.first = Transformer(vocabulary=512, context=8, layers=2, width=8, heads=2, tied=True)
        self.idle = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, tokens):
        return self.first(tokens) * self.scale


def language(n, dtype=torch.float32):
    torch.manual_seed(0)
    windows = Windows(torch.randint(16, (8 * 12 * n + 1,)), 8)
    places = torch.arange(len(windows)).numpy().reshape(n, -1)
    module = WithIdle().to(dtype)
    return Problem(module, windows, tuple(places), next_token_loss, weigh=count_next_tokens)


def communicator(n):
    return Communicator(build("complete", n), StackedTransport(), steps=3)


def trained(n, optimizer, per_layer, dtype=torch.float32, **options):
    comm = communicator(n)
    algorithm = AllReduce(optimizer=optimizer, per_layer=per_layer)
    oracle = Backprop(batch_size=6, **options)
    program = TrainingProgram(comm, language(n, dtype), oracle, algorithm).start()
    for comm.step in range(3):
        figures = program.step()
    return program, figures


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_the_bits_are_those_of_whole_gradients(name, n, micro_batch_size):
    options = {"micro_batch_size": micro_batch_size}
    whole, figures = trained(n, OPTIMIZERS[name], False, **options)
    layered, same = trained(n, OPTIMIZERS[name], True, **options)
    assert layered.parameters_sha256() == whole.parameters_sha256()
    assert torch.equal(figures["batch_loss"], same["batch_loss"])
    for a, b in zip(whole.snapshot()[0].values(), layered.snapshot()[0].values(), strict=True):
        assert torch.equal(a, b)  # moments too
    assert whole.snapshot()[1] == layered.snapshot()[1]  # and how many gradients went in


@pytest.mark.parametrize("name", ["momentum", "adam8bit", "galore"])
@pytest.mark.parametrize("n", [1, 4])
def test_rows_of_bfloat16_have_the_same_bits_too(name, n):
    whole, layered = (
        trained(n, OPTIMIZERS[name], per_layer, torch.bfloat16)[0] for per_layer in (False, True)
    )
    assert layered.layout.dtype == torch.bfloat16
    assert layered.parameters_sha256() == whole.parameters_sha256()


def test_the_bytes_are_those_of_the_row_without_its_padding():
    n = 4
    program, _ = trained(n, OPTIMIZERS["sgd"], True)
    sizes = [s.shape.numel() for s in program.layout.slices]
    sent = sum(2 * size * 4 * (n - 1) // n for size in sizes)
    assert program.comm.traffic.bytes_sent.tolist() == [3 * sent] * n
    assert program.comm.traffic.messages_sent.tolist() == [3 * 2 * len(sizes)] * n


# --- what the oracle hands on -------------------------------------------------------------------


def one_rank(problem, **options):
    comm = communicator(1)
    oracle = Backprop(**options)
    oracle.setup(comm, problem)
    x = comm.alloc(oracle.layout.d, oracle.layout.dtype)
    oracle.layout.gather(problem.module, x[0])
    shard = torch.from_numpy(problem.shards[0])
    return comm, oracle, x, [Batch(problem.train[shard])]


def handed_on(oracle, x, batches):
    seen = []
    estimate = oracle(x, batches, sink=lambda where, grad: seen.append((where, grad.clone())))
    assert estimate.grad is None
    return seen


@pytest.mark.parametrize("micro_batch_size", [None, 5])
def test_every_parameter_is_handed_on_once_also_those_without_a_gradient(micro_batch_size):
    options = {"micro_batch_size": micro_batch_size}
    _, oracle, x, batches = one_rank(language(1), **options)
    _, other, _, _ = one_rank(language(1), **options)
    row = other(x, batches).grad
    seen = handed_on(oracle, x, batches)
    slices = {s.begin: s for s in oracle.layout.slices}
    assert sorted(where.start for where, _ in seen) == sorted(slices)
    for where, grad in seen:
        assert grad.shape == (1, slices[where.start].shape.numel())
        assert torch.equal(grad, row[:, where])
    idle = [s.begin for s in oracle.layout.slices if s.name.startswith("idle")]
    assert [where.start for where, _ in seen[-2:]] == idle
    assert not any(grad.any() for _, grad in seen[-2:])


def test_the_order_does_not_depend_on_the_batch():
    _, oracle, x, batches = one_rank(language(1))
    _, starting_empty, _, _ = one_rank(language(1))
    empty = [Batch(tuple(t[:0] for t in batches[0].inputs))]
    first = [where for where, _ in handed_on(oracle, x, batches)]
    assert [where for where, _ in handed_on(starting_empty, x, empty)] == first
    assert not any(grad.any() for _, grad in handed_on(oracle, x, empty))


class Crossed(nn.Module):
    """Two layers whose order in the forward pass the inputs choose."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, inputs):
        first, second = (self.a, self.b) if inputs[0, 0] > 0 else (self.b, self.a)
        return second(first(inputs))


def squares(module, inputs):
    return module(inputs[0]).square().mean()


def dense(module, rows=6):
    inputs = torch.randn(rows, 4, generator=torch.Generator().manual_seed(1))
    inputs[:, 0] = inputs[:, 0].abs()
    data = TensorDataset((inputs,))
    return Problem(module, data, (torch.arange(rows).numpy(),), squares)


def test_a_graph_that_follows_its_inputs_is_handed_on_in_the_same_order():
    _, oracle, x, batches = one_rank(dense(Crossed()))
    order = [where for where, _ in handed_on(oracle, x, batches)]
    turned = [Batch((-batches[0].inputs[0],))]
    assert [where for where, _ in handed_on(oracle, x, turned)] == order
    row = oracle(x, turned).grad
    assert all(torch.equal(grad, row[:, where]) for where, grad in handed_on(oracle, x, turned))


def test_looking_for_the_order_leaves_running_statistics_alone():
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    _, oracle, x, batches = one_rank(dense(module))
    _, other, _, _ = one_rank(dense(module))
    handed_on(oracle, x, batches)
    other(x, batches)
    for name, rows in other.state_dict().items():
        assert torch.equal(oracle.state_dict()[name], rows)


# --- gradients that share memory ----------------------------------------------------------------


class Summed(nn.Module):
    """A weight that is a sum of flat parts: each part's gradient is a view of the same memory.

    Backward reads that memory on for the two factors of the last part.
    """

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.base = nn.Parameter(torch.randn(4, 4, generator=generator))
        self.change = nn.Parameter(torch.zeros(16))
        self.left = nn.Parameter(torch.randn(4, 2, generator=generator))
        self.right = nn.Parameter(torch.randn(2, 4, generator=generator))

    def forward(self, inputs):
        product = self.left @ self.right
        weight = self.base.view(-1) + self.change.view(-1) + product.view(-1)
        return inputs @ weight.view(4, 4)


def test_autograd_gives_two_parameters_views_of_one_memory():
    module = Summed()
    squares(module, (torch.randn(3, 4),)).backward()
    assert StorageWeakRef(module.base.grad.untyped_storage()) == StorageWeakRef(
        module.change.grad.untyped_storage()
    )


@pytest.mark.parametrize("sizes", [(12,), (6, 6), (4, 8)])
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_gradients_that_share_memory_are_each_their_own(sizes, micro_batch_size):
    def after(per_layer):
        def process(transport):
            comm = Communicator(build("complete", len(sizes)), transport, steps=3, timeout_s=30)
            places = torch.arange(12).split(list(sizes))
            # A shard of another size than the mean's has its gradients multiplied.
            shards = tuple(p.numpy() for p in places)
            problem = replace(dense(Summed(), 12), shards=shards, objective="examples")
            oracle = Backprop(sampling="full", micro_batch_size=micro_batch_size)
            algorithm = AllReduce(optimizer=SGD(lr=0.1), per_layer=per_layer)
            program = TrainingProgram(comm, problem, oracle, algorithm).start()
            for comm.step in range(3):
                figures = program.step()
            return program.parameters_sha256(), figures["batch_loss"].tolist()

        return on_processes(len(sizes), process)[0]

    assert after(True) == after(False)


# --- memory -------------------------------------------------------------------------------------


def most_bytes_alive(micro_batch_size):
    """Return the most gradient bytes alive at once, and those of a whole gradient."""
    module = nn.Sequential(*(nn.Linear(4 if k == 0 else 64, 64) for k in range(12)))
    problem = dense(module)
    _, oracle, x, batches = one_rank(problem, micro_batch_size=micro_batch_size)
    handed, most = [], 0

    def take(where, grad):
        nonlocal most
        handed.append((StorageWeakRef(grad.untyped_storage()), grad.nbytes))
        alive = sum(size for ref, size in handed if not ref.expired())
        alive += sum(p.grad.nbytes for p in module.parameters() if p.grad is not None)
        most = max(most, alive)

    oracle(x, batches, sink=take)
    assert len(handed) == len(oracle.layout.slices)
    assert all(ref.expired() for ref, _ in handed)
    assert oracle._row is None  # nor is there a row
    return most, 4 * oracle.layout.size


def test_no_more_than_a_layers_gradients_live_at_once():
    most, whole = most_bytes_alive(None)
    assert 4 * 64 * 64 <= most <= 4 * (64 * 64 + 64) < whole / 10


def test_micro_batches_hold_a_whole_gradient():
    most, whole = most_bytes_alive(4)
    assert most == whole


# --- what goes wrong ----------------------------------------------------------------------------


def test_an_error_in_the_sink_reaches_the_caller_as_it_is():
    _, oracle, x, batches = one_rank(language(1))

    def lost(where, grad):
        raise PeerLost("step 0: all_reduce: process 1 is gone")

    with pytest.raises(PeerLost, match="all_reduce: process 1 is gone"):
        oracle(x, batches, sink=lost)
    assert len(handed_on(oracle, x, batches)) == len(oracle.layout.slices)  # no hook is left


class Shared(nn.Module):
    """A checkpointed layer that runs twice."""

    def __init__(self):
        super().__init__()
        self.first, self.layer = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, inputs):
        h = self.first(inputs)
        for _ in range(2):
            h = checkpoint(self.layer, h, use_reentrant=True)
        return h


def test_a_gradient_that_comes_in_two_parts_is_refused():
    _, oracle, x, batches = one_rank(dense(Shared()))
    with pytest.raises(ConfigError, match=r"'layer\.\w+' is completed twice .*=False"):
        handed_on(oracle, x, batches)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_layers_are_handed_on(use_reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, inputs):
            h = torch.tanh(self.layers[0](inputs))
            for layer in self.layers[1:]:
                h = torch.tanh(checkpoint(layer, h, use_reentrant=use_reentrant))
            return h

    _, oracle, x, batches = one_rank(dense(Checkpointed()))
    row = oracle(x, batches).grad
    seen = handed_on(oracle, x, batches)
    assert len(seen) == 6
    assert all(torch.equal(grad, row[:, where]) for where, grad in seen)


class PastAutograd(nn.Module):
    """Multiplies what an early layer gives by a late layer's weight, taken past autograd."""

    def __init__(self):
        super().__init__()
        self.early, self.late = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, inputs):
        return self.late(self.early(inputs) * self.late.weight.detach()[0])


def test_a_parameter_that_backward_still_reads_must_not_move():
    _, oracle, x, batches = one_rank(dense(PastAutograd()))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        oracle(x, batches, sink=lambda where, grad: x[:, where].sub_(grad))


@pytest.mark.cuda
@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_a_gpus_gradients_come_on_the_callers_thread(micro_batch_size):
    comm = Communicator(build("complete", 1), StackedTransport("cuda"))
    problem = language(1)
    oracle = Backprop(micro_batch_size=micro_batch_size)
    oracle.setup(comm, problem)
    x = comm.alloc(oracle.layout.d, oracle.layout.dtype)
    oracle.layout.gather(problem.module, x[0])
    batches = [Batch(problem.train[torch.from_numpy(problem.shards[0])])]
    threads = set()

    def take(where, grad):
        threads.add(threading.get_ident())
        torch.testing.assert_close(grad, row[:, where], rtol=0, atol=1e-6)

    row = oracle(x, batches).grad
    oracle(x, batches, sink=take)
    assert threads == {threading.get_ident()}


def test_no_gradient_norm_is_evaluated_unless_it_is_asked_for():
    def figures(per_layer, **options):
        algorithm = AllReduce(optimizer=SGD(lr=0.1), per_layer=per_layer)
        task = small_problem(1)
        program = TrainingProgram(communicator(1), task, Backprop(), algorithm, options).start()
        return program.evaluate()

    assert "grad_norm" in figures(False)
    assert "grad_norm" not in figures(True)
    assert figures(True, gradient=True)["grad_norm"] == figures(False)["grad_norm"]


def test_the_mean_of_equal_rows_is_one_of_them_and_no_copy():
    program, _ = trained(4, OPTIMIZERS["sgd"], True)
    x = program.state.x
    for s in program.layout.slices:
        assert program.mean()[s.name].data_ptr() == x[0, s.begin : s.end].data_ptr()
