"""Files, options and processes that do not fit: status 2 and one message that says what to do."""

import json
import subprocess
import sys

import numpy as np
import pytest
from refusals import BASE, assert_one_message, changed

# --- the file and the command line ------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("task: {name: [", ["not YAML", "line"]),
        ("a: b: c", ["not YAML", "line 1"]),
        ("\tsteps: 3", ["not YAML", "line 1"]),
        ("- a\n- b", ["list", "key: value"]),
        ("just text", ["str", "key: value"]),
        ("", ["empty"]),
        ("# nothing\n", ["empty"]),
        ("a: 1\n---\nb: 2", ["not YAML", "document"]),
        ("steps: 3\nsteps: 4", ["steps", "twice", "line 2"]),
        ("task: !!python/object/apply:os.system ['true']", ["not YAML", "line 1"]),
        ("1: 2", ["1", "name must be text"]),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(refused, text, words):
    refused(text, ["run.yaml", *words] if text != "1: 2" else words)


def test_a_file_that_is_no_text_is_refused(invoke, tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00\x81")
    assert_one_message(*invoke("run", "run.yaml"), ["run.yaml", "text"])


@pytest.mark.parametrize("name", ["nothing.yaml", "."])
def test_a_file_that_cannot_be_read_is_named(invoke, name):
    assert_one_message(*invoke("run", name), ["file", name, "YAML"])


def test_no_file_at_all_says_how_to_name_one(invoke):
    assert_one_message(*invoke("run"), ["file", "gossamer run FILE"])


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("steps", ["-s steps", "KEY=VALUE"]),
        ("=3", ["-s =3", "KEY=VALUE"]),
        ("task..model=mlp", ["-s task..model=mlp", "KEY=VALUE"]),
        ("steps.more=3", ["-s steps.more", "'steps' is 4", "not a section"]),
        ("task.model.depth=3", ["task.model.depth", "'linear'", "not a section"]),
        ("steps={", ["-s steps={", "not YAML"]),
        ("stpes=3", ["stpes", "unknown", "'steps'"]),
    ],
)
def test_a_malformed_override_is_refused(refused, setting, words):
    refused(BASE, words, "-s", setting)


def test_an_output_folder_in_use_is_refused_and_left_alone(refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    refused(BASE, ["--out", "out", "in use", "--resume out"])
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_an_output_folder_that_is_a_file_is_refused(invoke, tmp_path):
    (tmp_path / "run.yaml").write_text(json.dumps(BASE))
    (tmp_path / "out").write_text("x")
    assert_one_message(*invoke("run", "run.yaml", "--out", "out"), ["--out", "in use"])
    assert_one_message(*invoke("run", "run.yaml", "--out", "out/a"), ["--out", "out/a", "folder"])


# --- graphs -----------------------------------------------------------------------------------


def test_a_hypercube_of_six_ranks_is_refused(refused):
    refused(changed(topology={"name": "hypercube"}, ranks=6), ["topology", "hypercube", "6", "8"])


def test_a_disconnected_graph_file_is_refused(refused, tmp_path):
    (tmp_path / "graph.edgelist").write_text("0 1\n2 3\n")
    topology = {"name": "custom", "edges": "graph.edgelist"}
    refused(changed(topology=topology), ["topology", "connected"])


def test_rows_that_do_not_sum_to_one_are_refused(refused, tmp_path):
    w = np.full((4, 4), 0.25)
    w[3, 0] = 0.22
    np.save(tmp_path / "w.npy", w)
    topology = {"name": "custom", "edges": "w.npy"}
    refused(changed(topology=topology), ["topology.weights", "row 3", "0.97", "metropolis"])


def test_a_graph_of_another_size_is_refused(refused, tmp_path):
    np.save(tmp_path / "w.npy", np.full((4, 4), 0.25))
    topology = {"name": "custom", "edges": "w.npy"}
    refused(changed(topology=topology, ranks=5), ["topology", "4", "5", "ranks"])


@pytest.mark.parametrize("edges", ["nothing.npy", "nothing.edgelist", "nowhere:f", "plain"])
def test_a_graph_that_is_not_there_is_refused(refused, edges):
    topology = {"name": "custom", "edges": edges}
    refused(changed(topology=topology), ["topology.edges", edges])


def test_a_truncated_matrix_is_refused(refused, tmp_path):
    np.save(tmp_path / "w.npy", np.full((4, 4), 0.25))
    whole = (tmp_path / "w.npy").read_bytes()
    (tmp_path / "w.npy").write_bytes(whole[:-9])
    topology = {"name": "custom", "edges": "w.npy"}
    refused(changed(topology=topology), ["topology.edges", "w.npy", "cut short"])


def test_more_ranks_than_examples_are_refused(refused):
    refused(changed(ranks=500), ["task", "500"])


# --- processes --------------------------------------------------------------------------------


def test_more_processes_than_ranks_are_refused(refused):
    refused(BASE, ["processes", "9", "4 ranks"], "--processes", "9", "--transport", "gloo")


def test_stacked_in_two_processes_is_refused(refused):
    refused(
        BASE, ["processes", "stacked", "2", "gloo"], "--processes", "2", "-s", "transport=stacked"
    )


def test_gloo_in_one_process_is_refused(refused):
    refused(BASE, ["transport", "gloo", "--processes"], "--processes", "1", "--transport", "gloo")


def test_nccl_without_a_gpu_is_refused(refused):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    refused(BASE, ["transport", "nccl", "GPU"], "--transport", "nccl", "--processes", "1")


def test_more_launched_processes_than_ranks_are_refused_by_the_first_only(
    refused, invoke, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    refused(BASE, ["ranks", "4", "8"])
    monkeypatch.setenv("RANK", "3")
    assert invoke("run", "run.yaml") == (2, "")


@pytest.mark.parametrize("transport", ["stacked", "mpi"])
def test_a_transport_unlike_the_launcher_is_refused_by_the_first_only(
    refused, invoke, monkeypatch, transport
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    refused(BASE, ["transport", transport, "torchrun", "auto"], "--transport", transport)
    monkeypatch.setenv("RANK", "1")
    assert invoke("run", "run.yaml", "--transport", transport) == (2, "")


def test_gloo_under_mpirun_without_a_meeting_place_is_refused(refused, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    refused(BASE, ["transport", "gloo", "MASTER_ADDR"], "--transport", "gloo")


# --- a user's own files -----------------------------------------------------------------------

NOT_AN_ALGORITHM = "class Mine:\n    pass\n"
NO_STEP = """
from gossamer.algorithms.protocols import Algorithm


class Mine(Algorithm):
    def init(self, comm, oracle, x, batches):
        return None
"""


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("nowhere:Mine", "", ["nowhere", "no module", "install"]),
        ("mine_a:Yours", "class Mine: pass", ["mine_a", "'Yours'", "Mine"]),
        ("mine_b:Mine", NOT_AN_ALGORITHM, ["mine_b:Mine", "Algorithm"]),
        ("mine_c:Mine", "def Mine(:\n", ["mine_c", "SyntaxError", "line 1"]),
        ("mine_d:Mine", "import notthere_\n", ["mine_d", "notthere_", "install"]),
        ("mine_e:Mine", "x = 1\nx.missing\n", ["mine_e", "AttributeError", "line 2"]),
        ("mine_f:Mine", "1 / 0\n", ["mine_f", "ZeroDivisionError", "line 1"]),
        ("mine_g:Mine", NO_STEP, ["mine_g:Mine", "lacks methods: step"]),
        ("mine_h:", "", ["mine_h:", "package.module:Class"]),
        (":Mine", "", [":Mine", "package.module:Class"]),
        ("a/b.py:Mine", "", ["a/b.py:Mine", "package.module:Class"]),
        ("gossamer.algorithms.optimizers.sgd:SGD", "", ["SGD", "Algorithm"]),
    ],
)
def test_an_algorithm_of_ones_own_that_fails_to_import_is_explained(
    refused, tmp_path, name, text, words
):
    module = name.split(":")[0]
    if text:
        (tmp_path / f"{module}.py").write_text(text)
    refused(changed(algorithm={"name": name}, optimizer=None), ["algorithm.name", *words])


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"name": "custom"}, ["task.build", "missing"]),
        ({"name": "custom", "build": "nowhere:f"}, ["task.build", "nowhere"]),
        ({"name": "custom", "build": "nocolon"}, ["task.build", "nocolon"]),
        ({"name": "custom", "build": "maker:nothing"}, ["task.build", "maker", "'nothing'"]),
        ({"name": "custom", "build": "maker:text"}, ["task.build", "maker:text", "Problem", "str"]),
    ],
)
def test_a_task_of_ones_own_that_cannot_be_built_is_explained(refused, tmp_path, task, words):
    (tmp_path / "maker.py").write_text("def text(n, seed):\n    return 'no problem'\n")
    refused(changed(task=task), words)


def test_an_optimizer_without_effect_is_refused(refused, tmp_path):
    own_rule = NO_STEP + "\n    def step(self, comm, oracle, state, batches):\n        return {}\n"
    (tmp_path / "own_rule.py").write_text(own_rule)
    values = changed(algorithm={"name": "own_rule:Mine"})
    refused(values, ["optimizer", "own_rule:Mine", "remove it"])


# --- data -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"name": "mnist"}, ["task.path", "mnist10k", "GOSSAMER_DATA"]),
        ({"name": "mnist", "path": "/nowhere/at/all"}, ["task.path", "/nowhere/at/all"]),
        ({"name": "svmlight"}, ["task.path", "missing"]),
        ({"name": "svmlight", "path": "none.svm"}, ["task.path", "none.svm"]),
        ({"name": "svmlight", "path": "bad.svm"}, ["task.path", "bad.svm", "SVMlight"]),
        ({"name": "svmlight", "path": "cut.svm.gz"}, ["task.path", "cut.svm.gz", "truncated"]),
        ({"name": "mnist", "path": "idx"}, ["task.path", "truncated"]),
        ({"name": "text", "path": "no/such.txt"}, ["task.path", "no/such.txt"]),
    ],
)
def test_missing_and_truncated_data_are_named(refused, tmp_path, task, words):
    import gzip

    (tmp_path / "bad.svm").write_text("one two three\n")
    whole = gzip.compress(b"1 1:0.5\n0 2:0.25\n" * 50)
    (tmp_path / "cut.svm.gz").write_bytes(whole[:-12])
    (tmp_path / "idx").mkdir()
    header = bytes([0, 0, 8, 3]) + b"".join(k.to_bytes(4, "big") for k in (10, 28, 28))
    (tmp_path / "idx" / "images-idx3-ubyte").write_bytes(header + bytes(1000))
    (tmp_path / "idx" / "labels-idx1-ubyte").write_bytes(
        bytes([0, 0, 8, 1]) + (10).to_bytes(4, "big") + bytes(10)
    )
    refused(changed(task=task), words)


# --- resume -----------------------------------------------------------------------------------


def test_resuming_what_is_not_there_is_refused(refused):
    refused(BASE, ["resume", "nowhere"], "--resume", "nowhere")


def test_resuming_what_is_not_there_needs_no_file_to_be_refused(invoke):
    assert_one_message(*invoke("run", "--resume", "nowhere"), ["resume", "nowhere"])


def test_resuming_a_comparison_is_refused(refused, tmp_path):
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "config.yaml").write_text("{}")
    refused(BASE | {"compare": {"a": {}, "b": {}}}, ["--resume", "compar"], "--resume", "some")


# --- real processes ---------------------------------------------------------------------------


def test_the_installed_command_refuses_without_a_traceback(tmp_path, launch_environment):
    (tmp_path / "run.yaml").write_text(json.dumps(changed(topology={"name": "rign"})))
    done = subprocess.run(
        [sys.executable, "-m", "gossamer", "run", "run.yaml"],
        cwd=tmp_path,
        env=launch_environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert_one_message(done.returncode, done.stderr, ["topology.name", "rign", "'ring'"])
    assert done.stdout == ""
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
@pytest.mark.parametrize("when", ["before the processes meet", "after"])
def test_a_launched_job_says_it_once_and_ends(tmp_path, launch_environment, launcher, when):
    change = {"topology": {"name": "rign"}} if when != "after" else {"ranks": 500}
    words = ["topology.name", "'ring'"] if when != "after" else ["task", "500"]
    (tmp_path / "run.yaml").write_text(json.dumps(changed(**change)))
    start = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"],
        "mpirun": ["mpirun", "-n", "2", sys.executable],
    }[launcher]
    done = subprocess.run(
        [*start, "-m", "gossamer", "run", "run.yaml"],
        cwd=tmp_path,
        env=launch_environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == {"torchrun": 1, "mpirun": 2}[launcher], done.stderr
    assert done.stderr.count("gossamer: error:") == 1, done.stderr
    message = next(line for line in done.stderr.splitlines() if "gossamer: error:" in line)
    for word in words:
        assert word in message
    assert "gossamer/launch" not in done.stderr, "a traceback of ours"
