"""Separate hosts: network namespaces, a limited link between them, several processes on each."""

import contextlib
import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import namespaces
import pytest
import yaml
from namespaces import Hosts, why_not

WORKER = str(Path(__file__).with_name("hosts_worker.py"))
TIMEOUT_S = 5  # of the runs that fail: see hosts_worker.py

ALGORITHMS = {
    "d-nasa": {"algorithm": {"name": "d-nasa"}},
    "dsgd": {"algorithm": {"name": "dsgd"}, "optimizer": {"name": "sgd", "lr": 0.1}},
    "tracking": {
        "algorithm": {"name": "gradient-tracking"},
        "optimizer": {"name": "sgd", "lr": 0.1},
    },
    "choco": {"algorithm": {"name": "choco"}, "optimizer": {"name": "sgd", "lr": 0.1}},
    "sgp": {
        "algorithm": {"name": "sgp"},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "topology": {"name": "directed_ring"},
    },
    "all-reduce": {"algorithm": {"name": "all-reduce"}, "optimizer": {"name": "sgd", "lr": 0.1}},
    "hierarchical": {
        "algorithm": {"name": "d-nasa"},
        "topology": {"name": "ring", "hierarchical": {"local": 4}},
    },
}
"""The last one is averaged in shards: equal to rounding. All others: to the bit."""

reason = functools.cache(why_not)


@pytest.fixture
def hosts():
    """Makes hosts; they are gone after the test, whatever happened."""
    if reason():
        pytest.skip(reason())
    with contextlib.ExitStack() as stack:
        yield lambda count, rate="200mbit": stack.enter_context(Hosts(count, rate))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "n"), [([2, 2], 8), ([2, 2, 1], 7)], ids=["two hosts", "three hosts"]
)
def test_every_operation_has_the_stacked_bits(processes, n, hosts, launch_environment):
    hosts(len(processes)).run(processes, [WORKER, "battery", str(n)], launch_environment)


@pytest.mark.slow
def test_every_operation_has_the_stacked_bits_over_mpi(hosts, launch_environment, tmp_path):
    unshare = ["unshare", "--uts", "--mount", "true"]  # to give the hosts names
    if shutil.which("unshare") is None or subprocess.run(unshare, capture_output=True).returncode:
        pytest.skip("mpirun needs a name per host: unshare --uts --mount is not permitted here")
    hosts(2).mpirun(2, [WORKER, "battery", "8"], launch_environment, tmp_path)


@pytest.mark.slow
def test_runs_have_the_stacked_bits(hosts, launch_environment, tmp_path):
    file = tmp_path / "all.yaml"
    values = {
        "task": {"name": "digits", "model": "mlp", "hidden": [7], "heterogeneity": "sorted"},
        "oracle": {"name": "backprop", "batch_size": 5},
        "ranks": 8,
        "steps": 4,
        "timeout_s": 60,
        "evaluate_examples": 20,
        "compare": ALGORITHMS,
    }
    file.write_text(yaml.safe_dump(values))
    command = ["-m", "gossamer", "run", str(file), "--out"]
    stacked = [sys.executable, *command, str(tmp_path / "stacked")]
    subprocess.run(stacked, env=launch_environment, check=True, capture_output=True, timeout=200)
    hosts(2).run([2, 2], [*command, str(tmp_path / "hybrid")], launch_environment)
    for name in ALGORITHMS:
        found, expected = (
            json.loads((tmp_path / transport / name / "summary.json").read_text())
            for transport in ("hybrid", "stacked")
        )
        assert found["transport"] == "hybrid"
        assert found["bytes_sent"] == expected["bytes_sent"], name
        if name == "hierarchical":
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        else:
            assert found["parameters_sha256"] == expected["parameters_sha256"], name


@pytest.mark.slow
def test_on_a_slow_link_sharded_averages_send_a_quarter(hosts, launch_environment):
    d = 100_000
    outputs = hosts(2, "20mbit").run([2, 2], [WORKER, "link", str(d)], launch_environment)
    found = json.loads(outputs[0].splitlines()[-1])
    # Flat: each of 2 processes sends its row to both of the other host. Sharded: half a row to one.
    # Headers, acknowledgements and the barrier add less than a tenth.
    for name, rows in (("flat", 4), ("sharded", 1)):
        assert rows * 4 * d <= found[name]["bytes"] <= 1.1 * rows * 4 * d, found


@pytest.mark.slow
def test_on_a_slow_link_zeroth_order_steps_send_eight_bytes(hosts, launch_environment):
    flags = ["--parameters=100K", "--vocabulary=64", "--context=8", "--iters=4", "--json"]
    command = ["-m", "gossamer", "bench", "zo", *flags]
    outputs = hosts(2, "20mbit").run([1, 1], command, launch_environment)
    numbers, gradients = json.loads(outputs[0][outputs[0].index("{\n") :])["rows"]
    assert (numbers["exchanged"], gradients["exchanged"]) == ("numbers", "gradients")
    assert numbers["transport"] == gradients["transport"] == "gloo"
    assert numbers["bytes_per_step"] == 8
    assert gradients["bytes_per_step"] == 4 * gradients["parameters"]  # 2 (n - 1) / n rows, n = 2


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "unplug"])
def test_a_lost_process_or_host_is_named_within_the_timeout(how, hosts, launch_environment):
    world = hosts(2)
    started = world.start([2, 2], [WORKER, "fails", how], launch_environment)
    outputs = [process.communicate(timeout=100)[0] for process in started]
    assert started[3].returncode == (-9 if how == "kill" else 0)
    survivors = outputs[:3] if how == "kill" else outputs
    for output in survivors:
        error = json.loads(output.splitlines()[-1])
        assert error["type"] in ("PeerLost", "CommTimeout"), output
        # Who did not need the lost one's row gets a step or two further.
        assert re.match(r"step [345]: neighbor_average \(round 0\): .*process", error["text"]), (
            output
        )
        # A wait is bounded by the timeout; a busy machine may be late to notice.
        assert error["seconds"] < 4 * TIMEOUT_S, output


@pytest.mark.slow
def test_native_is_refused_on_two_hosts_and_hybrid_on_hosts_of_one(hosts, launch_environment):
    world = hosts(2)
    expected = "the 3 processes are on 2 hosts; use transport: hybrid, or auto"
    world.run([2, 1], [WORKER, "refused", "native", expected], launch_environment)
    expected = "the 2 processes are on 2 hosts; use transport: gloo, or auto"
    world.run([1, 1], [WORKER, "refused", "hybrid", expected], launch_environment)


def test_namespaces_do_not_outlive_a_failure(hosts):
    assert set(hosts(2).names) < set(namespaces.names())
    with pytest.raises(KeyError), Hosts(2, "1mbit") as failing:
        raise KeyError
    assert not {*failing.names, failing.switch} & set(namespaces.names())
