"""gossamer bench contrastive: what it compares is the same thing."""

import json
import subprocess
import sys

import pytest
import torch

from gossamer.launch.bench import contrastive as bench
from gossamer.launch.bench.contrastive_ways import (
    PARTS,
    WAYS,
    ContrastiveModel,
    encoder_flops,
    scan,
)
from gossamer.runtime import ConfigError
from gossamer.runtime.native.chains import chain_moves

TINY = ContrastiveModel("digits", "mlp", dim=8, batch=6)


def test_the_scan_moves_as_the_kernel_does():
    b, generator = 7, torch.Generator().manual_seed(0)
    ids = torch.arange(b)
    held = torch.full((b,), -torch.inf)
    for _ in range(3):
        scores = torch.rand(2, b, 2 * b, generator=generator) * 10 - 5
        exponentials = torch.empty_like(scores).exponential_(generator=generator)
        burn_in = torch.full((2 * b,), 5, dtype=torch.int32)
        flat = (scores.flatten(0, 1), exponentials.flatten(0, 1), ids, ids, held.repeat(2))
        moves = chain_moves(*flat, burn_in=burn_in, carry="stale")
        counts, held = scan(scores, exponentials, held, 5)
        assert torch.equal(counts.flatten(0, 1).int(), moves.counts)
        assert torch.equal(held, moves.score[b:])


def test_ways_of_one_loss_have_one_gradient():
    bench.check(TINY, bench._absent())


def test_ways_with_other_gradients_are_refused(monkeypatch):
    plain = bench.plain_loss

    def doubled(way, problem):
        loss = plain(way, problem)
        return lambda *given: 2 * loss(*given)

    monkeypatch.setattr(bench, "plain_loss", doubled)
    with pytest.raises(ConfigError, match="the gradients of simclr and of simclr torch are"):
        bench.check(TINY, {"sogclr libauc": "absent"})


def test_the_encoders_operations_are_those_of_its_products():
    forward = 2 * (64 * 128 + 128 * 128 + 128 * 8) * 2 * TINY.batch
    of_inputs = 2 * 64 * 128 * 2 * TINY.batch  # images need no gradient
    assert encoder_flops(TINY.problem(), TINY) == 3 * forward - of_inputs


def test_rows_have_figures_and_aims_or_say_what_is_absent():
    flags = ["--dims=8", "--batch=6", "--iters=1", "--warmup=0", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "gossamer", "bench", "contrastive", *flags],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    document = json.loads(done.stdout)
    rows = {row["way"]: row for row in document["rows"]}
    assert list(rows) == [*WAYS, *PARTS]
    for row in rows.values():
        assert (row["ms"] is None) == (row["absent"] is not None)
    assert rows["simclr torch"]["simclr_ratio"] == 1
    assert rows["encoder"]["gflops"] > 0
    assert [aim["bound"] for aim in document["aims"]] == [1.25] * 4


def test_a_way_without_its_package_is_absent_and_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "libauc.losses.contrastive", None)
    absent = bench._absent()
    assert "pip install --no-deps libauc" in absent["sogclr libauc"]
    times = {name: [1.0] for name in (*WAYS, *PARTS)}
    found = {"seconds": times, "cpu_seconds": times, "encoder_flops": 1, "absent": absent}
    row = bench._row(TINY, "sogclr libauc", found)
    assert row["absent"] == absent["sogclr libauc"]
    assert row["ms"] is None


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="--data: unknown 'mnst'; did you mean 'mnist'"):
        bench.parse_models("mnst", "mlp", [8], 6)
    with pytest.raises(ConfigError, match="--encoder: unknown 'resnet'"):
        bench.parse_models("digits", "resnet", [8], 6)
