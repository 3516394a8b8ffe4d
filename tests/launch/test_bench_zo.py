"""gossamer bench zo: a zeroth-order step beside MeZO's, and what ranks exchange."""

import json
import subprocess
import sys

import pytest
import torch

from gossamer.algorithms.zeroth_order.transient import TransientModule
from gossamer.launch.bench.zo import _check, aims, parse_models
from gossamer.launch.bench.zo_ways import WAYS, ZoModel, mezo
from gossamer.runtime import Communicator, ConfigError, StackedTransport
from gossamer.topologies import build

TINY = ["--parameters=60K", "--vocabulary=16", "--context=4", "--batch=2", "--warmup=0", "--json"]


def bench(*flags):
    done = subprocess.run(
        [sys.executable, "-m", "gossamer", "bench", "zo", *TINY, *flags],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("size", ["10M", "100M", "500K"])
def test_models_have_about_the_parameters_asked_for(size):
    [model] = parse_models(size, 256, 64, 4)
    asked = float(size[:-1]) * {"K": 1e3, "M": 1e6}[size[-1]]
    count = sum(p.numel() for p in model.module().parameters())
    assert count == pytest.approx(asked, rel=0.2)
    assert model.layers >= model.width // 64


def test_sizes_that_are_none_are_refused():
    with pytest.raises(ConfigError, match="--parameters: '10X' is no number; write 500K"):
        parse_models("10X", 256, 64, 4)
    with pytest.raises(ConfigError, match="no transformer with 8192 tokens has 1,000; use more"):
        parse_models("1K", 8192, 64, 4)


def test_mezo_comes_back_to_where_it_was_but_for_its_update():
    model = ZoModel(64, 1, 16, 4, 2)
    module = model.module()
    before = torch.cat([p.detach().flatten() for p in module.parameters()])
    mezo(module).run(model.batch(0))
    moved = torch.cat([p.detach().flatten() for p in module.parameters()]) - before
    # lr |g z| is below 1e-5 here, and three roundings of numbers around 1 remain.
    assert 0 < float(moved.abs().max()) < 1e-5


def test_layers_that_do_not_move_are_noticed(monkeypatch):
    model, comm = ZoModel(64, 1, 16, 4, 2), Communicator(build("ring", 1), StackedTransport())
    _check(model, comm)
    moved = TransientModule.moved

    def far(self, shift, tensors=None):
        def too_far(flat, pieces, source):
            shift(flat, pieces, source)
            flat *= 1.5

        return moved(self, too_far, tensors)

    monkeypatch.setattr(TransientModule, "follows", lambda self, loss: True)
    monkeypatch.setattr(TransientModule, "moved", far)
    with pytest.raises(ConfigError, match=r"losses of moved layers and of moved parameters are"):
        _check(model, comm)


def test_aims_are_ratios_with_a_verdict():
    mezo_row = {"way": "mezo", "moves_ms": 40.0, "beyond_ms": 50.0, "cpu_ms": 100.0}
    ours = {"way": "ours", "moves_ms": 10.0, "beyond_ms": 25.0, "cpu_ms": 60.0}
    rows = [mezo_row | {"parameters": 7}, ours | {"parameters": 7, "memory_share": 0.02}]
    found = [(aim.figure, aim.bound, aim.is_met) for aim in aims(rows)]
    expected = [(0.25, 0.25, True), (0.5, 0.25, False), (0.6, 1.0, True), (0.02, 0.01, False)]
    assert found == expected


@pytest.mark.slow
def test_every_way_is_timed_and_its_memory_measured():
    document = bench("--iters=2")
    rows = {row["way"]: row for row in document["rows"]}
    assert list(rows) == list(WAYS)
    for row in rows.values():
        assert row["mezo_ratio"] == pytest.approx(row["cpu_ms"] / rows["mezo"]["cpu_ms"])
        assert row["beyond_ms"] == pytest.approx(row["cpu_ms"] - rows["forwards"]["cpu_ms"])
    assert rows["forwards"]["memory_mib"] == 0
    assert len(document["aims"]) == 4


@pytest.mark.slow
def test_a_rank_sends_eight_bytes_to_each_other_and_gradients_all_of_theirs():
    numbers, gradients = bench("--ranks=3", "--iters=2")["rows"]
    assert (numbers["exchanged"], gradients["exchanged"]) == ("numbers", "gradients")
    assert numbers["bytes_per_step"] == 2 * 8
    d = -(-gradients["parameters"] // 16) * 16  # every tensor here is a multiple of 64 bytes
    assert gradients["bytes_per_step"] == pytest.approx(4 * 4 * d / 3, rel=0.01)
    assert numbers["probes_per_s"] == pytest.approx(3e3 / numbers["step_ms"])
