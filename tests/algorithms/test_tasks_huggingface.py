"""The Hugging Face task on small models, tokenizers and datasets made here; nothing is fetched."""

import json
import math
import sys

import numpy as np
import pytest
import torch

from gossamer.algorithms.registry import find
from gossamer.algorithms.tasks.hub import load_model
from gossamer.algorithms.tasks.language import mask_tokens
from gossamer.runtime.component import validate
from gossamer.runtime.errors import ConfigError

datasets = pytest.importorskip("datasets", reason="needs the extra: gossamer[huggingface]")
transformers = pytest.importorskip("transformers", reason="needs the extra: gossamer[huggingface]")

WORDS = [
    "[PAD]",
    "[UNK]",
    "[MASK]",
    "[EOS]",
    "the",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "mat",
    "fast",
    "slow",
    "good",
    "bad",
]
TEXTS = ["the cat sat on the mat", "the dog ran fast", "good cat", "bad slow dog sat"] * 12


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({w: k for k, w in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        eos_token="[EOS]",
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture
def gpt2(tmp_path, tokenizer):
    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_positions=32, n_embd=16, n_layer=1, n_head=2
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return "gpt2"


@pytest.fixture
def bert(tmp_path, tokenizer):
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    return "bert"


@pytest.fixture
def texts(tmp_path):
    labels = ["good", "bad", "good", "bad"] * 12
    rows = [{"text": t, "label": k, "other": t} for t, k in zip(TEXTS, labels, strict=True)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "texts.jsonl"


def build(n=2, seed=0, **fields):
    return validate(find("task", "huggingface"), {"context": 8, **fields}, "task").build(n, seed)


def test_causal_language_model_from_local_files(gpt2, texts, tokenizer):
    problem = build(model=gpt2, dataset=texts)
    packed = [k for t in TEXTS for k in [*tokenizer(t)["input_ids"], 3]]
    (tokens,) = problem.train.dataset[torch.tensor([0, 2])]
    assert tokens.tolist() == [packed[:9], packed[16:25]]
    assert sorted(problem.train.places.tolist() + problem.test.places.tolist()) == list(
        range((len(packed) - 1) // 8)
    )
    problem.module.eval()
    ours = problem.loss(problem.module, (tokens,))
    theirs = problem.module.model(input_ids=tokens, labels=tokens).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert problem.weigh((tokens,)) == 16
    assert problem.objective == "examples"


def test_the_checkpoint_is_loaded_or_fresh_weights_are_drawn_from_the_seed(gpt2, texts):
    def weights(seed, **fields):
        module = build(model=gpt2, dataset=texts, seed=seed, **fields).module
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    saved = transformers.GPT2LMHeadModel.from_pretrained(gpt2)
    expected = torch.cat([p.detach().flatten() for p in saved.parameters()])
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert torch.equal(weights(0), expected)
    assert torch.equal(weights(1), expected)
    fresh = weights(0, pretrained=False)
    assert torch.equal(fresh, weights(0, pretrained=False))
    assert not torch.equal(fresh, weights(1, pretrained=False))
    assert not torch.equal(fresh, expected)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("pretrained", [True, False])
def test_half_precision_leaves_the_rotary_frequencies_exact(tmp_path, pretrained):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=20, intermediate_size=24, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    half, full = (
        load_model("AutoModelForCausalLM", "llama", pretrained=pretrained, seed=0, dtype=dtype)
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    frequencies = half.model.rotary_emb.inv_freq
    assert torch.equal(frequencies, full.model.rotary_emb.inv_freq)
    assert not torch.equal(frequencies, frequencies.bfloat16().float())


def test_masked_language_model(bert, texts):
    problem = build(model=bert, dataset=texts, kind="masked-lm", mask_rate=0.25)
    tokens, targets = problem.train[torch.arange(5)]
    assert tokens.shape == targets.shape == (5, 8)
    assert (targets != -100).sum(dim=1).tolist() == [2] * 5
    assert problem.weigh((tokens, targets)) == 10
    problem.module.eval()
    theirs = problem.module.model(input_ids=tokens, labels=targets).loss
    assert problem.loss(problem.module, (tokens, targets)).item() == pytest.approx(
        theirs.item(), rel=1e-6
    )
    assert theirs.item() == pytest.approx(math.log(len(WORDS)), abs=0.3)


def test_masking_follows_bert_and_touches_nothing_else():
    blocks = torch.randint(10, 1000, (400, 100), generator=torch.Generator().manual_seed(0))
    shown, targets = mask_tokens(blocks, 0.15, mask=3, vocabulary=1000, seed=0)
    chosen = targets != -100
    assert torch.equal(shown[~chosen], blocks[~chosen])
    assert torch.equal(targets[chosen], blocks[chosen])
    assert (chosen.sum(dim=1) == 15).all()
    # 6,000 tokens: shares are within 0.02 of their rates beyond doubt.
    assert (shown[chosen] == 3).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (shown[chosen] == blocks[chosen]).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert chosen.float().mean(dim=0).std() < 0.03  # everywhere in the block


@pytest.mark.parametrize("model", ["gpt2", "bert"])
def test_sequence_classification_splits_by_class(model, texts, request):
    name = request.getfixturevalue(model)
    problem = build(
        model=name,
        dataset=texts,
        kind="sequence-classification",
        heterogeneity="sorted",
        test_fraction=0,
        text="text" if model == "gpt2" else ["text", "other"],
        context=16,
    )
    inputs = problem.train[torch.from_numpy(problem.shards[0])]
    assert inputs[0].shape[1] == 16
    assert inputs[-1].tolist() == [0] * len(problem.shards[0])  # "bad" comes before "good"
    problem.module.eval()
    assert problem.loss(problem.module, inputs).item() == pytest.approx(math.log(2), abs=0.3)
    alone = problem.module(*(t[:1] for t in inputs[:-1]))
    together = problem.module(*inputs[:-1])[:1]
    torch.testing.assert_close(alone, together)  # padding is masked
    assert 0 <= problem.score(problem.module, inputs)["accuracy"].item() <= len(inputs[-1])


def test_a_saved_dataset_with_splits_and_a_row_limit(gpt2, tmp_path):
    rows = datasets.Dataset.from_dict({"sentence": TEXTS, "label": [0, 1] * 24})
    few = datasets.Dataset.from_dict({"sentence": TEXTS[:3], "label": [1, 1, 0]})
    datasets.DatasetDict({"train": rows, "validation": few}).save_to_disk(tmp_path / "saved")
    fields = {
        "model": gpt2,
        "dataset": "saved",
        "kind": "sequence-classification",
        "text": "sentence",
        "test_split": "validation",
    }
    problem = build(**fields, rows=20)
    assert (len(problem.train), len(problem.test)) == (20, 3)
    assert sorted(np.concatenate(problem.shards)) == list(range(20))
    assert problem.test[torch.arange(3)][-1].tolist() == [1, 1, 0]
    with pytest.raises(ConfigError, match=r"task\.train_split: 'saved' has no split 'trian'; did"):
        build(**fields, train_split="trian")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".txt", ".parquet", ".csv.gz"])
def test_every_kind_of_file_is_read(gpt2, tmp_path, suffix):
    import pandas as pd

    path, frame = tmp_path / f"texts{suffix}", pd.DataFrame({"text": TEXTS})
    if suffix == ".parquet":
        frame.to_parquet(path)
    elif suffix == ".txt":
        path.write_text("\n".join(TEXTS))
    else:
        frame.to_csv(path, sep="\t" if suffix == ".tsv" else ",", index=False)
    expected = build(model=gpt2, dataset=str(path)).train.dataset.tokens
    assert len(expected) == sum(len(t.split()) + 1 for t in TEXTS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "no/such-model"}, "task.model: cannot load 'no/such-model' ("),
        ({"dataset": "no/such-data"}, "task.dataset: cannot load 'no/such-data' ("),
        ({"dataset": "gpt2/config.xml"}, "task.dataset: cannot load 'gpt2/config.xml' (files must"),
        ({"tokenizer": "none"}, "task.tokenizer: cannot load 'none' ("),
        ({"text": "txet"}, "task.text: 'texts.jsonl' has no column 'txet'; did you mean 'text'"),
        ({"text": ["text", "other"]}, "task.text: has no effect with kind: causal-lm"),
        ({"label": "other"}, "task.label: has no effect with kind: causal-lm"),
        ({"mask_rate": 0.2}, "task.mask_rate: has no effect with kind: causal-lm"),
        (
            {"kind": "sequence-classification", "label": "lable"},
            "task.label: 'texts.jsonl' has no column 'lable'; did you mean 'label'",
        ),
        ({"context": 33}, "task.context: 'gpt2' takes at most 32 tokens, got 33"),
        ({"n": 100}, "ranks: 100 ranks for "),
        ({"kind": "mlm"}, "task.kind: must be 'causal-lm', 'masked-lm' or"),
    ],
)
def test_errors_name_field_value_and_fix(gpt2, texts, tmp_path, fields, message):
    (tmp_path / "gpt2" / "config.xml").touch()
    with pytest.raises(ConfigError) as error:
        build(**{"model": gpt2, "dataset": texts, **fields})
    assert str(error.value).startswith(message)


def test_a_truncated_checkpoint_is_named(gpt2, texts, tmp_path):
    weights = tmp_path / "gpt2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"task\.model: cannot load 'gpt2'"):
        build(model=gpt2, dataset=texts)


def test_the_packages_are_imported_when_needed_and_their_extra_is_named(monkeypatch):
    for package in ("transformers", "datasets"):
        monkeypatch.setitem(sys.modules, package, None)  # an import of it fails
    for module in ("hub", "huggingface"):
        monkeypatch.delitem(sys.modules, f"gossamer.algorithms.tasks.{module}")
    with pytest.raises(ConfigError, match=r"pip install 'gossamer\[huggingface\]'"):
        build(model="gpt2", dataset="texts")
