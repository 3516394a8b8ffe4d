"""The task of prompts: the texts, the candidates' tokens and scores, the division of examples."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from language_models_for_tests import (
    SENTENCES,
    make_model,
    make_tokenizer,
    save,
    save_rows,
    sentence_rows,
)

from gossamer.algorithms.registry import find
from gossamer.algorithms.tasks.candidates import CandidateEncoder
from gossamer.algorithms.tasks.templates import Prompt
from gossamer.algorithms.zeroth_order.objectives import find_objective
from gossamer.runtime.component import validate
from gossamer.runtime.errors import ConfigError

datasets = pytest.importorskip("datasets", reason="needs the extra: gossamer[huggingface]")
EXPERIMENTS = Path(__file__).parents[2] / "launch" / "experiments"
SST2 = Path(os.environ.get("GOSSAMER_DATA", "/nowhere")) / "sst2"


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and data, made once."""
    found = tmp_path_factory.mktemp("prompted")
    for kind in ("gpt2", "opt", "bert"):
        save(kind, found / kind)
    save_rows(found / "rows.jsonl", sentence_rows(40))
    return found


def fields(folder, model="gpt2", **changes):
    return {
        "model": str(folder / model),
        "kind": "masked-lm" if model == "bert" else "causal-lm",
        "dataset": str(folder / "rows.jsonl"),
        "template": "sst2",
        "context": 16,
        "train_examples": 20,
        "dev_examples": 5,
        "test_examples": 10,
        **changes,
    }


def build(folder, model="gpt2", n=2, seed=0, **changes):
    task = validate(find("task", "prompted"), fields(folder, model, **changes), "task")
    return task.build(n, seed)


# --- tokens and scores ------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gpt2", "opt", "bert"])
def test_a_score_is_the_mean_log_probability_of_the_candidates_tokens(folder, model):
    """Against one unpadded sequence at a time, its tokens told apart by counting words."""
    problem = build(folder, model, labels={0: "bad and long", 1: "great"})
    module, tokenizer = problem.module.eval(), make_tokenizer()
    *features, labels = problem.train[torch.arange(len(problem.train))]
    scores = module(*features)
    assert scores.shape == (20, 2)
    assert scores.dtype == torch.float32
    texts = {tuple(tokenizer(f"{s} It was")["input_ids"]): s for s in SENTENCES}
    for k, (tokens, mask) in enumerate(zip(features[0], features[1], strict=True)):
        for c, option in enumerate(["bad and long", "great"]):
            length, words = int(mask[c].sum()), len(option.split())
            before = tuple(tokens[c, : length - words].tolist())
            ids = torch.tensor(tokenizer(f"{texts[before]} It was {option}")["input_ids"])
            assert len(ids) == length
            shown = ids.clone()
            if model == "bert":
                shown[-words:] = tokenizer.mask_token_id
            logits = module.model(input_ids=shown[None]).logits[0].double().log_softmax(-1)
            rows = logits[-words:] if model == "bert" else logits[-words - 1 : -1]
            expected = rows.gather(1, ids[-words:, None]).mean()
            assert scores[k, c].item() == pytest.approx(expected.item(), rel=1e-5)
    loss = problem.loss(module, (*features, labels))
    assert loss.item() == pytest.approx(F.cross_entropy(scores, labels).item(), rel=1e-6)
    right = problem.score(module, (*features, labels))["accuracy"]
    assert right == (scores.argmax(1) == labels).sum()


@pytest.mark.parametrize("model", ["gpt2", "bert"])
@pytest.mark.parametrize("as_classification", [True, False])
def test_padding_changes_no_loss(folder, model, as_classification):
    problem = build(folder, model, as_classification=as_classification)
    module, every = problem.module.eval(), torch.arange(len(problem.train))
    together = problem.loss(module, problem.train[every])
    alone = [problem.train[every[k : k + 1]] for k in range(len(every))]
    assert len({inputs[0].shape for inputs in alone}) > 1  # a batch is cut to its own longest
    mean = sum(problem.loss(module, inputs) for inputs in alone) / len(alone)
    torch.testing.assert_close(together, mean, rtol=1e-5, atol=0)


def test_without_classification_the_right_candidate_alone_is_trained_on(folder):
    classified = build(folder)
    problem = build(folder, as_classification=False)
    module, inputs = problem.module.eval(), problem.train[torch.arange(20)]
    gold = module(*inputs[:-1]).gather(1, inputs[-1][:, None]).mean()
    torch.testing.assert_close(problem.loss(module, inputs), -gold)
    assert problem.loss(module, inputs) != classified.loss(module, inputs)
    seen = []
    module.model.register_forward_pre_hook(
        lambda _, __, given: seen.append(len(given["input_ids"])), with_kwargs=True
    )
    problem.loss(module, inputs)
    assert seen == [20]


def test_a_long_text_loses_its_beginning_and_keeps_candidate_and_special_tokens():
    tokenizer = make_tokenizer()
    ids = tokenizer.convert_tokens_to_ids
    prompt = Prompt("the film is so long It was ", "good", " , I saw it")
    encoder = CandidateEncoder(tokenizer, 7, masked=True)
    encoder._head, encoder._tail = [1], [3]
    examples = encoder.encode([[prompt, prompt]], [0])
    shown = ["[UNK]", "It", "was", "[MASK]", ",", "I", "[EOS]"]
    assert examples.tokens[0, 0].tolist() == [ids(w) for w in shown]
    assert examples.places[0, 0].tolist() == [3]
    assert examples.targets[0, 0].tolist() == [ids("good")]
    causal = CandidateEncoder(tokenizer, 4, masked=False)
    examples = causal.encode([[prompt._replace(after=""), Prompt("It ", "was good", "")]], [1])
    assert examples.tokens[0, 0].tolist() == [ids(w) for w in ["long", "It", "was", "good"]]
    assert examples.places[0].tolist() == [[2, 0], [0, 1]]
    assert examples.targets[0].tolist() == [[ids("good"), -100], [ids("was"), ids("good")]]


RECORDS = [
    {
        "passage": "the film was long and bad",
        "query": "so I saw @placeholder",
        "entities": ["it", "the film", "It so bad", "No"][: 2 + k % 3],
        "answers": ["the film", "it"] if k % 2 else ["the film"],
    }
    for k in range(40)
]


@pytest.mark.parametrize("model", ["gpt2", "opt", "bert"])
def test_rows_with_candidates_of_their_own_are_scored_one_by_one(folder, tmp_path, model):
    own = {"template": "record", "dataset": save_rows(tmp_path / "records.jsonl", RECORDS)}
    problem = build(folder, model, **own)
    module, count = problem.module.eval(), len(problem.train)
    *features, labels, right = problem.train[torch.arange(count)]
    given = features[1].any(dim=-1)
    assert set(given.sum(dim=1).tolist()) == {2, 3, 4}
    expected, losses = 0, []
    for k in range(count):
        scores = module(*(t[k : k + 1, : given[k].sum()] for t in features))[0]
        assert scores.isfinite().all()
        expected += right[k, scores.argmax()].item()
        losses.append(-scores[labels[k]])
        assert right[k, labels[k]]
        assert not right[k, : labels[k]].any()
    assert 0 < expected < count
    inputs = (*features, labels, right)
    assert problem.score(module, inputs)["accuracy"] == expected
    assert problem.score(module, tuple(t[:1] for t in inputs))["accuracy"] in (0, 1)
    torch.testing.assert_close(problem.loss(module, inputs), sum(losses) / count)


@pytest.mark.parametrize(
    ("changes", "row", "message"),
    [
        ({}, {"answers": ["Bob"]}, "task.label: column 'answers' holds ['Bob'], which has none of"),
        ({}, {"query": "I saw it"}, "task.columns: query 'I saw it' must have the gap '@placeho"),
        ({}, {"entities": []}, "task.columns: query 'so I saw @placeholder' must have the gap"),
        ({"label": "gold"}, {}, "task.label: '{rows}' has no column 'gold'"),
        ({"columns": {"query": "q"}}, {}, "task.columns: '{rows}' has no column 'q'"),
        ({"as_classification": True}, {}, "task.as_classification: template 'record' has no cand"),
        ({"max_new_tokens": 5}, {}, "task.max_new_tokens: has no effect with template 'record'"),
    ],
)
def test_rows_without_a_right_candidate_are_refused(folder, tmp_path, changes, row, message):
    path = save_rows(tmp_path / "records.jsonl", [record | row for record in RECORDS])
    with pytest.raises(ConfigError) as error:
        build(folder, template="record", dataset=path, **changes)
    assert str(error.value).startswith(message.replace("{rows}", path))


def test_f1_of_classes_is_refused_where_rows_have_their_own(folder, tmp_path):
    path = save_rows(tmp_path / "records.jsonl", RECORDS)
    problem = build(folder, template="record", dataset=path)
    with pytest.raises(
        ConfigError, match=r"^oracle\.minimize: f1 is of classes, .*; use loss or ac"
    ):
        find_objective("f1", problem, "oracle.minimize")
    problem.module.eval()
    inputs = problem.train[torch.arange(10)]
    accuracy = problem.score(problem.module, inputs)["accuracy"] / 10
    assert find_objective("accuracy", problem, "")(problem.module, inputs) == -accuracy


@pytest.mark.parametrize(
    ("dtype", "kept"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_weights_of_half_precision_give_scores_in_single_precision(folder, dtype, kept):
    module = build(folder, dtype=dtype).module
    assert {p.dtype for p in module.parameters()} == {kept}
    exact = build(folder)
    inputs = exact.train[torch.arange(4)]
    scores = module.eval()(*inputs[:-1])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, exact.module.eval()(*inputs[:-1]), rtol=0.05, atol=0.05)


# --- examples ---------------------------------------------------------------------------------


def test_examples_are_divided_by_the_seed_and_belong_to_one_part(folder, tmp_path):
    rows = [{"sentence": "good", "label": k % 2, "n": k} for k in range(40)]
    words = " ".join(f"w{k}" for k in range(40)).split()
    tokenizer = make_tokenizer(words)
    make_model("gpt2", len(tokenizer)).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    path = save_rows(tmp_path / "n.jsonl", [row | {"w": f"w{row['n']}"} for row in rows])
    own = {
        "dataset": path,
        "model": str(tmp_path / "m"),
        "template": "{w} {label}",
        "labels": {0: "w0", 1: "w1"},
    }

    def parts(seed, **changes):
        problem = build(folder, seed=seed, **own, **changes)
        found = (problem.train, problem.test)
        return [d.tokens[:, 0, 0].tolist() for d in found]

    train, test = parts(0)
    _, dev = parts(0, evaluate="dev")
    assert (len(train), len(test), len(dev)) == (20, 10, 5)
    both = build(folder, evaluate="both", **own)
    assert [d.tokens[:, 0, 0].tolist() for d in (both.test, both.dev)] == [test, dev]
    assert len({*train, *test, *dev}) == 35
    assert parts(0) == [train, test]
    assert parts(1) != [train, test]
    everything, _ = parts(0, train_examples=None)
    assert len(everything) == 25
    assert set(train) < set(everything)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "sst3"}, "task.template: unknown template 'sst3'; did you mean 'sst2'"),
        ({"template": "rte"}, "task.template: '{rows}' has no column 'hypothesis'; known: "),
        ({"template": "{sentence} It was"}, "task.labels: a template of your own needs two labels"),
        (
            {"template": "{sentence} It was", "labels": {0: "bad", 1: "good"}},
            "task.template: the candidate's place, {label}, must stand in the text once",
        ),
        (
            {"template": "{sentence:loud} {label}", "labels": {0: "bad", 1: "good"}},
            "task.template: no filter 'loud'; known: after_blank",
        ),
        (
            {"template": "{sentence} {label} .", "labels": {0: "bad", 1: "good"}},
            "task.template: a causal model does not see what stands behind {label}; end there",
        ),
        (
            {"template": "{label}", "labels": {0: "bad", 1: "good"}},
            "task.template: no token stands before candidate 'bad'",
        ),
        ({"template": "boolq", "version": 1}, "task.version: template 'boolq' has no version 1"),
        ({"template": "copa", "labels": {0: "a", 1: "b"}}, "task.labels: have no effect with"),
        ({"labels": {0: "bad", 2: "good"}}, "task.labels: column 'label' holds 1, and the labels"),
        ({"labels": {0: "bad", 1: ""}}, "task.template: candidate '' has no tokens"),
        ({"label": "lable"}, "task.label: '{rows}' has no column 'lable'; did you mean 'label'"),
        ({"columns": {"text": "a"}}, "task.columns: the template has no field 'text'"),
        ({"columns": {"sentence": "a"}}, "task.columns: '{rows}' has no column 'a'"),
        ({"kind": "masked-lm"}, "task.model: cannot load '"),
        ({"context": 49}, "task.context: '{model}' takes at most 48 tokens, got 49"),
        (
            {"context": 40, "scheme": "prompt"},
            "task.context: '{model}' takes at most 48 tokens, got 50",
        ),
        ({"train_examples": 26}, "task.train_examples: 41 rows are needed to train on and to hol"),
        ({"test_examples": None}, "task.test_examples: needs a number where there is no test_spl"),
        ({"dev_examples": 0, "evaluate": "dev"}, "task.evaluate: there are no examples with dev"),
        ({"header": ["a"]}, "task.header: '{rows}' is no table"),
        ({"n": 21}, "ranks: 21 ranks for 20 training examples"),
    ],
)
def test_errors_name_field_value_and_fix(folder, changes, message):
    with pytest.raises(ConfigError) as error:
        build(folder, **changes)
    names = {"{rows}": str(folder / "rows.jsonl"), "{model}": str(folder / "gpt2")}
    for name, value in names.items():
        message = message.replace(name, value)
    assert str(error.value).startswith(message)


def test_tables_without_a_line_of_names_are_splits_by_the_names_of_their_files(folder, tmp_path):
    for split, count in (("train", 30), ("dev", 8)):
        lines = [f"{row['sentence']}\t{row['label']}\n" for row in sentence_rows(count)]
        (tmp_path / f"{split}.tsv").write_text("".join(lines))
    tables = {"dataset": str(tmp_path), "header": ["sentence", "label"], "test_split": "dev"}
    problem = build(folder, **tables, test_examples=None)
    assert len(problem.test) == 8
    assert problem.test.labels.tolist() == [row["label"] for row in sentence_rows(8)]


@pytest.mark.slow
@pytest.mark.skipif(not SST2.is_dir(), reason="needs GOSSAMER_DATA with sst2/")
def test_the_sst2_experiment_fine_tunes_a_model_pretrained_here(tmp_path):
    """A model of OPT's shape learns the words of reviews, then 4 ranks fine-tune it; step 0 logs
    the accuracy of the model as it came."""
    lines = [line.split("\t")[0] for line in (SST2 / "train.tsv").read_text().splitlines()]
    words = sorted({w for line in lines for w in line.split()} | {"It", "terrible", "great"})
    tokenizer = make_tokenizer(words)
    torch.manual_seed(0)
    model = make_model("opt", len(tokenizer), positions=80)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        batch = tokenizer(lines[8 * step : 8 * step + 8], return_tensors="pt", padding=True)
        hidden = batch["attention_mask"] == 0
        loss = model(**batch, labels=batch["input_ids"].masked_fill(hidden, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3  # the words' frequencies
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    sizes = {"context": 64, "train_examples": 16, "dev_examples": 0, "test_examples": 24}
    changes = [f"task.{k}={v}" for k, v in sizes.items()] + ["steps=3", "evaluate_every=10"]
    command = [sys.executable, "-m", "gossamer", "run", str(EXPERIMENTS / "sst2.yaml")]
    command += ["--out", str(tmp_path / "out"), "-s", f"task.model={tmp_path / 'model'}"]
    command += [part for change in changes for part in ("-s", change)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    values = fields(tmp_path, dataset=str(SST2), header=["sentence", "label"], **sizes)
    values |= {"model": str(tmp_path / "model"), "test_split": "test"}
    problem = validate(find("task", "prompted"), values, "task").build(4, 0)
    inputs = problem.test[torch.arange(24)]
    zero_shot = problem.score(problem.module.eval(), inputs)["accuracy"].item() / 24
    for run in ("full", "lora"):
        records = (tmp_path / "out" / run / "metrics.jsonl").read_text().splitlines()
        first, last = json.loads(records[0]), json.loads(records[-1])
        assert first["accuracy"] == pytest.approx(zero_shot)
        assert (last["step"], last["forwards"]) == (3, 6)
        assert last["consensus"] == 0
        # A float64 from each rank to each of the others, in each step.
        assert last["bytes_sent"] == 3 * 4 * 3 * 8
