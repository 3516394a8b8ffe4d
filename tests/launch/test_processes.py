"""Local processes: their statuses, their signals, their end."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from gossamer.launch import processes
from gossamer.launch.processes import run_processes


def statuses(folder, wanted):
    """End with the status of this process."""
    process = int(os.environ["RANK"])
    Path(folder, f"{process}").write_text(os.environ["GOSSAMER_RENDEZVOUS"])
    return wanted[process]


def fail_or_wait(folder, failing):
    """Fail in one process, wait for ever in the others."""
    Path(folder, f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    if int(os.environ["RANK"]) == failing:
        return 1
    while True:
        time.sleep(3600)


def die(number):
    """Let process 1 be killed by a signal."""
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), number)
    return 0


def until_told(folder, handled):
    """Wait for SIGTERM, and end with 143 where it is handled."""
    told = threading.Event()
    if handled:
        signal.signal(signal.SIGTERM, lambda *_: told.set())
    Path(folder, f"ready-{os.environ['RANK']}").touch()
    while not told.wait(0.01):
        pass
    return 143


def variables(folder):
    """Write what a launcher sets."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    Path(folder, os.environ["RANK"]).write_text(" ".join(os.environ[n] for n in names))
    return 0


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Let the new processes import this file."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.mark.parametrize(
    ("wanted", "status"),
    [([0, 0], 0), ([0, 1], 1), ([2, 2], 2), ([143, 143], 143), ([7, 0], 7)],
)
def test_the_first_status_that_is_not_zero_is_returned(tmp_path, wanted, status):
    assert run_processes(2, statuses, str(tmp_path), wanted) == status
    meeting_places = {(tmp_path / str(p)).read_text() for p in range(2)}
    assert len(meeting_places) == 1
    store = Path(meeting_places.pop().removeprefix("file://"))
    assert not store.parent.exists(), "the meeting place is gone"


def test_each_process_knows_its_place(tmp_path):
    assert run_processes(3, variables, str(tmp_path)) == 0
    assert [(tmp_path / str(p)).read_text() for p in range(3)] == ["0 0 3 3", "1 1 3 3", "2 2 3 3"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_process_killed_by_a_signal_is_named_and_the_status_is_one(number, capfd):
    assert run_processes(2, die, number) == 1
    assert f"process 1 was killed by {number.name}" in capfd.readouterr().err


def test_what_hangs_after_a_failure_is_killed_and_named(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(processes, "_GRACE_S", 0.5)
    others = set(multiprocessing.active_children())  # of tests before this one
    assert run_processes(2, fail_or_wait, str(tmp_path), 0) == 1
    assert "process 1 did not end within 0.5 s" in capfd.readouterr().err
    pid = int((tmp_path / "1.pid").read_text())
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text()
    assert set(multiprocessing.active_children()) <= others


@pytest.mark.parametrize("handled", [True, False])
def test_sigterm_reaches_every_process_and_the_status_is_143(tmp_path, handled):
    def tell():
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("ready-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=tell)
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    assert run_processes(2, until_told, str(tmp_path), handled) == 143
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before, "the handler is put back"
