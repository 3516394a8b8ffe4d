"""Texts as tokens: what is a document, what validates, and how tokens are held."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.algorithms.tasks.corpus import CorpusBuilder, divide, read_documents, read_rows
from gossamer.algorithms.tasks.tokenizers import ByteTokenizer
from gossamer.runtime.errors import ConfigError

TEXTS = ["one text", "two\nlines", "grüße", "  "]

documents_of = st.lists(st.binary(min_size=1, max_size=40), max_size=12)


class Numbers:
    """A tokenizer of so many tokens whose documents are numbers."""

    pad = 0

    def __init__(self, vocabulary):
        self.vocabulary = vocabulary

    def encode(self, documents):
        return [np.array([int(word) for word in d.split()]) for d in documents]

    def encode_alone(self, documents, most):
        return [tokens[:most] for tokens in self.encode(documents)]


@pytest.mark.parametrize("suffix", [".txt", ".py", ".md", ".txt.gz", ""])
def test_a_text_is_one_document(tmp_path, suffix):
    content = "\n".join(TEXTS).encode()
    path = tmp_path / f"text{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    assert read_documents(path, "text", "task.data") == [content]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".json.gz"])
def test_json_lines_have_a_document_each_and_blank_ones_are_left_out(tmp_path, suffix):
    content = "\n".join(json.dumps({"body": text, "k": 1}) for text in TEXTS) + "\n\n"
    path = tmp_path / f"lines{suffix}"
    path.write_bytes(
        gzip.compress(content.encode()) if suffix.endswith(".gz") else content.encode()
    )
    expected = [text.encode() for text in TEXTS[:3]]
    assert read_documents(path, "body", "task.data") == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "task.data: {file}, line 2, is no JSON ("),
        ('{"txet": "a"}', "task.column: {file}, line 2, has no text 'text'; did you mean 'txet'"),
        ('{"text": 3}', "task.column: {file}, line 2, has no text 'text'"),
        ("[1]", "task.column: {file}, line 2, has no text 'text'"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(ConfigError) as error:
        read_documents(path, "text", "task.data")
    assert str(error.value).startswith(message.format(file=path))
    assert "known: " not in str(error.value)


def test_null_texts_are_left_out_of_lines_and_of_rows(tmp_path):
    rows = [{"text": text} for text in (None, "one", None, " ", "two")]
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_documents(path, "text", "task.data") == [b"one", b"two"]
    assert list(read_rows(rows, "text", "rows")) == [b"one", b"two"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": 5}, "has no text 'text' but 5; mend it"),
        ({"k": 5}, "has no text 'text'; mend it"),
        ({"txet": "a"}, "has no text 'text'; did you mean 'txet'"),
    ],
)
def test_a_row_without_a_text_is_named_when_it_is_read(row, message):
    texts = read_rows([{"text": "one"}, {"text": "two"}, row], "text", "rows")
    assert [next(texts), next(texts)] == [b"one", b"two"]
    with pytest.raises(ConfigError) as error:
        next(texts)
    assert str(error.value).startswith(f"task.column: 'rows', row 3 as read, {message}")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.parquet", "a.csv.gz"])
def test_tables_are_no_texts(tmp_path, name):
    (tmp_path / name).write_bytes(b"text\nfirst\n")
    with pytest.raises(ConfigError, match=r"task\.data: .* is a table; name it in task\.dataset"):
        read_documents(tmp_path / name, "text", "task.data")


@pytest.mark.parametrize("name", ["model.safetensors", "a.txt", "b.txt.gz", "c.jsonl"])
def test_a_file_with_zero_bytes_is_no_text(tmp_path, name):
    content = b"some words" * 500 + b"\0" + b"and more"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(ConfigError, match=r"task\.data: .* has zero bytes"):
        read_documents(tmp_path / name, "text", "task.data")


@given(st.lists(documents_of, max_size=25), st.integers(2, 12))
def test_each_document_trains_or_validates_and_order_is_kept(files, every):
    for number, documents in enumerate(files):
        train, held_out = divide(documents, number, len(files), every)
        if len(files) >= every:
            whole = held_out if number % every == every - 1 else train
            assert list(whole) == documents
            assert len(train) + len(held_out) == len(documents)
        elif len(documents) > 1:
            assert [*train, *held_out] == documents
            assert len(held_out) == max(1, len(documents) // every)
        else:
            assert b"".join([*train, *held_out]) == b"".join(documents)
        assert divide(documents, number, len(files), 0) == (documents, ())


@given(st.text(min_size=1, max_size=60), st.integers(2, 12))
def test_a_single_text_is_cut_between_characters_and_its_end_validates(text, every):
    content = text.encode("utf-8", errors="surrogatepass")
    ((begin,), (end,)) = divide([content], 0, 1, every)
    assert begin + end == content
    assert len(end) <= len(content) // every
    assert len(end) > len(content) // every - 4  # a character has 4 bytes at most
    for part in (begin, end):
        part.decode("utf-8", errors="surrogatepass")


@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [(256, torch.uint8), (257, torch.uint16), (65536, torch.uint16), (65537, torch.int32)],
)
def test_tokens_are_held_in_the_smallest_type_that_has_them(vocabulary, dtype):
    last = vocabulary - 1
    builder = CorpusBuilder(Numbers(vocabulary))
    builder.add([f"{last} 0".encode(), b"", b"1 2 3"])
    builder.add([b"7"], file=4)
    corpus = builder.finish()
    assert corpus.tokens.dtype == dtype
    assert corpus.tokens.long().tolist() == [last, 0, 1, 2, 3, 7]
    assert corpus.offsets.tolist() == [0, 2, 2, 5, 6]
    assert corpus.files.tolist() == [0, 0, 0, 4]
    assert corpus.files_at(np.arange(6)).tolist() == [0, 0, 0, 0, 0, 4]
    assert len(corpus) == 4


def test_documents_are_cut_where_they_stand_alone_and_only_so_many_are_taken():
    builder = CorpusBuilder(ByteTokenizer(), alone=3, most=3)
    builder.add([b"abcdef", b"gh"])
    builder.add([b"i", b"jkl"], file=1)
    corpus = builder.finish()
    assert bytes(corpus.tokens.tolist()) == b"abcghi"
    assert corpus.files.tolist() == [0, 0, 1]


def test_nothing_is_a_corpus_too():
    corpus = CorpusBuilder(ByteTokenizer()).finish()
    assert (len(corpus), corpus.tokens.tolist(), corpus.offsets.tolist()) == (0, [], [0])


def test_a_damaged_file_is_named(tmp_path):
    path = Path(tmp_path / "text.txt.gz")
    path.write_bytes(gzip.compress(bytes(1000))[:-9])
    with pytest.raises(ConfigError, match=r"task\.data: .* is truncated or damaged"):
        read_documents(path, "text", "task.data")
