"""The pretraining task on small models, texts and tokenizers made here; nothing is fetched."""

import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from language_models_for_tests import SPECIAL, make_tokenizer, save
from pretraining_for_tests import STREAM, TEXTS, build, save_lines, stay_here
from torch.nn.functional import log_softmax

from gossamer.algorithms.evaluation import Evaluator
from gossamer.algorithms.tasks.language import PaddedDocuments, Windows
from gossamer.runtime.collectives import RankGroup
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.rows import RowLayout
from gossamer.runtime.transports.stacked import StackedTransport

datasets = pytest.importorskip("datasets", reason="needs the extra: gossamer[huggingface]")
tokenizers = pytest.importorskip("tokenizers", reason="needs the extra: gossamer[huggingface]")
transformers = pytest.importorskip("transformers", reason="needs the extra: gossamer[huggingface]")

SHAKESPEARE = Path(os.environ.get("GOSSAMER_DATA", "")) / "shakespeare" / "input.txt"


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    stay_here(monkeypatch, tmp_path)


@pytest.fixture
def texts(tmp_path):
    """Return a folder of 40 texts, a file each."""
    (tmp_path / "texts").mkdir()
    for k, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{k:02d}.txt").write_text(text)
    return "texts"


@pytest.fixture
def lines(tmp_path):
    """Return the name of a file with the same texts, a line each."""
    return save_lines(tmp_path / "texts.jsonl", TEXTS)


@pytest.fixture
def words(tmp_path):
    """Return the name of a tokenizer of words, with an end-of-text token."""
    make_tokenizer().save_pretrained(tmp_path / "words")
    return "words"


def all_of(dataset):
    return dataset[torch.arange(len(dataset))]


def texts_of(dataset):
    return documents_in(all_of(dataset))


def documents_in(batch):
    tokens, labels = batch
    return [bytes(row[mask].tolist()) for row, mask in zip(tokens, labels != -100, strict=True)]


# --- text -------------------------------------------------------------------------------------


def test_every_tenth_file_validates_and_every_token_is_predicted_once(texts):
    problem = build(data=texts)
    held_out = [k for k in range(40) if k % 10 == 9]
    for part, numbers in (
        (problem.test, held_out),
        (problem.train, set(range(40)) - set(held_out)),
    ):
        whole = "".join(TEXTS[k] for k in sorted(numbers)).encode()
        (windows,) = all_of(part)
        count = (len(whole) - 1) // 8 * 8
        assert bytes(windows[:, :-1].flatten().tolist()) == whole[:count]
        assert bytes(windows[:, 1:].flatten().tolist()) == whole[1 : count + 1]
    assert sorted(np.concatenate(problem.shards)) == list(range(len(problem.train)))
    assert problem.weigh(all_of(problem.train)) == 8 * len(problem.train)
    assert not problem.uneven


@pytest.mark.parametrize(("validation", "held_out"), [(10, 10), (4, 4), (0, None)])
def test_the_end_of_a_single_text_validates(tmp_path, validation, held_out):
    text = bytes(np.random.default_rng(0).integers(1, 128, 1000, dtype=np.uint8))
    (tmp_path / "one.txt").write_bytes(text)
    problem = build(data="one.txt", validation=validation)
    if held_out is None:
        assert problem.test is None
        assert bytes(problem.train.tokens.tolist()) == text
    else:
        cut = 1000 - 1000 // held_out
        assert bytes(problem.train.tokens.tolist()) == text[:cut]
        assert bytes(problem.test.tokens.tolist()) == text[cut:]


def test_a_file_that_two_patterns_name_is_read_once(texts):
    whole = build(data=texts).train.tokens
    assert torch.equal(build(data=["texts/0*.txt", texts, "texts/00.txt"]).train.tokens, whole)


@pytest.mark.parametrize("documents", ["packed", "single"])
@pytest.mark.parametrize("tokenizer", ["bytes", "words"])
def test_a_text_per_file_line_or_row_gives_the_same_tokens(
    texts, lines, words, documents, tokenizer
):
    fields = {"documents": documents, "tokenizer": tokenizer, "validation": 0}
    built = [
        build(data=texts, **fields),
        build(data=lines, **fields),
        build(dataset=lines, **fields),
    ]
    assert len({len(problem.train) for problem in built}) == 1
    for column in zip(*(all_of(problem.train) for problem in built), strict=True):
        assert torch.equal(column[0], column[1])
        assert torch.equal(column[0], column[2])


def test_the_end_of_json_lines_validates_or_a_split_does(tmp_path, lines):
    single = {"documents": "single", "context": 64}
    for problem in (build(data=lines, **single), build(dataset=lines, **single)):
        assert texts_of(problem.train) == [text.encode() for text in TEXTS[:36]]
        assert texts_of(problem.test) == [text.encode() for text in TEXTS[36:]]
    (tmp_path / "both").mkdir()
    save_lines(tmp_path / "both" / "train.jsonl", TEXTS)
    save_lines(tmp_path / "both" / "validation.jsonl", ["fresh text", "another", "third"])
    problem = build(dataset="both", **single)
    assert len(problem.train) == 40
    assert texts_of(problem.test) == [b"fresh text", b"another", b"third"]
    few = build(dataset="both", validation_documents=2, **single)
    assert texts_of(few.test) == [b"fresh text", b"another"]
    assert build(dataset="both", validation=0, **single).test is None
    other = build(dataset="both", train_split="validation", validation_split="train", **single)
    assert (len(other.train), len(other.test)) == (3, 40)
    alone = build(dataset="both", train_split="validation", **single)
    assert texts_of(alone.train) + texts_of(alone.test) == [b"fresh text", b"another", b"third"]


def test_sorted_by_file_gives_ranks_files_of_their_own(tmp_path):
    for name, letter in (("a", b"a"), ("b", b"b")):
        (tmp_path / f"{name}.txt").write_bytes(letter * 160)
    for documents in ("packed", "single"):
        problem = build(data="*.txt", heterogeneity="sorted", documents=documents, validation=0)
        tokens = problem.train[torch.from_numpy(problem.shards[1])][0]
        assert (tokens == ord("b")).all()


def test_the_standard_library_is_the_default():
    problem = build(context=64, n=4)
    assert isinstance(problem.train, Windows)
    assert problem.train.tokens.dtype == torch.uint8
    assert 0.02 < len(problem.test) / len(problem.train) < 0.3
    text = bytes(problem.test.tokens[:100_000].tolist()).decode(errors="replace")
    assert "def " in text
    assert "import" in text


@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason="no shakespeare/ in GOSSAMER_DATA")
def test_tiny_shakespeare_is_one_text_whose_end_validates():
    problem = build(data=str(SHAKESPEARE), context=64)
    text = SHAKESPEARE.read_bytes()
    cut = len(text) - len(text) // 10
    assert len(problem.train) == (cut - 1) // 64
    assert bytes(problem.test.tokens.tolist()) == text[cut:]


# --- documents of their own ---------------------------------------------------------------------


def test_a_document_is_cut_or_padded_on_the_right(lines):
    problem = build(data=lines, documents="single", context=16, validation=0)
    tokens, labels = all_of(problem.train)
    assert tokens.shape == labels.shape == (40, 16)
    for text, row, label in zip(TEXTS, tokens.tolist(), labels.tolist(), strict=True):
        known = list(text.encode()[:16])
        assert row[: len(known)] == label[: len(known)] == known
        assert label[len(known) :] == [-100] * (16 - len(known))
    assert problem.uneven
    assert problem.weigh((tokens, labels)) == sum(min(len(t), 16) - 1 for t in TEXTS)


def test_the_loss_is_that_of_transformers_which_is_given_the_padding_mask(lines):
    problem = build(data=lines, documents="single", context=40)
    tokens, labels = problem.train[torch.arange(12)]
    assert (labels == -100).any()
    with torch.no_grad():
        for p in problem.module.parameters():
            p.mul_(10)
        ours = problem.loss(problem.module, (tokens, labels))
        mask = (labels != -100).long()
        theirs = problem.module.model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        other = problem.loss(problem.module, (tokens.where(labels != -100, 77), labels))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert other.item() == ours.item()  # what stands in the padding is never looked at


def test_a_document_without_a_prediction_weighs_nothing():
    empty = PaddedDocuments(torch.tensor([7, 8, 9]), torch.tensor([0, 1, 3]), 4)
    module = torch.nn.Embedding(10, 10)
    problem = build(data=__file__, documents="single", validation=0, n=1)
    loss = problem.loss(module, empty[torch.tensor([0])])
    assert loss.item() == 0
    assert problem.weigh(empty[torch.tensor([0])]) == 0
    whole = problem.loss(module, empty[torch.arange(2)])
    assert whole.item() == problem.loss(module, empty[torch.tensor([1])]).item()


@pytest.mark.parametrize("objective", ["examples", "ranks"])
def test_perplexity_is_per_token_whatever_the_number_of_ranks_and_the_batches(lines, objective):
    found = {}
    for n, chunk in [(1, 512), (1, 3), (2, 3), (4, 5)]:
        problem = build(
            n, data=lines, documents="single", context=40, validation=2, dtype="float64"
        )
        with torch.no_grad():
            for p in problem.module.parameters():
                p.mul_(10)  # so that documents differ in their loss
        layout = RowLayout(problem.module)
        x = torch.zeros(n, layout.d, dtype=layout.dtype)
        layout.gather(problem.module, x[0])
        x[:] = x[0].clone()
        oracle = SimpleNamespace(
            weighting=None, layout=layout, backpropagates=False, examples_at_once=None
        )
        group = RankGroup(n, StackedTransport())
        evaluator = Evaluator(group, oracle, problem, chunk=chunk, objective=objective)
        found[n, chunk] = evaluator.evaluate(x)
    total, count, means = 0.0, 0, []
    for text in TEXTS[20:]:
        tokens = torch.tensor(list(text.encode()[:40]))
        with torch.no_grad():
            likelihoods = log_softmax(problem.module(tokens[None, :-1])[0], dim=-1)
        nats = -likelihoods.gather(1, tokens[1:, None])
        total, count = total + nats.sum().item(), count + len(nats)
        means.append(nats.mean().item())
    assert abs(np.mean(means) - total / count) > 1e-3  # a mean of documents would be another
    for figures in found.values():
        assert figures["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-6)
        assert figures["rank_loss"] == pytest.approx(total / count, rel=1e-6)
    if objective == "examples":
        losses = [figures["loss"] for figures in found.values()]
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)


# --- tokenizers and models ----------------------------------------------------------------------


def test_packed_texts_end_in_the_tokenizers_token(lines, words):
    problem = build(data=lines, tokenizer=words, validation=0)
    tokenizer = make_tokenizer()
    expected = [k for text in TEXTS for k in [*tokenizer(text)["input_ids"], 3]]
    assert problem.train.tokens.tolist() == expected
    assert problem.module.model.config.vocab_size == len(tokenizer)


def test_tokens_that_only_a_texts_spelling_brings_may_lie_beyond_the_vocabulary(tmp_path):
    tokenizer = make_tokenizer()
    ordinary = len(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<extra_0>", "<extra_1>"]})
    tokenizer.save_pretrained(tmp_path / "extra")
    save_lines(tmp_path / "some.jsonl", ["the film <extra_1> is good"] * 9)
    fields = {"data": "some.jsonl", "tokenizer": "extra", "validation": 0, "n": 1}
    unknown = SPECIAL.index("[UNK]")
    for vocabulary, third in ((None, ordinary + 1), (ordinary, unknown)):
        problem = build(vocabulary=vocabulary, **fields)
        assert problem.train.tokens[2].item() == third
        assert problem.module.model.config.vocab_size == (vocabulary or ordinary + 2)
    with pytest.raises(
        ConfigError, match=rf"task\.vocabulary: .* has {ordinary} tokens, more than"
    ):
        build(vocabulary=ordinary - 1, **fields)


def test_a_model_knows_the_last_token_of_a_numbering_with_gaps(tmp_path):
    ids = {"[UNK]": 0, "a": 1, "b": 9}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[UNK]"
    ).save_pretrained(tmp_path / "gaps")
    save_lines(tmp_path / "some.jsonl", ["a b a b c"] * 4)
    fields = {"data": "some.jsonl", "tokenizer": "gaps", "validation": 0, "context": 4, "n": 1}
    problem = build(**fields)
    assert problem.train.tokens[:5].tolist() == [1, 9, 1, 9, 0]
    assert problem.module.model.config.vocab_size == 10
    with pytest.raises(ConfigError, match=r"has 10 tokens, more than 3; leave it out"):
        build(vocabulary=3, **fields)


def test_a_larger_vocabulary_may_be_asked_for(lines):
    assert build(data=lines, vocabulary=300).module.model.config.vocab_size == 300


def test_a_model_has_fresh_weights_of_the_seed_and_gives_logits(lines):
    def weights(seed, **fields):
        module = build(data=lines, seed=seed, **fields).module
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))
    problem = build(data=lines)
    (tokens,) = problem.train[torch.arange(3)]
    assert problem.module(tokens[:, :-1]).shape == (3, 8, 256)
    assert problem.loss(problem.module, (tokens,)).item() == pytest.approx(math.log(256), abs=0.05)
    names = {name.removeprefix("model.") for name, _ in problem.module.named_parameters()}
    assert names == {name for name, _ in problem.module.model.named_parameters()}
    assert "model.layers.0.self_attn.q_proj.weight" in names


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
def test_any_causal_model_is_made_anew_from_its_configuration(tmp_path, lines, kind):
    saved = save(kind, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    problem = build(data=lines, model=saved, n=1)
    config = problem.module.model.config
    assert config.vocab_size == 256
    assert not config.use_cache
    problem.module.eval()
    inputs = problem.train[torch.arange(4)]
    loss = problem.loss(problem.module, inputs)
    assert loss.item() == pytest.approx(math.log(256), abs=0.1)
    loss.backward()
    embedding = problem.module.model.get_input_embeddings().weight
    assert embedding.grad[inputs[0][:, :-1].unique()].abs().amax(dim=1).min() > 0
    with pytest.raises(ConfigError, match=r"task\.context: .* takes at most 48 tokens, got 49"):
        build(data=lines, model=saved, context=49)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_weights_have_the_dtype_and_losses_are_float32_at_least(lines, dtype):
    problem = build(data=lines, dtype=dtype)
    assert {p.dtype for p in problem.module.parameters()} == {getattr(torch, dtype)}
    loss = problem.loss(problem.module, problem.train[torch.arange(4)])
    assert loss.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert loss.item() == pytest.approx(math.log(256), abs=0.05)


def test_a_scheme_says_what_is_trained(lines):
    problem = build(data=lines, scheme={"name": "lora", "r": 2, "targets": ["q_proj"]})
    trained = {name for name, p in problem.module.named_parameters() if p.requires_grad}
    assert len(trained) == 2
    assert all("q_proj.lora_" in name for name in trained)


# --- streams ------------------------------------------------------------------------------------


def test_a_stream_validates_on_a_split_or_on_its_first_texts(tmp_path, lines):
    problem = build(dataset=lines, validation_documents=5, **STREAM)
    assert problem.shards == ()
    assert texts_of(problem.test) == [text.encode() for text in TEXTS[:5]]
    drawn = [problem.train.draw(0, rank, step, 0, 4) for step in range(5) for rank in range(2)]
    seen = [text.decode() for batch in drawn for text in documents_in(batch)]
    assert set(seen) == set(TEXTS[5:])
    (tmp_path / "both").mkdir()
    save_lines(tmp_path / "both" / "train.jsonl", TEXTS)
    save_lines(tmp_path / "both" / "validation.jsonl", ["fresh text", "another"])
    assert texts_of(build(dataset="both", **STREAM).test) == [b"fresh text", b"another"]
    assert build(dataset="both", validation=0, **STREAM).test is None
    save_lines(tmp_path / "many.jsonl", map(str, range(1100)))
    assert len(build(dataset="many.jsonl", **STREAM).test) == 1000


def test_the_order_of_a_stream_is_the_runs_or_that_of_a_seed_of_its_own(lines):
    def first(seed, **fields):
        problem = build(dataset=lines, seed=seed, validation=0, **STREAM, **fields)
        return problem.train.draw(seed, 0, 0, 0, 8)[0]

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))
    assert torch.equal(first(-1), first(-1))
    assert torch.equal(first(0, shuffle_seed=42), first(1, shuffle_seed=42))
    rows = datasets.load_dataset("json", data_files=lines, streaming=True)["train"]
    shuffled = rows.shuffle(seed=42, buffer_size=7)
    expected = [row["text"].encode() for row in shuffled][:16:2]
    for row, text in zip(first(0, shuffle_seed=42), expected, strict=True):
        assert bytes(row[: len(text)].tolist()) == text
