"""What a program has counted: examples or tokens of all ranks, and nothing that is private."""

import pytest
import torch
from private_for_tests import problem, program
from test_token_weights import LENGTHS, N, documents

from gossamer.algorithms.decentralized.ad_psgd import ADPSGD
from gossamer.algorithms.decentralized.all_reduce import AllReduce
from gossamer.algorithms.decentralized.local_sgd import LocalSGD
from gossamer.algorithms.optimizers.sgd import SGD
from gossamer.algorithms.oracles.backprop import Backprop
from gossamer.algorithms.program import TrainingProgram
from gossamer.runtime import Communicator, StackedTransport
from gossamer.runtime.peak_memory import peak_memory_mib
from gossamer.topologies import build


def after(steps, algorithm, task, n=4, **options):
    """Return the totals after so many steps."""
    graph = algorithm.adapt(build("ring", n))
    comm = Communicator(graph, StackedTransport(), steps=steps)
    made = TrainingProgram(comm, task, Backprop(**options), algorithm).start()
    assert set(made.totals().values()) == {0}  # `init` looked at batches that count in `step`
    for comm.step in range(steps):
        made.step()
    return made.totals()


SGD_ = SGD(lr=0.1)


@pytest.mark.parametrize(
    ("algorithm", "per_step"),
    [
        (AllReduce(optimizer=SGD_), 4 * 5),
        (AllReduce(optimizer=SGD_, per_layer=True), 4 * 5),
        (LocalSGD(optimizer=SGD_, local_steps=3), 3 * 4 * 5),
        (ADPSGD(optimizer=SGD_), 4 * 5),
    ],
)
def test_every_draw_of_every_rank_counts(algorithm, per_step):
    assert after(6, algorithm, problem(4), batch_size=5) == {"examples": 6 * per_step}


def test_language_models_count_the_tokens_they_predict():
    totals = after(3, AllReduce(optimizer=SGD_), documents(LENGTHS), N, sampling="full")
    assert totals == {"tokens": 3 * sum(LENGTHS)}


@pytest.mark.parametrize(("shown", "names"), [(False, []), (True, ["nonprivate_examples"])])
def test_how_many_examples_private_coins_drew_is_hidden_or_marked(shown, names):
    made = program(2, noise_multiplier=1.0, steps=2, show_nonprivate=shown, accountant="rdp")
    for made.comm.step in range(2):
        made.step()
    totals = made.totals()
    assert list(totals) == names
    assert all(count > 0 for count in totals.values())


def test_the_peak_is_of_what_was_held_also_when_it_is_no_more():
    comm = Communicator(build("ring", 2), StackedTransport())
    before = peak_memory_mib(comm)
    held = torch.ones(int(before) + 64 << 18)  # MiB of float32
    size = held.nbytes / 2**20
    del held
    assert size < peak_memory_mib(comm) < before + size + 16
