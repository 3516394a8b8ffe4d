"""Public and private examples on several processes: one decision to switch, the same bits."""

import json
import subprocess
import sys

import pytest
import yaml


def summary(path, out, processes):
    command = [sys.executable, "-m", "gossamer", "run", str(path), "--out", str(out)]
    command += ["--processes", str(processes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((out / "summary.json").read_text())


@pytest.mark.parametrize("algorithm", ["all-reduce", "dsgd"])
def test_all_processes_switch_at_one_step_and_agree_to_the_bit(tmp_path, algorithm):
    path = tmp_path / "run.yaml"
    values = {
        "task": {"name": "digits", "model": "mlp", "hidden": [16], "heterogeneity": "sorted"},
        "oracle": [
            {"name": "backprop", "batch_size": 64},
            {"name": "dp", "noise_multiplier": 1.0, "accountant": "rdp", "noise_seed": 3},
            {"name": "public", "fraction": 0.1, "evaluate_every": 2, "patience": 1, "latest": 0.9},
        ],
        "optimizer": {"name": "adamw", "lr": 0.2},
        "algorithm": {"name": algorithm},
        "ranks": 4,
        "steps": 30,
        "timeout_s": 60,
    }
    path.write_text(yaml.safe_dump(values))
    one, two = (summary(path, tmp_path / f"on-{k}", k) for k in (1, 2))
    assert one["public_data"]["switched_at_step"] < 27  # patience ran out, not the time
    assert one["public_data"] == two["public_data"]
    assert one["privacy"] == two["privacy"]
    assert one["parameters_sha256"] == two["parameters_sha256"]
