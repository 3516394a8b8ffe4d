"""The protocol between processes over device memory, on a device made of threads."""

import os
from pathlib import Path

import pytest

from gossamer.launch.processes import run_processes


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Let the new processes import the worker."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def run(processes, name, *arguments):
    import device_worker

    assert run_processes(processes, getattr(device_worker, name), *arguments) == 0


OPERATIONS = int(os.environ.get("GOSSAMER_TEST_OPERATIONS", "60"))


@pytest.mark.parametrize(("processes", "n", "seed"), [(2, 2, 0), (3, 5, 1), (4, 4, 2)])
def test_operations_queued_ahead_of_the_device_give_the_stacked_bits(processes, n, seed):
    run(processes, "pipeline", n, seed, OPERATIONS)


def test_a_peer_that_is_gone_is_named():
    run(2, "peer_is_gone")


def test_a_peer_that_does_not_come_is_named():
    run(2, "peer_is_late")


def test_rows_of_different_lengths_are_noticed():
    run(2, "other_size")


@pytest.mark.parametrize("failing", ["nothing", "open", "read"])
def test_all_processes_agree_on_device_memory(failing):
    run(3, "fallback", failing)


@pytest.mark.parametrize("device", ["works", "fails"])
def test_auto_puts_rows_on_gpus_where_that_works(device):
    run(2, "selected", device)


def test_the_benchmark_checks_and_times_the_processes():
    run(3, "benchmark", "ring")


def test_rows_are_gathered_and_broadcast():
    run(3, "gathers")
