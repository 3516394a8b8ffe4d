"""Streams of documents: what a rank reads, in which order, and from the middle on."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.algorithms.problems import DataPlan, Problem
from gossamer.algorithms.sampling import Sampler
from gossamer.algorithms.tasks.corpus import read_rows
from gossamer.algorithms.tasks.document_stream import DocumentStream
from gossamer.algorithms.tasks.language import count_padded_tokens, padded_token_loss
from gossamer.algorithms.tasks.tokenizers import ByteTokenizer

datasets = pytest.importorskip("datasets", reason="needs the extra: gossamer[huggingface]")

DOCUMENTS = 60
CONTEXT = 8
SEED = 5


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Return JSON lines of two files, read as they are asked for; every seventh text is blank."""
    folder = tmp_path_factory.mktemp("texts")
    for file in range(2):
        texts = [f"{file}:{k:02d} " + "abcdefgh"[: k % 9] for k in range(DOCUMENTS // 2)]
        lines = [json.dumps({"text": t if k % 7 else " ", "k": k}) for k, t in enumerate(texts)]
        (folder / f"{file}.jsonl").write_text("\n".join(lines) + "\n")
    files = [str(folder / f"{file}.jsonl") for file in range(2)]
    found = datasets.load_dataset(
        "json", data_files=files, streaming=True, cache_dir=str(folder / "cache")
    )
    assert isinstance(found["train"], datasets.IterableDataset)
    return found["train"]


@pytest.fixture(scope="module")
def memory(rows):
    """Return the epochs as lists: what reads them is tested, and files take their time."""
    return [list(shuffled(rows, epoch)) for epoch in range(6)]


def shuffled(rows, epoch):
    """Return an epoch's rows, of a dataset or a list of epochs."""
    if isinstance(rows, list):
        return rows[epoch]
    return rows.shuffle(seed=3 + epoch, buffer_size=10)


def stream(rows, n=1, packed=False):
    return DocumentStream(
        documents=lambda epoch: read_rows(shuffled(rows, epoch), "text", "texts"),
        tokenizer=ByteTokenizer(),
        context=CONTEXT,
        packed=packed,
        n=n,
        seed=SEED,
    )


def order(rows, epochs=2):
    """Return the texts that are not blank, as the stream has them."""
    found = itertools.chain.from_iterable(shuffled(rows, epoch) for epoch in range(epochs))
    return [row["text"].encode() for row in found if row["text"].strip()]


def texts_of(batch):
    tokens, labels = batch
    return [bytes(row[mask].tolist()) for row, mask in zip(tokens, labels != -100, strict=True)]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_ranks_share_the_shuffled_documents_among_them(rows, n):
    streams = [stream(rows, n) for _ in range(n)]  # one per process
    steps, count = 7, 4
    expected = [text[:CONTEXT] for text in order(rows)]
    found = [
        [
            t
            for step in range(steps)
            for t in texts_of(streams[rank].draw(SEED, rank, step, 0, count))
        ]
        for rank in range(n)
    ]
    for rank in range(n):
        assert found[rank] == expected[rank::n][: steps * count]
    together = stream(rows, n)  # one process that hosts all
    for rank in range(n):
        assert texts_of(together.draw(SEED, rank, 0, 0, count)) == found[rank][:count]


@pytest.mark.parametrize("n", [2, 3])
def test_a_step_of_n_ranks_has_the_documents_of_one_rank_with_n_times_the_batch(memory, n):
    one, many = stream(memory), stream(memory, n)
    for step in range(5):
        whole = texts_of(one.draw(SEED, 0, step, 0, 4 * n))
        for rank in range(n):
            assert texts_of(many.draw(SEED, rank, step, 0, 4)) == whole[rank::n]


def test_no_document_comes_twice_before_all_came_once_and_the_next_epoch_has_another_order(rows):
    whole = order(rows, epochs=1)
    assert len(whole) == len(set(whole)) == DOCUMENTS - 10
    n, epochs = 2, []
    read = stream(rows, n)
    batches = [read.draw(SEED, rank, step, 0, 5) for step in range(10) for rank in range(n)]
    found = [text for batch in batches for text in texts_of(batch)]
    for epoch in range(2):
        epochs.append(found[epoch * len(whole) : (epoch + 1) * len(whole)])
        assert sorted(epochs[epoch]) == sorted(text[:CONTEXT] for text in whole)
    assert epochs[0] != epochs[1]
    assert found[:3] != sorted(found)[:3]  # shuffled at all


@pytest.mark.parametrize("packed", [False, True])
@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6), st.integers(1, 3)), max_size=6))
def test_a_batch_is_a_function_of_its_number_whatever_was_asked_before(memory, packed, calls):
    read = stream(memory, 2, packed)
    for rank, step, count in calls:
        fresh = stream(memory, 2, packed).draw(SEED, rank, step, 0, count)
        for a, b in zip(read.draw(SEED, rank, step, 0, count), fresh, strict=True):
            assert torch.equal(a, b)


def test_consecutive_batches_are_read_on_and_a_batch_asked_again_is_kept(rows):
    began = []

    def epoch_of(epoch):
        began.append(epoch)
        return read_rows(rows, "text", "texts")

    read = stream(rows)
    read.documents = epoch_of
    for step in (0, 0, 1, 2, 2, 3):
        batch = read.draw(SEED, 0, step, 0, 2)
    assert read.draw(SEED, 0, 3, 0, 2) is batch
    assert began.count(0) == 1
    read.draw(SEED, 0, 2, 0, 2)
    assert began.count(0) == 2


@pytest.mark.parametrize("n", [1, 2])
def test_packed_windows_hold_every_token_of_the_ranks_documents_once(rows, n):
    epochs = 4 * n  # more documents than are tokenized together
    for rank in range(n):
        text = b"".join(order(rows, epochs)[rank::n])
        read, count = stream(rows, n, packed=True), (len(text) - 1) // CONTEXT // 3
        windows = torch.cat([read.draw(SEED, rank, step, 0, 3)[0] for step in range(count)])
        assert windows.shape == (3 * count, CONTEXT + 1)
        inputs = bytes(windows[:, :-1].flatten().tolist())
        targets = bytes(windows[:, 1:].flatten().tolist())
        assert inputs == text[: len(inputs)]
        assert targets == text[1 : len(inputs) + 1]


def test_another_seed_asks_for_the_first_documents_and_leaves_the_place_alone(rows):
    read = stream(rows, 2)
    read.draw(SEED, 1, 3, 0, 4)
    first = read.draw(999, 1, 0, 0, 6)
    assert texts_of(first) == [text[:CONTEXT] for text in order(rows)[1::2][:6]]
    expected = stream(rows, 2).draw(SEED, 1, 4, 0, 4)
    assert torch.equal(read.draw(SEED, 1, 4, 0, 4)[0], expected[0])


def test_looking_at_examples_leaves_the_place_alone_whatever_the_runs_seed(rows):
    began = []

    def epoch_of(epoch):
        began.append(epoch)
        return read_rows(rows, "text", "texts")

    read = DocumentStream(epoch_of, ByteTokenizer(), CONTEXT, packed=False, n=1, seed=0)
    problem = Problem(torch.nn.Linear(1, 1), read, (), padded_token_loss, weigh=count_padded_tokens)
    begun = read.draw(0, 0, 0, 0, 4)
    looked_at = texts_of(problem.examples(6))
    assert looked_at[:4] == texts_of(begun)
    read.draw(0, 0, 1, 0, 4)
    assert began.count(0) == 2


@pytest.mark.parametrize("draws", [1, 3])
def test_the_draws_of_a_step_are_read_one_after_another(rows, draws):
    problem = Problem(
        torch.nn.Linear(1, 1), stream(rows), (), padded_token_loss, weigh=count_padded_tokens
    )
    sampler = Sampler(problem, DataPlan(batch_size=2), [0], SEED)
    batches = [batch for step in range(3) for batch in sampler.batches(step, draws)]
    found = [text for (batch,) in batches for text in texts_of(batch.inputs)]
    assert found == [text[:CONTEXT] for text in order(rows)][: 6 * draws]
    resumed = Sampler(problem, DataPlan(batch_size=2), [0], SEED).batches(2, draws)
    assert [b[0].drawn for b in resumed] == [(2, draw) for draw in range(draws)]
    assert texts_of(resumed[0][0].inputs) == found[4 * draws : 4 * draws + 2]
