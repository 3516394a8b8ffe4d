"""What of a language model is trained: parameters, their start, and how estimates move them."""

import copy

import pytest
import torch
from language_models_for_tests import (
    make_model,
    make_tokenizer,
    save,
    save_rows,
    sentence_rows,
    transformers,
)
from pydantic import TypeAdapter
from torch import nn

from gossamer.algorithms.problems import Batch
from gossamer.algorithms.registry import find
from gossamer.algorithms.tasks.schemes import SchemeField
from gossamer.algorithms.zeroth_order import transient as transient_module
from gossamer.algorithms.zeroth_order.transient import TransientModule
from gossamer.algorithms.zeroth_order.zeroth_order import ZerothOrder
from gossamer.runtime import Communicator, ConfigError, RowLayout, StackedTransport
from gossamer.runtime.component import validate
from gossamer.runtime.perturb import add_, perturb_
from gossamer.runtime.random import Random
from gossamer.topologies import build as build_topology

datasets = pytest.importorskip("datasets", reason="needs the extra: gossamer[huggingface]")

SCHEMES = ["full", "lora", "prefix", "prompt", "head"]
MODELS = ["gpt2", "opt", "llama", "bert"]
VOCABULARY = len(make_tokenizer())
LENGTHS = torch.tensor([7, 4, 1])


def needs_peft(scheme):
    if scheme == "lora":
        pytest.importorskip("peft", reason="needs the extra: gossamer[huggingface]")


def scheme_of(given):
    return TypeAdapter(SchemeField).validate_python(given)


def made(kind, scheme, seed=0, dtype=torch.float32):
    """A model as it was, and with a scheme; both without dropout."""
    torch.manual_seed(1)
    model = make_model(kind, VOCABULARY).to(dtype).eval()
    return copy.deepcopy(model), scheme_of(scheme).apply(model, seed)


def inputs():
    tokens = Random(5).stream("tokens").integers(VOCABULARY, 21)[0].view(3, 7)
    return {"input_ids": tokens, "attention_mask": (torch.arange(7) < LENGTHS[:, None]).long()}


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def seen(logits):
    """The logits of tokens that are not padding."""
    return torch.cat([logits[k, :length] for k, length in enumerate(LENGTHS)])


# --- what is trained, and where it starts -------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "targets", "width"),
    [("gpt2", {"c_attn"}, 48), ("opt", {"q_proj", "v_proj"}, 16), ("bert", {"query", "value"}, 16)],
)
def test_lora_starts_as_the_model_to_the_bit_and_has_a_and_b_of_queries_and_values(
    kind, targets, width
):
    needs_peft("lora")
    base, model = made(kind, {"name": "lora", "r": 4})
    assert torch.equal(base(**inputs()).logits, model(**inputs()).logits)
    shapes = {name: tuple(p.shape) for name, p in trained(model).items()}
    assert {name.split(".")[-4] for name in shapes} == targets
    assert len(shapes) == 2 * 2 * len(targets)
    for name, p in trained(model).items():
        if "lora_A" in name:
            assert p.shape == (4, 16)
            bound = 16**-0.5  # Kaiming's with a = sqrt 5: 1 / sqrt(fan_in)
            assert 0.7 * bound < p.abs().max() <= bound
        else:
            assert p.shape == (width, 4)
            assert not p.any()


def test_lora_adds_alpha_over_r_times_b_a():
    needs_peft("lora")
    base, model = made("opt", {"name": "lora", "r": 4, "alpha": 8, "targets": ["out_proj"]})
    given = dict(base.named_modules())
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            with torch.no_grad():
                b.normal_()
                given[name].weight += 2.0 * b @ a
    torch.testing.assert_close(model(**inputs()).logits, base(**inputs()).logits)


@pytest.mark.parametrize("kind", MODELS)
def test_a_prefix_starts_as_keys_and_values_of_random_tokens(kind):
    base, model = made(kind, {"name": "prefix", "length": 3}, seed=4)
    (tokens,) = Random(4).stream("task/virtual-tokens").integers(VOCABULARY, 3)
    parameters = list(trained(model).values())
    assert [p.dtype for p in parameters] == [torch.float32] * 2
    if kind == "bert":  # the projections of the first layer, by hand; it keeps no cache
        attention = base.bert.encoder.layer[0].attention.self
        h = base.bert.embeddings(input_ids=tokens[None])
        expected = [
            torch.stack([attention.key(h), attention.value(h)]).view(2, 3, 2, 8).transpose(1, 2)
        ]
    else:
        cache = base(input_ids=tokens[None], use_cache=True).past_key_values
        expected = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
        assert len(parameters) == len(expected)
    for p, value in zip(parameters, expected, strict=False):
        torch.testing.assert_close(p.detach(), value)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
def test_a_prefix_is_what_a_cache_of_keys_and_values_would_be(kind):
    """OPT and GPT-2 would count positions from behind a cache; here tokens keep their own."""
    base, model = made(kind, {"name": "prefix", "length": 3})
    cache = transformers.DynamicCache(config=base.config)
    given = inputs()
    for k, p in enumerate(trained(model).values()):
        keys, values = (t.detach().expand(3, -1, -1, -1) for t in p)
        cache.update(keys.contiguous(), values.contiguous(), k)
    mask = torch.cat([torch.ones(3, 3).long(), given["attention_mask"]], dim=1)
    places = torch.arange(7).expand(3, -1)
    expected = base(
        input_ids=given["input_ids"],
        attention_mask=mask,
        position_ids=places,
        past_key_values=cache,
    ).logits
    found = model(**given).logits
    torch.testing.assert_close(seen(found), seen(expected), rtol=1e-4, atol=1e-5)
    assert (seen(found) - seen(base(**given).logits)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bert"])
def test_virtual_tokens_start_as_real_ones_before_the_given(kind):
    base, model = made(kind, {"name": "prompt", "length": 3}, seed=4)
    (tokens,) = Random(4).stream("task/virtual-tokens").integers(VOCABULARY, 3)
    given = inputs()
    longer = torch.cat([tokens.expand(3, -1), given["input_ids"]], dim=1)
    mask = torch.cat([torch.ones(3, 3).long(), given["attention_mask"]], dim=1)
    expected = base(input_ids=longer, attention_mask=mask).logits[:, 3:]
    found = model(**given).logits
    torch.testing.assert_close(seen(found), seen(expected))
    (p,) = trained(model).values()
    assert torch.equal(p, base.get_input_embeddings()(tokens))


@pytest.mark.parametrize("kind", MODELS)
def test_a_head_leaves_the_embeddings_it_was_tied_to(kind):
    base, model = made(kind, "head")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert {id(p) for p in trained(model).values()} == {id(p) for p in head.parameters()}
    assert head.weight.data_ptr() != embedding.weight.data_ptr()
    assert torch.equal(base(**inputs()).logits, model(**inputs()).logits)
    before = embedding.weight.clone()
    with torch.no_grad():
        head.weight.mul_(2)
    assert torch.equal(embedding.weight, before)


@pytest.mark.parametrize("scheme", ["lora", "prefix", "prompt"])
def test_new_parameters_are_float32_beside_a_frozen_rest_of_any_precision(scheme):
    needs_peft(scheme)
    _, exact = made("opt", scheme)
    _, model = made("opt", scheme, dtype=torch.bfloat16)
    kept = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert (RowLayout(model).dtype, kept) == (torch.float32, {torch.bfloat16})
    logits = model(**inputs()).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(
        seen(logits.float()), seen(exact(**inputs()).logits), rtol=0.1, atol=0.1
    )
    model(**inputs()).logits.float().square().mean().backward()
    assert all(p.grad is not None for p in trained(model).values())


@pytest.mark.parametrize("scheme", ["lora", "prefix", "prompt"])
def test_the_start_is_a_function_of_the_seed(scheme):
    needs_peft(scheme)
    torch.manual_seed(9)
    state = torch.get_rng_state()
    rows = []
    for seed in (0, 0, 1):
        _, model = made("gpt2", scheme, seed=seed)
        rows.append(torch.cat([p.detach().flatten() for p in trained(model).values()]))
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    assert len(state) == len(torch.get_rng_state())


# --- with zeroth-order estimates ------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_losses_of_moved_and_of_written_parameters_are_equal(kind, scheme, monkeypatch):
    """So estimates need no copy of the row. Parameters that are 0, as B, are moved off it."""
    needs_peft(scheme)
    _, model = made(kind, scheme)
    layout = RowLayout(model)
    row = layout.gather(model, torch.zeros(layout.d))
    z = (0, 1, 2, 0.1)
    perturb_(row, layout, *z)
    layout.bind(model, row)

    def loss():
        with torch.no_grad():
            return seen(model(**inputs()).logits).square().mean().item()

    transient = TransientModule(model, layout)
    assert transient.follows(loss)
    start = loss()
    with transient.moved(lambda flat, pieces, source: add_(flat, pieces, *z, source=source)):
        moved = loss()
    monkeypatch.setitem(transient_module._PART, "cpu", 32)  # most layers go in parts
    with transient.moved(lambda flat, pieces, source: add_(flat, pieces, *z, source=source)):
        in_parts = loss()
    assert loss() == start
    layout.bind(model, perturb_(row.clone(), layout, *z))
    assert moved == pytest.approx(loss(), rel=1e-5)
    assert in_parts == pytest.approx(loss(), rel=1e-5)
    assert abs(moved - start) > 1e-4 * start


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("schemes")
    save("opt", found / "opt")
    save_rows(found / "rows.jsonl", sentence_rows(24))
    return found


def build(folder, **changes):
    fields = {
        "model": str(folder / "opt"),
        "dataset": str(folder / "rows.jsonl"),
        "template": "sst2",
        "context": 16,
        "train_examples": 16,
        "dev_examples": 0,
        "test_examples": 4,
    }
    return validate(find("task", "prompted"), {**fields, **changes}, "task").build(2, 0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_estimate_moves_what_is_trained_and_nothing_else(folder, scheme, monkeypatch, tmp_path):
    needs_peft(scheme)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    problem = build(folder, scheme=scheme)
    comm = Communicator(build_topology("ring", 2), StackedTransport("cpu"))
    oracle = ZerothOrder(batch_size=4, queries=4, restore="transient")  # refused if it missed some
    oracle.setup(comm, problem)
    layout = oracle.layout
    frozen = {n: p.clone() for n, p in problem.module.named_parameters() if not p.requires_grad}
    assert bool(frozen) == (scheme != "full")
    x = comm.alloc(layout.d, layout.dtype)
    x[:] = layout.gather(problem.module, torch.empty_like(x[0]))
    start = x.clone()
    batch = [Batch(problem.train[torch.from_numpy(shard[:4])]) for shard in problem.shards]
    estimate = oracle.deferred(x, batch)
    assert torch.equal(x, start)
    estimate.grad.mean(comm).add_to_(x, -0.01)
    assert torch.equal(x[0], x[1])
    for s, view in zip(layout.slices, layout.views(x[0] - start[0]), strict=True):
        assert view.all(), s.name
    now = dict(problem.module.named_parameters())
    for name, p in frozen.items():
        assert torch.equal(now[name], p), name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("lroa", "task.scheme.name: unknown scheme 'lroa'; did you mean 'lora' or 'relora'?"),
        ({"name": "lora", "rank": 8}, "task.scheme.rank: unknown field; known: alpha, name, r, "),
        ({"name": "lora", "r": 0}, "task.scheme.r: must be greater than or equal to 1, got 0"),
        ({"name": "prefix", "length": 1.5}, "task.scheme.length: must be a whole number, got 1.5"),
        ({"r": 8}, "task.scheme: must be one of full, lora, prefix, prompt, head, sltrain, "),
        ({"name": "full", "r": 8}, "task.scheme.r: unknown field"),
    ],
)
def test_errors_name_field_value_and_fix(folder, given, message):
    with pytest.raises(ConfigError) as error:
        build(folder, scheme=given)
    assert str(error.value).startswith(message)


def test_what_a_model_lacks_is_refused():
    needs_peft("lora")
    torch.manual_seed(0)
    model = make_model("gpt2", VOCABULARY)
    with pytest.raises(ConfigError, match=r"^task\.scheme\.targets: .*nope.*; name linear layers"):
        scheme_of({"name": "lora", "targets": ["nope"]}).apply(model, 0)
    model.lm_head = nn.Identity()
    with pytest.raises(ConfigError, match=r"^task\.scheme: head needs a model whose last layer"):
        scheme_of("head").apply(model, 0)
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=8, n_layer=1, n_head=2)
    )
    with pytest.raises(ConfigError, match=r"^task\.scheme: prefix needs a model whose attention"):
        scheme_of("prefix").apply(bloom, 0)
