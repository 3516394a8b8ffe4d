"""Questions answered in words: what a model goes on with, its scores, training on the answers."""

import json
from types import SimpleNamespace

import pytest
import torch
from language_models_for_tests import make_tokenizer, save, save_rows, transformers

from gossamer.algorithms.decentralized.all_reduce import AllReduce
from gossamer.algorithms.optimizers.adam import Adam
from gossamer.algorithms.optimizers.sgd import SGD
from gossamer.algorithms.oracles.backprop import Backprop
from gossamer.algorithms.program import TrainingProgram
from gossamer.algorithms.registry import find
from gossamer.algorithms.tasks.candidates import CandidateEncoder
from gossamer.algorithms.tasks.generation import AnswerScore, generate
from gossamer.algorithms.tasks.templates import find_template
from gossamer.algorithms.zeroth_order.zeroth_order import ZerothOrder
from gossamer.launch.report_runs import read_runs, table_row
from gossamer.launch.start import start_run
from gossamer.runtime import Communicator, ConfigError, StackedTransport
from gossamer.runtime.component import validate
from gossamer.runtime.perturb import perturb_
from gossamer.topologies import build as build_topology

datasets = pytest.importorskip("datasets", reason="needs the extra: gossamer[huggingface]")

HOMES = {"Ann": "the red house", "Bob": "a boat", "Eve": "Rome", "Joe": "a tree", "Kim": "Oslo"}
WORDS = [
    *("Title:", "Context:", "Passage:", "Question:", "Answer:", "people", "long", "ago", ",", "."),
    *("where", "is", "Where", "does", "live", "?", "lives", "in", "still", *HOMES),
    *dict.fromkeys(word for home in HOMES.values() for word in home.split()),
]
SCHEMES = ["full", "lora", "prefix", "prompt", "head"]
NEWLINE, EOS = 4, 3


def home_rows(count):
    """Questions with contexts of several lengths, the same answers again and again."""
    names = list(HOMES)
    return [
        {
            "title": "people",
            "context": " ".join(["long ago ,"] * (k % 3) + ["people lives in", "Rome ."]),
            "question": f"Where does {names[k % 5]} live ?",
            "answers": {"text": [HOMES[names[k % 5]], "in " + HOMES[names[k % 5]]]},
        }
        for k in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and data, made once."""
    found = tmp_path_factory.mktemp("generation")
    tokenizer = make_tokenizer(WORDS, newlines=True)
    for kind in ("gpt2", "opt", "llama", "bert"):
        save(kind, found / kind, tokenizer, width=32, positions=64)
    save_rows(found / "rows.jsonl", home_rows(60))
    return found


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def fields(folder, model="gpt2", **changes):
    return {
        "model": str(folder / model),
        "dataset": str(folder / "rows.jsonl"),
        "template": "squad",
        "context": 40,
        "max_new_tokens": 6,
        "train_examples": 40,
        "dev_examples": 0,
        "test_examples": 20,
        **changes,
    }


def build(folder, model="gpt2", n=2, seed=0, **changes):
    values = {k: v for k, v in fields(folder, model, **changes).items() if v is not ...}
    return validate(find("task", "prompted"), values, "task").build(n, seed)


def needs_peft(scheme):
    if scheme == "lora":
        pytest.importorskip("peft", reason="needs the extra: gossamer[huggingface]")


# --- what a model goes on with ------------------------------------------------------------------


def random_prompts(vocabulary, lengths=(9, 4, 1, 6)):
    generator = torch.Generator().manual_seed(0)
    shape = (len(lengths), max(lengths))
    tokens = torch.randint(NEWLINE + 1, vocabulary, shape, generator=generator)
    return tokens, torch.tensor(lengths)


def is_end(token):
    return token in (NEWLINE, EOS)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
def test_tokens_are_those_of_transformers_own_greedy_decoding(folder, kind):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / kind).eval()
    prompts, lengths = random_prompts(model.config.vocab_size)
    found = generate(model, prompts, lengths, 12, is_end)
    for tokens, prompt, length in zip(found, prompts, lengths, strict=True):
        expected = model.generate(
            prompt[None, :length],
            attention_mask=torch.ones(1, length).long(),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=[NEWLINE, EOS],
            pad_token_id=0,
        )
        assert tokens == expected[0, length:].tolist()
    assert len({tuple(tokens) for tokens in found}) > 1


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_examples_answer_does_not_depend_on_its_batch(folder, kind, scheme):
    needs_peft(scheme)
    model = build(folder, kind, scheme=scheme).module.eval().model
    prompts, lengths = random_prompts(len(make_tokenizer(WORDS, newlines=True)))
    together = generate(model, prompts, lengths, 8, is_end)
    assert len({tuple(tokens) for tokens in together}) > 1
    for tokens, prompt, length in zip(together, prompts, lengths, strict=True):
        assert generate(model, prompt[None, :length], length[None], 8, is_end) == [tokens]


class Scripted:
    """A model that goes on with the tokens of a script, chosen by the first token of the prompt."""

    def __init__(self, scripts, prompt_length):
        self.scripts, self.begin, self.batches = scripts, prompt_length, []

    def __call__(self, *, input_ids, attention_mask):
        self.batches.append(len(input_ids))
        logits = torch.zeros(*input_ids.shape, 10)
        for row, ids, mask in zip(logits, input_ids, attention_mask, strict=True):
            last = int(mask.sum()) - 1
            row[last, self.scripts[int(ids[0])][last + 1 - self.begin]] = 1
        return SimpleNamespace(logits=logits)


def test_an_answer_ends_with_its_end_or_the_last_token_and_is_computed_no_further():
    model = Scripted({5: [9, NEWLINE, 9], 6: [7, 8, 9], 7: [EOS]}, prompt_length=2)
    prompts, lengths = torch.tensor([[5, 5], [6, 6], [7, 7]]), torch.tensor([2, 2, 2])
    assert generate(model, prompts, lengths, 3, is_end) == [[9, NEWLINE], [7, 8, 9], [EOS]]
    assert model.batches == [3, 2, 1]
    assert generate(model, prompts[:0], lengths[:0], 3, is_end) == []


def test_scores_are_sums_of_the_best_over_the_right_answers():
    tokenizer = make_tokenizer(["red", "house", "Rome", "in", "x"], newlines=True)
    red, house, rome, into = tokenizer.convert_tokens_to_ids(["red", "house", "Rome", "in"])
    scripts = {5: [red, house, NEWLINE], 6: [into, rome, EOS], 7: [NEWLINE], 8: [rome] * 3}
    score = AnswerScore(tokenizer, 3)
    score.take([["not asked"]])
    numbers = score.take([["roof", "a red house"], ["Rome"], ["Rome"], ["Rome", "Oslo"]])
    assert numbers.tolist() == [1, 2, 3, 4]
    module = SimpleNamespace(model=Scripted(scripts, prompt_length=1))
    inputs = (torch.tensor([[5], [6], [7], [8]]), torch.tensor([1, 1, 1, 1]), numbers)
    assert score.answer(module, *inputs[:2]) == ["red house", "in Rome", "", "Rome Rome Rome"]
    sums = score(module, inputs)
    assert sums["f1"].item() == pytest.approx(1 + 2 / 3 + 0 + 2 / 4)
    assert sums["exact_match"].item() == 1
    assert {t.dtype for t in sums.values()} == {torch.float64}


def test_a_token_that_holds_a_newline_ends_an_answer_and_what_stands_before_it_counts():
    tokenizer = make_tokenizer(["Inc", ".\n", "x"], newlines=True)
    inc, stop = tokenizer.convert_tokens_to_ids(["Inc", ".\n"])
    module = SimpleNamespace(model=Scripted({5: [inc, stop, inc]}, prompt_length=1))
    answers = AnswerScore(tokenizer, 3).answer(module, torch.tensor([[5]]), torch.tensor([1]))
    assert answers == ["Inc ."]


# --- examples -------------------------------------------------------------------------------------


def test_training_minimises_the_first_answers_loss_and_that_of_the_newline_after_it(folder):
    problem = build(folder)
    module, tokenizer = problem.module.eval(), make_tokenizer(WORDS, newlines=True)
    losses = []
    for k in range(5):
        inputs = problem.train[torch.tensor([k])]
        *_, prompts, lengths, _ = inputs
        text = tokenizer.decode(prompts[0, : int(lengths)])
        name = next(name for name in HOMES if name in text)
        before = f"Title: people\nContext: {'long ago , ' * text.count('ago')}"
        before += f"people lives in Rome .\nQuestion: Where does {name} live ?\nAnswer:"
        assert tokenizer(before)["input_ids"] == prompts[0].tolist()
        ids = torch.tensor(tokenizer(f"{before} {HOMES[name]}\n")["input_ids"])
        answer = len(ids) - int(lengths)
        assert answer == len(HOMES[name].split()) + 1
        logits = module.model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        expected = -logits[-answer - 1 : -1].gather(1, ids[-answer:, None]).mean()
        losses.append(problem.loss(module, inputs))
        assert losses[-1].item() == pytest.approx(expected.item(), rel=1e-5)
    together = problem.loss(module, problem.train[torch.arange(5)])
    torch.testing.assert_close(together, sum(losses) / 5, rtol=1e-5, atol=0)


def test_long_texts_lose_their_beginning_and_leave_room_for_the_answer(folder):
    whole, cut = build(folder), build(folder, context=20)
    every = torch.arange(40)
    *_, prompts, lengths, _ = whole.train[every]
    tokens, mask, places, *_, shorter, cut_lengths, _ = cut.train[every]
    assert cut_lengths.tolist() == [14] * 40  # 20 less 6 for the answer
    for k in every:
        assert shorter[k].tolist() == prompts[k, lengths[k] - 14 : lengths[k]].tolist()
        begin = int(places[k, 0, 0]) + 1
        assert tokens[k, 0, :begin].tolist() == shorter[k].tolist()
    assert mask.sum(dim=-1).max() == 14 + 4


def bytes_tokenizer(texts, merges):
    """Bytes, and the likeliest pairs of them; nothing keeps a token from spanning words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 1 + merges, special_tokens=["[EOS]"], initial_alphabet=alphabet
    )
    core.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="[EOS]", pad_token="[EOS]"
    )


@pytest.mark.parametrize("context", [300, 60])
def test_a_prompt_does_not_depend_on_the_answer(context):
    """Even where the answer's first token begins in the text before it."""
    tokenizer = bytes_tokenizer([": a", ": O", ": the"], merges=4)
    encoder = CandidateEncoder(tokenizer, context, masked=False, room=20)
    template, spans = find_template("squad"), []
    for row in home_rows(15):
        (prompt,) = template.render(row)
        ids = tokenizer(prompt.before.removesuffix(" "))["input_ids"]
        tokens, lengths = encoder.encode_starts([prompt.before])
        assert tokens[0].tolist() == ids[-(context - 20) :]
        assert lengths.tolist() == [min(len(ids), context - 20)]
        found = encoder.encode([[prompt]], [0])
        answer = tokenizer.decode(found.targets[0, 0])
        assert answer.endswith(prompt.option)
        assert found.lengths.max() <= context
        spans.append(answer.startswith(":"))
    assert any(spans)


# --- training and its figures ---------------------------------------------------------------------


def program(problem, oracle, optimizer=None):
    comm = Communicator(build_topology("ring", 2), StackedTransport("cpu"), steps=200)
    algorithm = AllReduce(optimizer=optimizer or Adam(lr=3e-3))
    return TrainingProgram(comm, problem, oracle, algorithm, {"per_rank": False}).start()


def advance(made, steps):
    for _ in range(steps):
        made.step()
        made.comm.step += 1
        made.comm.round += made.rounds_per_step


def test_f1_rises_when_a_model_learns_the_answers(folder):
    made = program(build(folder, "llama"), Backprop(batch_size=10))
    before = made.evaluate()
    advance(made, 40)
    after = made.evaluate()
    assert before["f1"] < 0.3
    assert after["f1"] > 0.9
    assert after["f1"] >= after["exact_match"] > 0.8
    assert after["test_loss"] < before["test_loss"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_minus_the_f1_of_generated_answers_can_be_minimised(folder, scheme):
    needs_peft(scheme)
    problem = build(folder, scheme=scheme)
    score, calls = problem.score, []
    problem.score = lambda module, inputs: calls.append(len(inputs[0])) or score(module, inputs)
    made = program(problem, ZerothOrder(minimize="f1", batch_size=5, eps=0.1))
    calls.clear()
    batch = made._batches()[0]
    losses = made.oracle.loss(made.state.x, batch)
    for loss, examples in zip(losses, batch, strict=True):
        assert loss.item() == -score(problem.module, examples.inputs)["f1"].item() / 5
    calls.clear()
    figures = made.oracle.deferred(made.state.x, batch)
    assert calls == [5] * 4  # two ranks, on both sides
    assert ((figures.loss >= -1) & (figures.loss <= 0)).all()
    assert made.evaluate()["loss"] > 0  # the objective's own figure stays the loss


@pytest.mark.parametrize("blocks", ["none", "layer"])
def test_an_estimate_is_the_slope_of_minus_f1_between_two_points(folder, blocks):
    """At a model that has learned a part: elsewhere few answers change, and most slopes are 0."""
    problem, eps = build(folder, "llama"), 0.1
    made = program(problem, Backprop(batch_size=10))
    advance(made, 12)
    made.layout.bind(problem.module, made.state.x[0].clone())
    oracle = ZerothOrder(minimize="f1", batch_size=10, eps=eps, queries=3, blocks=blocks)
    made = program(problem, oracle, SGD(lr=1e-3))
    layout, row, batch = made.layout, made.state.x[0].clone(), made._batches()[0]
    probes = made.oracle.deferred(made.state.x, batch).grad
    for rank, slopes in enumerate(probes.coefficients * 3):
        for (step, number, tensors), slope in zip(probes.along[rank], slopes, strict=True):
            sums = []
            for scale in (eps, -eps):
                z = (probes.seed, step, number, scale)
                layout.bind(problem.module, perturb_(row.clone(), layout, *z, tensors=tensors))
                sums.append(problem.score(problem.module, batch[rank].inputs)["f1"].item())
            assert slope.item() == pytest.approx((sums[1] - sums[0]) / 10 / (2 * eps))
    assert probes.coefficients.any()
    # Layers are not skipped: an answer takes several forward passes, each on another text.
    assert oracle._beside.prefix is None


def test_a_run_shows_f1_in_summary_report_and_progress(folder, tmp_path, capfd):
    values = {
        "task": {"name": "prompted", **fields(folder, train_examples=20, test_examples=6)},
        "oracle": {"name": "zeroth-order", "minimize": "f1", "batch_size": 2},
        "optimizer": {"name": "sgd", "lr": 1e-4},
        "algorithm": {"name": "all-reduce"},
        "ranks": 2,
        "steps": 2,
    }
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    assert start_run(tmp_path / "run.yaml", [], {}, tmp_path / "run", None) == 0
    (run,) = read_runs([tmp_path / "run"])
    assert 0 <= run.summary["exact_match"] <= run.summary["f1"] <= 1
    assert table_row(run)["f1"] == run.summary["f1"]
    assert {"f1", "rank_f1", "worst_rank_f1"} <= set(run.records[0])
    assert f"f1 {run.summary['f1']:.4g}" in capfd.readouterr().err


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "bert", "kind": "masked-lm"},
            "task.kind: template 'squad' is answered by going on with a text, which a masked",
        ),
        ({"max_new_tokens": 0}, "task.max_new_tokens: must be greater than or equal to 1, got 0"),
        (
            {"max_new_tokens": 40},
            "task.template: 40 tokens for an answer leave none for the text before it; use another "
            "text, or a longer context than 40",
        ),
        (
            {"template": "{title} {label}", "labels": {0: "a", 1: "b"}},
            "task.max_new_tokens: has no effect with template '{title} {label}', whose answer is",
        ),
        ({"as_classification": True}, "task.as_classification: template 'squad' has no candidates"),
        ({"heterogeneity": "sorted"}, "task.heterogeneity: sorted goes by labels, and the answers"),
        ({"labels": {0: "a", 1: "b"}}, "task.labels: have no effect with template 'squad'"),
        ({"version": 1}, "task.version: template 'squad' has no version 1"),
        ({"template": "drop"}, "task.template: '{rows}' has no column 'passage'"),
        (
            {"template": "drop", "columns": {"passage": "context"}},
            "task.label: '{rows}' has no column 'answers_spans'",
        ),
        ({"label": "answer.text"}, "task.label: '{rows}' has no column 'answer'; did you mean"),
        (
            {"label": "answers.texts"},
            "task.label: a row has no answer at 'answers.texts': column 'answers' holds {'text': [",
        ),
        ({"context": 65}, "task.context: '{model}' takes at most 64 tokens, got 65"),
    ],
)
def test_errors_name_field_value_and_fix(folder, changes, message):
    with pytest.raises(ConfigError) as error:
        build(folder, **changes)
    message = message.replace("{rows}", str(folder / "rows.jsonl"))
    assert str(error.value).startswith(message.replace("{model}", str(folder / "gpt2")))


@pytest.mark.parametrize("answers", [[], [""], [None]])
def test_a_row_without_an_answer_is_refused(folder, tmp_path, answers):
    rows = home_rows(60)
    rows[7]["answers"]["text"] = answers
    save_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ConfigError, match=r"^task\.label: a row has no answer at 'answers\.text'"):
        build(folder, dataset=str(tmp_path / "rows.jsonl"), train_examples=40)


def test_a_tokenizer_without_newlines_is_refused(folder, tmp_path):
    save("gpt2", tmp_path / "gpt2", make_tokenizer(WORDS))
    with pytest.raises(ConfigError, match=r"^task\.tokenizer: .* has no token for a newline"):
        build(tmp_path, dataset=str(folder / "rows.jsonl"))
