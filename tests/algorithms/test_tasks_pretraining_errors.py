"""Fields of the pretraining task that are wrong: the message names field, value and fix."""

import json

import pytest
from pretraining_for_tests import STREAM, TEXTS, build, save_lines, stay_here

from gossamer.runtime.errors import ConfigError

datasets = pytest.importorskip("datasets", reason="needs the extra: gossamer[huggingface]")
pytest.importorskip("transformers", reason="needs the extra: gossamer[huggingface]")


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    stay_here(monkeypatch, tmp_path)


@pytest.fixture
def lines(tmp_path):
    return save_lines(tmp_path / "texts.jsonl", TEXTS)


@pytest.mark.parametrize("streaming", [False, True])
def test_c4_by_name_says_what_to_do_where_the_hub_cannot_be_reached(streaming):
    with pytest.raises(ConfigError) as error:
        build(dataset="allenai/c4", subset="en", streaming=streaming)
    message = str(error.value)
    assert message.startswith("task.dataset: cannot load 'allenai/c4' (")
    assert "a local path" in message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "llama-60n"}, "task.model: cannot load 'llama-60n' ("),
        ({"model": {"hidden": 16}}, "task.model.layers: missing"),
        ({"model": 3}, "task.model"),
        ({"vocabulary": 255}, "task.vocabulary: there are 256 bytes, got 255"),
        ({"tokenizer": "none"}, "task.tokenizer: cannot load 'none' ("),
        ({"context": 1}, "task.context: must be greater than or equal to 2, got 1"),
        ({"context": 5000}, "task.context: the text is too short for a sequence of 5000 tokens"),
        ({"data": "missing.txt"}, "task.data: no file or folder 'missing.txt'"),
        ({"data": "*.missing"}, "task.data: '*.missing' names no file"),
        ({"dataset": "texts.jsonl"}, "task.dataset: there is task.data already"),
        ({"streaming": True}, "task.streaming: streams a dataset"),
        ({"subset": "en"}, "task.subset: has no effect without dataset"),
        ({"train_split": "x"}, "task.train_split: has no effect without dataset"),
        ({"shuffle_seed": 42}, "task.shuffle_seed: has no effect without streaming: true"),
        ({"shuffle_buffer": 10}, "task.shuffle_buffer: has no effect without streaming: true"),
        ({"data": (), "column": "x"}, "task.column: has no effect without data or dataset"),
        ({"column": "txet"}, "task.column: texts.jsonl, line 1, has no text 'txet'; did you mean"),
        ({"validation": 1}, "task.validation: would leave nothing to train on"),
        (
            {"validation": 0, "validation_documents": 3},
            "task.validation_documents: has no effect with validation: 0",
        ),
        (
            {"context": 100, "validation_documents": 1},
            "task.validation: leaves no sequence of 100 tokens to validate on",
        ),
        ({"n": 500}, "ranks: 500 ranks for "),
        ({"scheme": "prompt"}, "task.scheme: prompt trains tokens for a model"),
        ({"scheme": "loar"}, "task.scheme.name: unknown scheme 'loar'; did you mean 'lora'"),
        ({"dtype": "float16"}, "task.dtype: must be 'float32', 'bfloat16' or 'float64'"),
        ({"documents": "one"}, "task.documents: must be 'packed' or 'single'"),
    ],
)
def test_errors_name_field_value_and_fix(lines, fields, message):
    with pytest.raises(ConfigError) as error:
        build(**{"data": lines, **fields})
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "no/such-data"}, "task.dataset: cannot load 'no/such-data' ("),
        (
            {"column": "txet"},
            "task.column: 'texts.jsonl', row 1 as read, has no text 'txet'; did you mean 'text'",
        ),
        ({"train_split": "trian"}, "task.train_split: 'texts.jsonl' has no split 'trian'; did you"),
        ({"validation_split": "dev"}, "task.validation_split: 'texts.jsonl' has no split 'dev'"),
        (
            {"validation_documents": None},
            "task.validation_documents: the stream 'texts.jsonl' has no text to train on after its "
            "first 1000;",
        ),
        (
            {"validation": 4, "validation_split": "dev"},
            "task.validation: has no effect with validation_split",
        ),
        (
            {"validation_split": "train"},
            "task.validation_split: 'train' is trained on; use another",
        ),
        ({"validation": 4}, "task.validation: a stream has no end to take 1 / 4 of"),
        ({"heterogeneity": "sorted"}, "task.heterogeneity: has no effect without streaming: false"),
        ({"dataset": "blank.jsonl"}, "task.train_split: 'train' of 'blank.jsonl' has no text;"),
        ({"dataset": "broken.jsonl"}, "task.dataset: cannot load 'broken.jsonl' ("),
        ({"dataset": "saved"}, "task.streaming: 'saved' was written by save_to_disk"),
    ],
)
def test_errors_of_streams_name_field_value_and_fix(lines, tmp_path, fields, message):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    save_lines(tmp_path / "blank.jsonl", ["", " \n"])
    (tmp_path / "broken.jsonl").write_text('{"text": "a"')
    with pytest.raises(ConfigError) as error:
        build(**{"dataset": lines, **STREAM, "validation_documents": 4, **fields})
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_number_for_a_text_is_named_when_it_is_read(tmp_path, streaming):
    rows = [{"text": k} for k in range(12)]
    (tmp_path / "numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        ConfigError, match=r"task\.column: .* row 1 as read, has no text 'text' but"
    ):
        build(dataset="numbers.jsonl", **{**STREAM, "streaming": streaming} if streaming else {})


def test_rows_that_cannot_be_read_are_named_while_a_stream_runs(tmp_path):
    texts = ["w" * 1000] * 12_000  # more than the package reads at a time
    name = save_lines(tmp_path / "late.jsonl", texts)
    with (tmp_path / name).open("a") as file:
        file.write('{"other": 5}\n')
    stream = build(dataset=name, n=1, validation=0, **STREAM).train
    stream.draw(0, 0, 0, 0, 64)
    with pytest.raises(ConfigError) as error:
        stream.draw(0, 0, 200, 0, 64)
    message = str(error.value)
    assert message.startswith("task.dataset: cannot read 'late.jsonl' from row ")
    assert "other" in message
    assert message.endswith("mend the data, all rows of which must have the same columns")


@pytest.mark.parametrize("count", [2, 20])
def test_a_part_to_validate_on_beside_a_split_for_it_is_refused(tmp_path, count):
    (tmp_path / "both").mkdir()
    for split in ("train", "validation"):
        save_lines(tmp_path / "both" / f"{split}.jsonl", TEXTS)
    with pytest.raises(ConfigError) as error:
        build(dataset="both", validation=count)
    message = "task.validation: has no effect, as 'both' has a split 'validation'; leave it out"
    assert str(error.value).startswith(message)


def test_a_name_like_one_of_the_known_models_is_offered():
    with pytest.raises(ConfigError, match=r"did you mean 'llama-60m'"):
        build(model="llama-60n")
