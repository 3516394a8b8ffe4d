"""What holds for push-sum, compressed, local, adaptive and normalised methods alike."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles_for_tests import (
    LR,
    MOMENTUM,
    PLAIN,
    LogisticOracle,
    Trial,
    close,
    digraph,
)

from gossamer.algorithms.decentralized.ad_psgd import ADPSGD
from gossamer.algorithms.decentralized.all_reduce import AllReduce
from gossamer.algorithms.decentralized.choco import Choco
from gossamer.algorithms.decentralized.damsgrad import DAMSGrad
from gossamer.algorithms.decentralized.deepsqueeze import DeepSqueeze
from gossamer.algorithms.decentralized.diloco import DiLoCo
from gossamer.algorithms.decentralized.dnsgd import DNSGD
from gossamer.algorithms.decentralized.gt_hsgd import GTHSGD
from gossamer.algorithms.decentralized.gt_nsgdm import GTNSGDm
from gossamer.algorithms.decentralized.local_sgd import LocalSGD
from gossamer.algorithms.decentralized.push_diging import PushDIGing
from gossamer.algorithms.decentralized.sgp import SGP
from gossamer.algorithms.decentralized.slowmo import SlowMo
from gossamer.algorithms.optimizers.adam import AdamW
from gossamer.algorithms.optimizers.sgd import SGD
from gossamer.algorithms.registry import find
from gossamer.runtime.state import flatten, restore
from gossamer.runtime.transports.torch_distributed import GlooTransport
from gossamer.topologies import build

ALGORITHMS = {
    "sgp": SGP(optimizer=MOMENTUM),
    "osgp": SGP(overlap=True, optimizer=PLAIN),
    "push-diging": PushDIGing(optimizer=SGD(lr=LR, weight_decay=0.01)),
    "choco-a": Choco(order="A", compressor="sign", gamma=0.4, optimizer=PLAIN),
    "choco-b": Choco(compressor={"name": "random_k", "ratio": 0.5}, optimizer=MOMENTUM),
    "choco-qsgd": Choco(compressor="qsgd", gamma=0.6, optimizer=PLAIN),
    "deepsqueeze": DeepSqueeze(compressor={"name": "top-k", "k": 2}, optimizer=PLAIN),
    "local-sgd": LocalSGD(local_steps=3, optimizer=PLAIN),
    "slowmo": SlowMo(tau=3, optimizer=MOMENTUM),
    "slowmo-gossip": SlowMo(tau=3, base="gossip", optimizer=PLAIN),
    "diloco": DiLoCo(local_steps=3, optimizer=AdamW(lr=0.01)),
    "gt-hsgd": GTHSGD(initial_batches=2, optimizer=SGD(lr=LR, weight_decay=0.01)),
    "damsgrad": DAMSGrad(optimizer=SGD(lr=0.05)),
    "ad-psgd": ADPSGD(slowest=3, optimizer=PLAIN),
    "dnsgd": DNSGD(optimizer=PLAIN),
    "gt-nsgdm": GTNSGDm(optimizer=PLAIN),
}
OUTER = ("slowmo", "slowmo-gossip", "diloco")
every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)


@every_algorithm
def test_the_registry_knows_it(name):
    algorithm = ALGORITHMS[name]
    assert find("algorithm", algorithm.name) is type(algorithm)


@every_algorithm
def test_averaging_keeps_the_mean_when_the_gradient_is_zero(name):
    oracle = LogisticOracle(scale=0.0)
    x0 = np.random.default_rng(0).normal(size=(8, oracle.layout.d))
    x0[:, [i for i in range(oracle.layout.d) if i not in oracle.used]] = 0
    algorithm = ALGORITHMS[name].model_copy(update={"optimizer": PLAIN})
    trial = Trial(algorithm, build("ring", 8), oracle=oracle, x0=x0)
    if name in OUTER:  # which presume equal rows
        trial.state.x_outer[:] = torch.from_numpy(x0.mean(0))
    trial.step(6)
    if name == "osgp":  # two thirds of what was sent last are on their way
        close((trial.state.row + trial.state.sent * (2 / 3))[:, :-1].mean(0).numpy(), x0.mean(0))
    else:
        close(trial.x.mean(0), x0.mean(0))


@every_algorithm
@pytest.mark.parametrize("n", [1, 2])
def test_one_and_two_ranks_and_zero_gradients_give_numbers(name, n):
    for scale in (1.0, 0.0):
        oracle = LogisticOracle(scale=scale)
        trial = Trial(ALGORITHMS[name], build("ring", n), oracle=oracle)
        trial.step(4)
        assert np.isfinite(trial.x).all()
        zero = Trial(
            ALGORITHMS[name], build("ring", n), oracle=oracle, x0=np.zeros((1, oracle.layout.d))
        )
        zero.step(4)
        assert np.isfinite(zero.x).all()
        if scale == 0.0:
            assert (zero.x == 0).all()


@every_algorithm
def test_a_run_resumed_from_its_state_continues_to_the_bit(name):
    def trial() -> Trial:
        return Trial(ALGORITHMS[name], build("ring", 8), batch_size=3)

    whole, first, second = trial(), trial(), trial()
    whole.step(7)
    first.step(4)
    tensors, scalars = flatten(first.state)
    restore(second.state, {k: v.clone() for k, v in tensors.items()}, scalars)
    second.comm.step, second.comm.round = first.comm.step, first.comm.round
    second.step(3)
    assert (second.x == whole.x).all()


@pytest.mark.parametrize("name", ["sgp", "local-sgd", "choco-a", "slowmo-gossip", "diloco"])
def test_on_the_complete_graph_it_is_all_reduce_sgd(name):
    algorithm = {
        "sgp": SGP(optimizer=PLAIN),
        "local-sgd": LocalSGD(local_steps=1, optimizer=PLAIN),
        "choco-a": Choco(order="A", compressor="identity", gamma=1.0, optimizer=PLAIN),
        "slowmo-gossip": SlowMo(tau=1, beta=0.0, base="gossip", optimizer=PLAIN),
        "diloco": DiLoCo(local_steps=1, outer_lr=1.0, outer_momentum=0.0, optimizer=PLAIN),
    }[name]
    trial, reference = (
        Trial(a, build("complete", 8), batch_size=3)
        for a in (algorithm, AllReduce(optimizer=PLAIN))
    )
    trial.step(50)
    reference.step(50)
    close(trial.x, reference.x)


def digests(trial: Trial) -> list[str]:
    trial.step(6)
    return [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in trial.state.x]


def all_digests(transport: object) -> dict[str, list[str]]:
    torch.set_num_threads(1)
    found = {}
    for name, algorithm in ALGORITHMS.items():
        oracle = LogisticOracle(dtype="float32")
        graph = digraph(8) if name in ("sgp", "osgp", "push-diging") else build("ring", 8)
        found[name] = digests(
            Trial(algorithm, graph, oracle=oracle, batch_size=3, transport=transport)
        )
    return found


def one_process(rank: int, processes: int, folder: Path) -> None:
    rendezvous = f"file://{folder}/rendezvous"
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), GOSSAMER_RENDEZVOUS=rendezvous)
    transport = GlooTransport(100.0)
    lines = [
        f"{name} {rank} {digest}"
        for name, rows in all_digests(transport).items()
        for digest in rows
    ]
    (folder / f"rank{rank}").write_text("\n".join(lines))
    transport.close()


@pytest.mark.timeout(120)
def test_eight_ranks_give_the_same_bits_in_one_process_and_each_alone(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gossamer.algorithms.decentralized.ad_psgd", "networkx"])
    children = [context.Process(target=one_process, args=(r, 8, tmp_path)) for r in range(8)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 8
    alone: dict[str, list[str]] = {name: [] for name in ALGORITHMS}
    for rank in range(8):
        for line in (tmp_path / f"rank{rank}").read_text().splitlines():
            name, _, digest = line.split()
            alone[name].append(digest)
    assert alone == all_digests(None)
