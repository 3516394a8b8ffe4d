"""LLaMA models: parameters to the unit, initial weights, and the function they compute."""

import math

import pytest
import torch
import torch.nn.functional as F

from gossamer.algorithms.tasks.llama import LLAMA, LlamaShape, build_llama
from gossamer.runtime.component import validate
from gossamer.runtime.errors import ConfigError

pytest.importorskip("transformers", reason="needs the extra: gossamer[huggingface]")

SMALL = LlamaShape(hidden=16, layers=2, heads=2, ffn=24)

# In millions, as arXiv:2406.02214 rounds them: all parameters, and those outside the matrices.
PAPER = {
    "llama-60m": (58.1, 32.78),
    "llama-130m": (134.1, 49.17),
    "llama-350m": (368.0, 65.59),
    "llama-1b": (1339.1, 131.17),
    "llama-7b": (6738.4, 262.4),
}


def is_matrix(name):
    return "attn." in name or "mlp." in name


@pytest.mark.parametrize("name", LLAMA)
def test_parameters_are_the_papers_to_the_unit(name):
    shape = LLAMA[name]
    h, layers = shape.hidden, shape.layers
    model = build_llama(shape, device="meta")
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    base = sum(size for name, size in sizes.items() if not is_matrix(name))
    assert base == 2 * 32000 * h + (2 * layers + 1) * h
    assert sum(sizes.values()) == shape.parameters(32000)
    assert sum(map(is_matrix, sizes)) == 7 * layers
    total, outside = PAPER[name]
    assert round(sum(sizes.values()) / 1e6, 1) == total
    assert base / 1e6 == pytest.approx(outside, abs=0.05 if name == "llama-7b" else 0.005)


def test_the_smallest_of_them_has_58073600_parameters():
    assert LLAMA["llama-60m"].parameters(32000) == 58_073_600


def test_a_model_on_the_meta_device_takes_no_memory():
    assert all(p.is_meta for p in build_llama(LLAMA["llama-7b"], device="meta").parameters())


def test_weights_are_normal_a_function_of_the_seed_and_the_global_generator_is_untouched():
    wide = LlamaShape(hidden=128, layers=2, heads=4, ffn=336)
    before = torch.get_rng_state()
    model = build_llama(wide, vocabulary=256, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == 1).all()
        else:
            # The deviation of k normal numbers is within 5 / sqrt(2 k) of theirs beyond doubt.
            assert p.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * p.numel()))
            assert p.mean().abs().item() < 5 * 0.02 / math.sqrt(p.numel())

    def weights(seed):
        built = build_llama(SMALL, vocabulary=32, seed=seed)
        return torch.cat([p.flatten() for p in built.parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def reference(model, tokens, heads):
    """LLaMA by its formulas, token by token where it matters, in float64."""
    given = {name: p.detach().double() for name, p in model.named_parameters()}
    x = given["model.embed_tokens.weight"][tokens]
    batch, length, hidden = x.shape
    width = hidden // heads

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def turned(x):  # (B, H, T, width): pair (j, j + width / 2) of token t turns by t / base^(2j/w)
        angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
        cos, sin = angles.double().cos(), angles.double().sin()
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    for k in range(sum("q_proj" in name for name in given)):
        layer = f"model.layers.{k}."
        h = norm(x, given[f"{layer}input_layernorm.weight"])
        q, key, v = (
            (h @ given[f"{layer}self_attn.{n}_proj.weight"].T)
            .view(batch, length, heads, width)
            .transpose(1, 2)
            for n in "qkv"
        )
        scores = turned(q) @ turned(key).transpose(-1, -2) / math.sqrt(width)
        future = torch.ones(length, length).triu(1).bool()
        seen = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        seen = seen.transpose(1, 2).reshape(batch, length, hidden)
        x = x + seen @ given[f"{layer}self_attn.o_proj.weight"].T
        h = norm(x, given[f"{layer}post_attention_layernorm.weight"])
        gate, up, down = (given[f"{layer}mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        x = x + (F.silu(h @ gate.T) * (h @ up.T)) @ down.T
    return norm(x, given["model.norm.weight"]) @ given["lm_head.weight"].T


def test_the_logits_are_those_of_the_formulas():
    model = build_llama(SMALL, vocabulary=40, context=32, dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8)  # weights of .02 would hide a wrong attention or MLP
    tokens = torch.randint(40, (3, 32), generator=torch.Generator().manual_seed(0))
    expected = reference(model, tokens, SMALL.heads)
    # The package computes norms and angles, of up to 31 radians, in float32.
    torch.testing.assert_close(
        model(input_ids=tokens).logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item()
    )


def test_half_precision_leaves_the_rotary_frequencies_exact():
    half, full = (
        build_llama(SMALL, vocabulary=40, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)
    )
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    frequencies = half.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    assert torch.equal(frequencies, full.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "task.model.heads: must divide hidden, 16, into heads of even width, got 3"),
        ({"heads": 16}, "task.model.heads: must divide hidden, 16"),
        ({"hidden": 0}, "task.model.hidden: must be greater than or equal to 1, got 0"),
        ({"layer": 2}, "task.model.layer: unknown field; did you mean 'layers'"),
    ],
)
def test_a_wrong_shape_is_named(change, message):
    with pytest.raises(ConfigError) as error:
        validate(LlamaShape, {**SMALL.model_dump(), **change}, "task.model")
    assert str(error.value).startswith(message)
