"""The text task: windows of bytes, the transformer, and the loss per token."""

import gzip
import math

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad, vmap

from gossamer.algorithms.registry import find
from gossamer.algorithms.tasks.text import Text
from gossamer.algorithms.tasks.transformer import Transformer
from gossamer.runtime.component import validate
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.rows import RowLayout


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(bytes(range(200)))
    (tmp_path / "sub" / "a.txt").write_bytes(b"x" * 101)
    (tmp_path / ".hidden").write_bytes(b"no" * 100)
    return tmp_path


def small(path, **fields):
    return Text(path=str(path), context=8, layers=1, width=16, heads=2, **fields)


def test_windows_tile_the_text_and_share_their_boundary(corpus):
    problem = small(corpus / "b.txt", test_fraction=0).build(2, 0)
    (tokens,) = problem.train[torch.tensor([0, 1, 23])]
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [list(range(k, k + 9)) for k in (0, 8, 184)]
    assert len(problem.train) == 24  # of 24.9: the last byte needs one after it
    assert problem.test is None
    assert problem.weigh((tokens,)) == 24
    assert problem.objective == "examples"


def test_held_out_windows_and_shards_do_not_overlap(corpus):
    problem = small(corpus / "b.txt", test_fraction=0.25).build(3, 0)
    train, test = problem.train.places.tolist(), problem.test.places.tolist()
    assert sorted(train + test) == list(range(24))
    assert len(test) == 6
    assert sorted(np.concatenate(problem.shards)) == list(range(18))
    other = small(corpus / "b.txt", test_fraction=0.25).build(3, 1)
    assert other.test.places.tolist() != test


def test_a_folder_a_pattern_and_a_list_name_files(corpus, monkeypatch):
    def text(path):
        return bytes(Text(path=path, context=8).build(1, 0).train.dataset.tokens.tolist())

    whole = bytes(range(200)) + b"x" * 101
    assert text(str(corpus)) == whole
    assert text(f"{corpus}/*.txt") == whole[:200]
    assert text([f"{corpus}/sub/a.txt", f"{corpus}/b.txt"]) == whole[200:] + whole[:200]
    monkeypatch.setenv("GOSSAMER_DATA", str(corpus))
    monkeypatch.chdir(corpus / "sub")
    assert text("sub/a.txt") == whole[200:]
    assert text("s*/a.*") == whole[200:]
    (corpus / "c.gz").write_bytes(gzip.compress(whole))
    assert text(str(corpus / "c.gz")) == whole


def test_sorted_by_file_gives_ranks_files_of_their_own(corpus):
    problem = small(corpus, test_fraction=0, heterogeneity="sorted").build(2, 0)
    (tokens,) = problem.train[torch.from_numpy(problem.shards[1])]
    assert (tokens == ord("x")).float().mean() > 0.6


def test_the_standard_library_is_the_default():
    problem = Text(context=64, layers=1, width=16, heads=2).build(4, 0)
    assert len(problem.train) > 50_000
    (tokens,) = problem.test[torch.arange(200)]
    text = bytes(tokens.flatten().tolist()).decode(errors="replace")
    assert "def " in text
    assert "import" in text


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_model_knows_nothing_and_sees_only_the_past(corpus, tied):
    problem = small(corpus, tied=tied, dtype="float64").build(1, 0)
    inputs = problem.train[torch.arange(20)]
    assert problem.loss(problem.module, inputs).item() == pytest.approx(math.log(256), abs=0.02)
    tokens = inputs[0][:, :-1]
    changed = tokens.clone()
    changed[:, 5] = 255 - changed[:, 5]
    before, after = problem.module(tokens), problem.module(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(dim=-1).all()
    matrices = 256 * 16 * (1 if tied else 2)
    block = 12 * 16 * 16 + 13 * 16
    assert RowLayout(problem.module).size == matrices + 8 * 16 + block + 2 * 16


@pytest.mark.filterwarnings("error:There is a performance drop")
def test_gradients_per_example_can_be_vectorized(corpus):
    problem = small(corpus, dtype="float64").build(1, 0)
    inputs = problem.train[torch.arange(3)]
    parameters = dict(problem.module.named_parameters())

    def loss(given, tokens):
        def module(x):
            return functional_call(problem.module, given, (x,), tie_weights=True)

        return problem.loss(module, (tokens[None],))

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, inputs[0])
    problem.loss(problem.module, inputs).backward()
    for name, p in problem.module.named_parameters():
        torch.testing.assert_close(each[name].mean(dim=0), p.grad)


def test_the_transformer_learns_a_periodic_text(tmp_path):
    (tmp_path / "text").write_bytes(b"gossip " * 400)
    problem = small(tmp_path / "text").build(1, 0)
    optimizer = torch.optim.AdamW(problem.module.parameters(), lr=1e-2)
    inputs = problem.train[torch.arange(32)]
    for _ in range(40):
        optimizer.zero_grad()
        problem.loss(problem.module, inputs).backward()
        optimizer.step()
    # All but the first bytes of a window follow from those before them.
    assert problem.loss(problem.module, problem.test[torch.arange(20)]).item() < 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 3}, "task.heads: must divide width, 128, got 3"),
        ({"path": "missing.txt"}, "task.path: no file or folder 'missing.txt'"),
        ({"path": "*.missing"}, "task.path: '*.missing' names no file"),
        ({"path": "b.txt", "context": 100}, "ranks: 2 ranks for 1 training examples"),
        ({"path": "broken.gz"}, "task.path: broken.gz is truncated or damaged"),
        ({"test_fraction": 1}, "task.test_fraction: must be less than 1"),
    ],
)
def test_errors_name_field_value_and_fix(corpus, monkeypatch, fields, message):
    (corpus / "broken.gz").write_bytes(gzip.compress(bytes(1000))[:-9])
    monkeypatch.chdir(corpus)
    monkeypatch.delenv("GOSSAMER_DATA", raising=False)
    with pytest.raises(ConfigError) as error:
        validate(find("task", "text"), fields, "task").build(2, 0)
    assert str(error.value).startswith(message)


def test_initialisation_leaves_the_global_generator_and_scales_with_depth():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Text(path=__file__).build(2, 0)
    assert torch.equal(torch.get_rng_state(), before)
    deep = Transformer(vocabulary=9, context=4, layers=8, width=64, heads=4, tied=False)
    weight = deep.blocks[0].attention.project.weight
    assert weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)
