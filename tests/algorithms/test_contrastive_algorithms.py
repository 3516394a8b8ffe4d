"""The contrastive oracle under every algorithm and beside other layers, or the reason why not."""

import pytest
import torch
from contrastive_bench import oracle, problem

from gossamer.algorithms.privacy.disk import Disk
from gossamer.algorithms.privacy.doppler import Doppler
from gossamer.algorithms.program import TrainingProgram
from gossamer.algorithms.registry import REGISTRY, find
from gossamer.runtime import Communicator, ConfigError, StackedTransport
from gossamer.runtime.component import validate
from gossamer.topologies import build

SGD = {"name": "sgd", "lr": 0.05}
DIRECTED = {"sgp": "directed_ring", "push-diging": "directed_ring"}
FRESH = {"name": "emc2", "score": "fresh", "burn_in": 0.0, "beta": 8.0}


def program(name, optimizer=SGD, *, layer=None, topology="ring", algorithm=(), **fields):
    cls = find("algorithm", name)
    values = dict(algorithm)
    if "optimizer" in cls.model_fields and cls.model_fields["optimizer"].is_required():
        values["optimizer"] = validate(find("optimizer", optimizer["name"]), optimizer, "optimizer")
    if "local_steps" in cls.model_fields:
        values["local_steps"] = 2
    n = 4
    algorithm = validate(cls, values, "algorithm")
    graph = algorithm.adapt(build(DIRECTED.get(name, topology), n))
    comm = Communicator(graph, StackedTransport(), steps=3)
    contrastive = oracle(**{"loss": FRESH, "batch_size": 3, **fields})
    outer = contrastive if layer is None else layer(contrastive)
    return TrainingProgram(comm, problem(n), outer, algorithm).start()


def trained(*args, **options):
    """Return the rows before and after three steps."""
    made = program(*args, **options)
    before, figures = made.state.x.clone(), []
    for made.comm.step in range(3):
        figures.append(made.step())
        made.comm.round += made.rounds_per_step
    return before, made.state.x, figures


ROWS = [name for name in REGISTRY["algorithm"] if "row" in find("algorithm", name).takes]


@pytest.mark.parametrize("negatives", ["all", "neighbors"])
@pytest.mark.parametrize("name", ROWS)
def test_every_algorithm_of_rows_trains_with_it(name, negatives):
    before, after, figures = trained(name, negatives=negatives)
    assert after.isfinite().all()
    assert not torch.equal(before, after)
    assert 0 < float(torch.as_tensor(figures[-1]["acceptance"]).mean()) <= 1


@pytest.mark.parametrize("loss", ["simclr", "sogclr", {"name": "moco", "queue": 40}, "negcache"])
@pytest.mark.parametrize("name", ["gt-hsgd", "local-sgd", "gradient-tracking"])
def test_states_of_other_losses_go_with_two_points_and_local_steps(name, loss):
    before, after, _ = trained(name, loss=loss)
    assert after.isfinite().all()
    assert not torch.equal(before, after)


@pytest.mark.parametrize("name", sorted(set(REGISTRY["algorithm"]) - set(ROWS)))
def test_algorithms_of_directions_say_why_not(name):
    with pytest.raises(ConfigError, match=f"{name}.*contrastive|contrastive.*{name}"):
        program(name)


@pytest.mark.parametrize("name", ["all-reduce", "dsgd"])
@pytest.mark.parametrize("optimizer", ["momentum", "adam", "adamw", "adam8bit", "sign-sgd"])
def test_optimizers_take_its_rows(name, optimizer):
    before, after, _ = trained(name, {"name": optimizer, "lr": 0.01})
    assert after.isfinite().all()
    assert not torch.equal(before, after)


def test_all_reduce_keeps_the_ranks_equal_to_the_bit():
    _, after, _ = trained("all-reduce", {"name": "adam", "lr": 0.01})
    assert (after == after[:1]).all()


def test_per_layer_updates_say_why_not():
    with pytest.raises(ConfigError, match=r"per_layer.*contrastive"):
        program("all-reduce", algorithm={"per_layer": True})


@pytest.mark.parametrize("layer", [Disk, Doppler])
def test_filters_stand_around_it(layer):
    before, after, _ = trained("dsgd", layer=lambda inner: layer(inner=inner))
    assert after.isfinite().all()
    assert not torch.equal(before, after)


def test_an_epoch_of_several_batches_a_step_is_over_in_fewer_steps():
    fields = {"name": "sogclr", "first_visit": "epoch", "gamma": 0.5}
    made = program("local-sgd", loss=fields, batch_size=3)  # 24 examples: 2 batches of 12
    criterion, seen = made.oracle.criterion, []
    weight = criterion._weight

    def spy(visit, log_u):
        found = weight(visit, log_u)
        seen.append(float(found[0]))
        return found

    object.__setattr__(criterion, "_weight", spy)
    for made.comm.step in range(2):
        made.step()
        made.comm.round += made.rounds_per_step
    assert seen == 8 * [1.0] + 8 * [0.5]  # each of 4 ranks, 2 batches a step
