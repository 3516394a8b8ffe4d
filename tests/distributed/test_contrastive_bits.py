"""Embeddings, held states and their gradients over real processes: the bits of one process."""

import json
import os

import pytest
import yaml
from test_same_bits import gossamer, mpirun, run, torchrun

# So sharp that states are held from visit to visit.
STALE = {"name": "emc2", "beta": 2000, "burn_in": 0.0}
FRESH = {**STALE, "score": "fresh"}
LOSSES = {
    "emc2-fresh": FRESH,
    "emc2-stale": STALE,
    "emc2-drop": {**FRESH, "held": "drop"},
    "simclr": "simclr",
    "sogclr": "sogclr",
    "isogclr": "isogclr",
    "moco": {"name": "moco", "queue": 40},
    "negcache": {"name": "negcache", "refresh": 0.1},
    "full": "full",
}
ALL_REDUCE = {"name": "all-reduce"}
NEAR = {"negatives": "neighbors"}


def runs():
    found = {
        name: {"oracle": {"loss": loss}, "algorithm": ALL_REDUCE} for name, loss in LOSSES.items()
    }
    fixed = {"task": {"views": {"mode": "finite"}}, "algorithm": ALL_REDUCE}
    found["emc2-finite"] = {**fixed, "oracle": {"loss": FRESH, "micro_batch_size": 3}}
    found["emc2-shards"] = {**fixed, "oracle": {"loss": FRESH, "shards": 8}}
    for graph in ("ring", "one_peer_exponential"):
        found[f"emc2-{graph}"] = {
            "oracle": {"loss": FRESH, **NEAR},
            "algorithm": {"name": "dsgd"},
            "topology": {"name": graph},
        }
    found["sogclr-star"] = {  # ranks that hear one other, and one that hears all
        "oracle": {"loss": "sogclr", **NEAR},
        "algorithm": {"name": "dsgd"},
        "topology": {"name": "star"},
    }
    # Two points of one batch, several gradients a step, an exchange under way meanwhile.
    for name in ("dsgd", "gt-hsgd", "local-sgd", "ad-psgd"):
        found[name] = {"oracle": {"loss": FRESH}, "algorithm": {"name": name}}
    found["local-sgd"]["algorithm"]["local_steps"] = 2
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    values = {
        "task": {
            "name": "contrastive",
            "examples": 21,  # unequal shards, and every example comes again
            "encoder": {"name": "mlp", "hidden": [16], "dim": 8},
            "probe_examples": 16,
            "probes": [],
        },
        "oracle": {"name": "contrastive", "batch_size": 4},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "ranks": 4,
        "steps": 5,
        "timeout_s": 60,
        "compare": runs(),
    }
    file = tmp_path_factory.mktemp("contrastive") / "runs.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def outcome(command, path, out, environment):
    run([*command, str(path), "--out", str(out)], environment)
    found = {p.parent.name: json.loads(p.read_text()) for p in out.glob("*/summary.json")}
    assert set(found) == set(runs())
    figures = ("parameters_sha256", "bytes_sent", "loss", "grad_norm", "pairwise_cosine")
    return {name: [s[f] for f in figures] for name, s in found.items()}, found


@pytest.fixture(scope="module")
def alone(path, tmp_path_factory):
    return outcome(gossamer(1), path, tmp_path_factory.mktemp("alone") / "out", dict(os.environ))[0]


def test_every_run_is_another_one(alone):
    digests = [figures[0] for figures in alone.values()]
    assert len(set(digests)) == len(digests)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "processes", "transport"),
    [(torchrun, 4, "native"), (gossamer, 3, "gloo"), (mpirun, 4, "mpi")],
)
def test_every_transport_gives_the_bits_of_one_process(
    launcher, processes, transport, path, alone, launch_environment, tmp_path
):
    command = [*launcher(processes), "--transport", transport]
    found, summaries = outcome(command, path, tmp_path / "out", launch_environment)
    assert found == alone
    assert all(s["processes"] == processes for s in summaries.values())
