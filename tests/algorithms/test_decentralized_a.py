"""D-NASA and its synchronous baselines against slow references, their conditions, their bits."""

import hashlib

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from decentralized_cases import (
    ANY_SCHEDULE,
    CASES,
    SGD05,
    X0,
    Bowls,
    D,
    advance,
    gradients,
    run,
    start,
)

from gossamer.algorithms.decentralized.all_reduce import AllReduce
from gossamer.algorithms.decentralized.d2 import D2, EDM
from gossamer.algorithms.decentralized.dsgd import DSGD
from gossamer.algorithms.decentralized.extra import Extra
from gossamer.algorithms.decentralized.mt_dsgt import MTDSGT
from gossamer.algorithms.optimizers.adam import Adam
from gossamer.algorithms.optimizers.sgd import SGD
from gossamer.algorithms.registry import find
from gossamer.runtime import ConfigError, combine
from gossamer.runtime.component import validate
from gossamer.runtime.state import flatten, restore
from gossamer.runtime.transports.torch_distributed import GlooTransport
from gossamer.topologies import Round, Topology, build


def check(name, topology, T=20):
    algorithm, reference = CASES[name]
    actual, _ = run(algorithm, algorithm.adapt(topology), T)
    x0 = np.tile(X0, (topology.n, 1))
    expected = reference(lambda k: topology.round(k).matrix(), gradients(topology.n), x0, T)
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_the_iterates_are_those_of_the_slow_reference(name):
    check(name, build("ring", 8))


@pytest.mark.parametrize("name", ANY_SCHEDULE)
def test_the_iterates_are_those_of_the_reference_when_the_graph_changes(name):
    check(name, build("one_peer_exponential", 8))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("n", [1, 2])
def test_one_and_two_ranks_follow_the_reference(name, n):
    check(name, build("complete", n), T=8)


# --- conditions -----------------------------------------------------------------------------


def test_d2_runs_lazily_where_w_would_make_it_diverge(caplog):
    torus = build("torus", 16)
    lmin = torus.lambda_min()
    assert lmin < -1 / 3
    adapted = D2(optimizer=SGD05).adapt(torus)
    assert adapted.lambda_min() >= 0
    assert f"{lmin:.4f}" in caplog.text
    with pytest.raises(ConfigError, match=f"{lmin:.4f}"):
        D2(optimizer=SGD05, lazy="never").adapt(torus)
    diverged, _ = run(D2(optimizer=SGD(lr=0.1)), torus, 500)
    assert not diverged[-1].isfinite().all() or diverged[-1].abs().max() > 1e6
    kept, _ = run(D2(optimizer=SGD(lr=0.1)), adapted, 200)
    assert kept[-1].abs().max() < 100
    complete = build("complete", 8)
    assert D2(optimizer=SGD05).adapt(complete) is complete
    assert D2(optimizer=SGD05, lazy="always").adapt(complete) is not complete
    ring = build("ring", 8)  # exactly on the bound
    assert D2(optimizer=SGD05, lazy="never").adapt(ring) is ring


def test_methods_with_memory_of_w_refuse_what_they_cannot_run_on():
    varying, directed = build("one_peer_exponential", 8), build("exponential", 8)
    for algorithm in (D2, EDM, Extra, MTDSGT):
        for topology in (varying, directed):
            with pytest.raises(ConfigError, match=algorithm(optimizer=SGD05).name):
                algorithm(optimizer=SGD05).adapt(topology)
    biased = build("directed_ring", 4)
    assert AllReduce(optimizer=SGD05).adapt(biased) is biased
    swap = Topology.static("swap", Round.from_matrix(np.array([[0.0, 1.0], [1.0, 0.0]])))
    with pytest.raises(ConfigError, match="lambda_min"):
        Extra(optimizer=SGD05).adapt(swap)


@pytest.mark.parametrize("name", ["qg-dsgdm", "qg-adam", "decentlam", "momentum-tracking", "edm",
                                  "d2", "extra", "k-gt", "official-dsgd", "d-asagt"])  # fmt: skip
def test_a_rule_of_its_own_refuses_another_optimizer(name):
    with pytest.raises(ConfigError, match=rf"algorithm.optimizer: {name} has .*sgd, lr"):
        validate(find("algorithm", name), {"optimizer": Adam(lr=0.1)}, "algorithm")
    with pytest.raises(ConfigError, match="optimizer: missing"):
        validate(find("algorithm", name), {}, "algorithm")


def test_mixing_the_momentum_needs_a_momentum():
    with pytest.raises(ConfigError, match="needs order: cta and optimizer"):
        validate(DSGD, {"optimizer": SGD05, "mix_momentum": True, "order": "cta"}, "algorithm")


# --- the battery ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_restored_state_goes_on_to_the_bit(name):
    algorithm = CASES[name][0]
    topology = algorithm.adapt(build("ring", 4))
    comm, state = start(algorithm, topology)
    advance(algorithm, comm, state, 6)
    tensors, scalars = flatten(state)
    tensors = {key: value.clone() for key, value in tensors.items()}
    expected = advance(algorithm, comm, state, 6)[-1]
    again, other = start(algorithm, topology)
    restore(other, tensors, scalars)
    again.step, again.round = 6, 6 * algorithm.rounds_per_step
    assert torch.equal(advance(algorithm, again, other, 6)[-1], expected)


SENT = {  # elements per edge and step, in units of d; two rows of a step travel once each
    "all-reduce": None, "dsgd": 1, "dsgd-cta": 1, "mixed-momentum": 2, "gradient-tracking": 2,
    "gradient-tracking-cta": 2, "qg-dsgdm": 1, "qg-adam": 1, "decentlam": 1, "d2": 1, "edm": 1,
    "momentum-tracking": 2, "extra": 1, "k-gt": 2, "mt-dsgt": 6, "official-dsgd": 2,
    "official-dsgt": 3, "synthetic-dsgd": 1, "synthetic-dsgt": 2, "d-asagt": 2, "d-nasa-old": 2,
    "d-nasa-half": 2, "d-nasa-rounds": 6, "d-nasa-gt": 3, "d-nasa-gt-half": 6,
}  # fmt: skip


@pytest.mark.parametrize(("name", "rows"), SENT.items())
def test_a_step_sends_what_its_table_says(name, rows):
    algorithm = CASES[name][0]
    comm, state = start(algorithm, algorithm.adapt(build("ring", 8)))
    advance(algorithm, comm, state, 1)
    comm.traffic.bytes_sent[:] = 0
    advance(algorithm, comm, state, 1)
    expected = 2 * rows * D * 8 if rows else 2 * D * 8 * 7 // 8
    assert comm.traffic.bytes_sent.tolist() == [expected] * 8


@pytest.mark.parametrize("name", ["dsgd-cta", "mixed-momentum", "gradient-tracking-cta", "extra",
                                  "official-dsgt", "synthetic-dsgd", "d-nasa-half"])  # fmt: skip
def test_the_exchange_starts_before_the_gradient_where_the_rule_allows(name, monkeypatch):
    algorithm, order = CASES[name][0], []
    comm, state = start(algorithm, build("ring", 8))
    begin, estimate = comm.neighbor_average_async, Bowls.__call__
    monkeypatch.setattr(
        comm, "neighbor_average_async", lambda *a, **k: (order.append("send"), begin(*a, **k))[1]
    )
    monkeypatch.setattr(
        Bowls, "__call__", lambda *a, **k: (order.append("gradient"), estimate(*a, **k))[1]
    )
    advance(algorithm, comm, state, 1)
    assert order == ["send", "gradient"]


@pytest.mark.parametrize("name", CASES)
def test_a_zero_gradient_gives_no_nan(name):
    algorithm = CASES[name][0]
    comm, state = start(algorithm, algorithm.adapt(build("ring", 3)), x0=np.zeros(D), noise=0)
    rows = advance(algorithm, comm, state, 5, noise=0, scale=0.0)
    assert torch.equal(rows[-1], torch.zeros(3, D, dtype=torch.float64))


def _digests(transport=None):
    """Return, for every case, the hash of each hosted row after 10 steps in float32."""
    found = {}
    for name, (algorithm, _) in CASES.items():
        topology = algorithm.adapt(build("ring", 8))
        comm, state = start(algorithm, topology, transport=transport, dtype=torch.float32)
        rows = advance(algorithm, comm, state, 10)[-1]
        assert rows.isfinite().all()
        found[name] = [hashlib.sha256(combine([(1.0, r[None])]).numpy().tobytes()).hexdigest()
                       for r in rows]  # fmt: skip
    return found


def _alone(process, folder):
    torch.set_num_threads(1)
    meeting = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=process, world_size=8)
    transport = GlooTransport(120.0)
    torch.save(_digests(transport), f"{folder}/{process}.pt")
    transport.close()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_eight_processes_and_one_hold_the_same_bits(tmp_path):
    # A fork server imports once for all eight.
    multiprocessing.set_forkserver_preload(["pytest", "gossamer.algorithms.protocols"])
    multiprocessing.start_processes(
        _alone, args=(str(tmp_path),), nprocs=8, start_method="forkserver"
    )
    alone = [torch.load(tmp_path / f"{p}.pt") for p in range(8)]
    for name, stacked in _digests().items():
        assert [digests[name][0] for digests in alone] == stacked, name
