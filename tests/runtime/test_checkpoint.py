"""Checkpoints are complete or absent, whatever happens between two file operations."""

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from gossamer.runtime import StackedTransport
from gossamer.runtime.checkpoint import Checkpoint, CheckpointError, discard_after, latest, save
from gossamer.runtime.collectives import RankGroup
from gossamer.runtime.errors import ConfigError

OPERATIONS = [(os, "fsync"), (os, "rename"), (os, "unlink"), (os, "rmdir"), (os, "mkdir")]
"""Whatever changes the folder and can be counted; Path's methods end in these."""


def group(n=4, step=0):
    ranks = RankGroup(n, StackedTransport())
    ranks.step = step
    return ranks


def write(folder, step, *, keep=2, n=4):
    """Write a checkpoint whose every number is its step."""
    rows = {"state/x": torch.full((n, 6), float(step)), "state/k": torch.full((n,), step)}
    mean = {"weight": torch.full((2, 3), float(step))}
    return save(folder, group(n, step), rows, {"count": step}, mean, {"round": step}, keep=keep)


def check(checkpoint):
    """Check that a checkpoint is whole and of one step."""
    step = checkpoint.meta["step"]
    rows = checkpoint.rows(range(checkpoint.meta["n"]))
    assert checkpoint.folder.name == f"step-{step:09d}"
    assert rows["state/x"].tolist() == [[float(step)] * 6] * 4
    assert checkpoint.mean()["weight"].tolist() == [[float(step)] * 3] * 2
    assert checkpoint.meta["scalars"] == {"count": step}
    return step


def test_what_was_saved_is_read_back_for_any_ranks(tmp_path):
    x = torch.arange(24.0).reshape(4, 6)
    scalars = {"a": 1, "b": 0.5, "c": None, "d": True, "e": "text"}
    save(tmp_path, group(4, 7), {"x": x}, scalars, {"w": x[0]}, {"round": 9}, keep=1)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.meta["step"] == 7
    assert checkpoint.meta["round"] == 9
    assert checkpoint.meta["scalars"] == scalars
    for first, last in itertools.combinations(range(5), 2):
        rows = checkpoint.rows(range(first, last))
        assert torch.equal(rows["x"], x[first:last])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.uint8])
def test_every_dtype_keeps_its_bits(tmp_path, dtype):
    x = (torch.arange(40).reshape(4, 10) * 7 % 13).to(dtype)
    save(tmp_path, group(), {"x": x[:, ::2]}, {}, {"w": x[0]}, {}, keep=1)
    found = Checkpoint.open(tmp_path).rows(range(4))["x"]
    assert found.dtype == dtype
    assert torch.equal(found, x[:, ::2])


def test_as_many_checkpoints_stay_as_asked(tmp_path):
    for step in (1, 2, 10, 20):
        write(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000010", "step-000000020"]


def test_the_newest_is_the_one_with_the_highest_step(tmp_path):
    write(tmp_path, 999_999_999)
    write(tmp_path, 1_000_000_000)
    assert Checkpoint.open(tmp_path).meta["step"] == 1_000_000_000


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    write(tmp_path, 3)
    write(tmp_path, 3)
    assert check(Checkpoint.open(tmp_path)) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000003"]


def test_going_on_from_a_step_discards_what_came_after(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step, keep=5)
    (tmp_path / ".step-000000001.partial").mkdir()  # a kill while the last one was removed
    discard_after(tmp_path, 1)
    assert not list(tmp_path.glob("*.partial"))
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]


# --- a kill between any two file operations ----------------------------------------------------


def killed_after(count, action):
    """Run ``action`` in a forked child that dies before its ``count``-th file operation.

    Returns:
        Whether it was killed, not done.
    """
    pid = os.fork()
    if pid == 0:
        left = itertools.count(count, -1)

        def counted(function):
            def call(*args, **kwargs):
                if next(left) <= 0:
                    os.kill(os.getpid(), 9)
                return function(*args, **kwargs)

            return call

        try:
            for module, name in OPERATIONS:
                setattr(module, name, counted(getattr(module, name)))
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0


def every_kill(prepare, action):
    """Yield after each instant at which ``action`` can be killed, and once after it is done."""
    for count in itertools.count():
        assert count < 200
        prepare()
        killed = killed_after(count, action)
        yield count, killed
        if not killed:
            assert count > 3, "nothing was counted"
            return


def test_a_kill_while_saving_leaves_the_checkpoint_before_or_the_new_one(tmp_path):
    folder = tmp_path / "checkpoints"
    seen = set()

    def prepare():
        shutil.rmtree(folder, ignore_errors=True)
        for step in (2, 4):
            write(folder, step)

    for _, killed in every_kill(prepare, lambda: write(folder, 6)):
        step = check(Checkpoint.open(folder))
        seen.add(step)
        for path in folder.glob("step-*"):  # not the latest only
            check(Checkpoint.open(path))
        write(folder, 8)  # the next process cleans up
        assert sorted(p.name for p in folder.iterdir()) == [f"step-{s:09d}" for s in (step, 8)]
        assert killed or step == 6
    assert seen == {4, 6}


def test_a_kill_while_saving_the_first_leaves_none_or_a_whole_one(tmp_path):
    folder = tmp_path / "checkpoints"
    for _, killed in every_kill(
        lambda: shutil.rmtree(folder, ignore_errors=True), lambda: write(folder, 6)
    ):
        found = latest(folder)
        assert found is None or check(Checkpoint.open(found)) == 6
        assert killed or found is not None


def test_a_kill_while_discarding_leaves_whole_ones_only(tmp_path):
    def prepare():
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        for step in (1, 2, 3):
            write(tmp_path / "c", step, keep=5)

    for _, killed in every_kill(prepare, lambda: discard_after(tmp_path / "c", 1)):
        steps = [check(Checkpoint.open(p)) for p in sorted((tmp_path / "c").glob("step-*"))]
        assert steps == list(range(1, len(steps) + 1)), "newest first, without a gap"
        assert killed or steps == [1]


# --- broken ones ------------------------------------------------------------------------------


def spoil(folder, name, how):
    path = folder / name
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    else:
        path.write_bytes(b"\xff" * path.stat().st_size)


@pytest.mark.parametrize("name", ["rows-00000.safetensors", "mean.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("how", ["missing", "empty", "cut", "garbled"])
def test_a_broken_file_is_named_with_the_way_out(tmp_path, name, how):
    write(tmp_path, 2)
    newest = write(tmp_path, 4)
    spoil(newest, name, how)
    if name == "checkpoint.json" and how == "missing":
        assert check(Checkpoint.open(tmp_path)) == 2, "it is no checkpoint any more"
        return
    with pytest.raises(ConfigError) as refused:
        check(Checkpoint.open(tmp_path))
    message = str(refused.value)
    assert str(newest / name) in message
    assert {"missing": "missing", "empty": "", "cut": "", "garbled": "broken"}[how] in message
    assert f"--resume {tmp_path / 'step-000000002'}" in message
    assert "\n" not in message


@pytest.mark.parametrize("key", ["step", "n", "scalars", "files", "mean"])
def test_a_description_that_lacks_a_field_is_broken(tmp_path, key):
    path = write(tmp_path, 2) / "checkpoint.json"
    content = json.loads(path.read_text())
    del content[key]
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=f"checkpoint.json is broken .lacks '{key}'"):
        Checkpoint.open(tmp_path)


def test_a_folder_without_checkpoints_says_what_to_name(tmp_path):
    with pytest.raises(ConfigError, match=r"no complete checkpoint in .*--resume"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("at", range(1, 6))
def test_a_write_that_fails_raises_and_leaves_the_checkpoint_before(tmp_path, monkeypatch, at):
    folder = tmp_path / "checkpoints"
    write(folder, 2)
    calls = itertools.count(1)
    real = os.fsync

    def fails(descriptor):
        if next(calls) == at:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(CheckpointError, match=r"checkpoint of step 4: .*No space left") as failed:
        write(folder, 4)
    assert str(folder) in str(failed.value)
    monkeypatch.undo()
    assert check(Checkpoint.open(folder)) in (2, 4)
    assert not list(Path(folder).glob(".*"))


@pytest.mark.parametrize(("name", "read"), [("rows-00000", "rows"), ("mean", "mean")])
def test_a_changed_bit_is_found(tmp_path, name, read):
    path = write(tmp_path, 2) / f"{name}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(ConfigError, match=rf"{name}.safetensors is broken .*SHA-256"):
        checkpoint.rows(range(4)) if read == "rows" else checkpoint.mean()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("format", 1, "format 1, this version reads"),
        ("format", None, "format None"),
        ("step", "2", "step is '2'"),
        ("step", -1, "step is -1"),
        ("n", 0, "n is 0"),
        ("n", 5, "4 of 5 rows"),
        ("n", True, "n is True"),
        ("round", "x", "round is 'x'"),
        ("scalars", [], r"scalars is \[\]"),
        ("scalars", {"a": [1]}, r"scalars.a is \[1\]"),
        ("files", [], r"files is \[\]"),
        ("files", [3], "entry is 3"),
        ("files", {"first": 0}, "files is"),
        ("mean", None, "entry is None"),
        ("signature", "w", "signature"),
        ("traffic", {"bytes_sent": "9"}, "bytes_sent is '9'"),
    ],
)
def test_a_description_of_wrong_types_is_broken(tmp_path, field, value, words):
    path = write(tmp_path, 2) / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ConfigError, match=rf"checkpoint.json is broken .*{words}"):
        Checkpoint.open(tmp_path)


def test_a_description_that_is_a_list_is_broken(tmp_path):
    (write(tmp_path, 2) / "checkpoint.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"is broken .*list"):
        Checkpoint.open(tmp_path)
