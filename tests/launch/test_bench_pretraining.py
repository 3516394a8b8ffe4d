"""gossamer bench low-rank, memory and pretraining: what they compare is the same thing."""

import json
import subprocess
import sys

import pytest
import torch

from gossamer.algorithms.low_rank.layer import SparseLowRankLinear
from gossamer.algorithms.low_rank.support import draw_support
from gossamer.launch.bench.live_bytes import LiveBytes
from gossamer.launch.bench.llama_steps import LlamaRequest
from gossamer.launch.bench.low_rank import OfficialLinear
from gossamer.launch.bench.memory import memory
from gossamer.runtime import ConfigError

pytest.importorskip("transformers", reason="needs the extra: gossamer[huggingface]")


def bench(*flags):
    done = subprocess.run(
        [sys.executable, "-m", "gossamer", "bench", *flags, "--json"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def request(**options):
    values = {
        "models": ["llama-60m"],
        "methods": ["full"],
        "optimizer": "adam",
        "per_layer": False,
        "batch": 1,
        "context": 8,
        "vocabulary": 32000,
        "rank": 0,
        "density": None,
        "dtype": "bfloat16",
        "device": "cuda",
    }
    return LlamaRequest(**values | options)


def test_the_official_way_is_the_same_function():
    support = draw_support((20, 30), 0.2, 0, 0)
    like = torch.empty(0, dtype=torch.float64)
    ours = SparseLowRankLinear(support, rank=4, scale=0.5, bias=False, like=like).reset_(0, 0)
    torch.nn.init.normal_(ours.B)
    theirs = OfficialLinear(ours)
    x = torch.randn(2, 7, 30, dtype=torch.float64, requires_grad=True)
    found = [layer(x) for layer in (ours, theirs)]
    torch.testing.assert_close(*found)
    grads = [
        torch.autograd.grad(y.square().sum(), [x, layer.A, layer.B, layer.v])
        for y, layer in zip(found, (ours, theirs), strict=True)
    ]
    torch.testing.assert_close(*grads)


def test_live_bytes_are_those_of_what_is_not_freed():
    kept = torch.empty(10)
    with LiveBytes().ignore([kept]) as live:
        a = torch.zeros(100)
        a.view(10, 10)
        (kept + 1).sum()
        del a
        torch.zeros(30, device="meta")
    assert live.peak == 400 + 40 + 4
    assert live.now == 0


@pytest.mark.parametrize(
    ("model", "gigabytes"),
    [("llama-60m", (0.35, 0.26)), ("llama-130m", (0.81, 0.60)), ("llama-350m", (2.21, 1.24))],
)
def test_weights_and_moments_are_the_papers_table(model, gigabytes):
    rows = memory(request(models=[model], methods=["full", "sltrain"]), False, lambda _: None)
    for row, expected in zip(rows, gigabytes, strict=True):
        # The paper's places are int64, ours int32.
        found = row["weights"] + row["optimizer"] + 8 * row["parameters_sparse"]
        assert found / 1e9 == pytest.approx(expected, abs=0.008)
        assert row["places"] < 4.1 * row["parameters_sparse"] + 1e6


def test_updates_per_layer_and_eight_bits_save_what_they_say():
    plain, thin = (
        memory(request(per_layer=own, optimizer=name), False, lambda _: None)[0]
        for own, name in ((False, "adam"), (True, "adam8bit"))
    )
    assert (plain["gradients"], thin["gradients"]) == (plain["weights"], 0)
    assert plain["optimizer"] == 2 * plain["weights"]
    assert thin["optimizer"] == pytest.approx(plain["optimizer"] / 2, rel=0.02)
    assert thin["total"] < plain["total"] - plain["gradients"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        (["--method=sltrain"], 0.05),
        (["--method=full", "--optimizer=adam8bit", "--per-layer"], 0.05),
        (["--method=galore"], 0.2),
    ],
    ids=["sltrain", "8 bits per layer", "galore"],
)
def test_what_is_counted_is_what_is_resident(flags, tolerance):
    flags = ["memory", "--model=llama-60m", "--dtype=float32", "--context=32", *flags]
    [row] = bench(*flags, "--measure", "--device=cpu")["rows"]
    assert row["ratio"] == pytest.approx(1, abs=tolerance)


def test_what_is_counted_does_not_depend_on_what_was_counted_before():
    alone, twice = (
        memory(request(models=names, methods=["sltrain"]), False, lambda _: None)[-1]
        for names in (["llama-60m"], ["llama-130m", "llama-60m"])
    )
    assert alone == twice


def test_rows_of_a_layer_and_of_a_model_have_figures_and_aims():
    document = bench("low-rank", "--widths=32", "--tokens=16", "--iters=2", "--warmup=0")
    assert [row["way"] for row in document["rows"]] == ["dense", "official", "ours"]
    assert len(document["aims"]) == 1
    flags = ["--iters=1", "--warmup=0", "--batch=1", "--context=4", "--vocabulary=64"]
    document = bench("pretraining", *flags, "--method=full,sltrain,official", "--rank=8")
    ratios = [row["full_ratio"] for row in document["rows"]]
    assert ratios[0] == 1
    assert all(ratio > 0 for ratio in ratios)
    assert document["aims"][0]["bound"] == pytest.approx(1 / 0.85)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="--model: unknown 'llama-60'; did you mean 'llama-60m'"):
        request(models=["llama-60"])
    with pytest.raises(ConfigError, match="--method: unknown 'sltrian'"):
        request(methods=["sltrian"])
    with pytest.raises(ConfigError, match="--density: must be above 0"):
        request(density=2.0)
    with pytest.raises(ConfigError, match="unknown optimizer 'adm'"):
        request(optimizer="adm")
