"""Every way to get a field wrong: status 2 and one message that names field, value and fix."""

import json
import subprocess
import sys

import numpy as np
import pytest

from gossamer.launch.cli import main
from gossamer.launch.comparison import variants_of, with_overrides
from gossamer.launch.config import Experiment, resolve

BASE = {
    "task": {"name": "wine", "model": "linear"},
    "oracle": {"name": "backprop", "batch_size": 8},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "algorithm": {"name": "dsgd"},
    "topology": {"name": "ring"},
    "ranks": 4,
    "steps": 4,
}


@pytest.fixture
def invoke(tmp_path, monkeypatch, capsys):
    """Run `gossamer ARGV` in an empty folder; return its status and what it wrote to stderr."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "GOSSAMER_DATA"):
        monkeypatch.delenv(name, raising=False)
    # Users' modules are imported from the current folder; each test has another.
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["gossamer", *map(str, argv)])
        with pytest.raises(SystemExit) as done:
            main()
        return done.value.code, capsys.readouterr().err

    yield call
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def refused(invoke, tmp_path):
    """Check that a run is refused with one message holding all of the given words."""

    def check(values, words, *argv):
        text = values if isinstance(values, str) else json.dumps(values)
        (tmp_path / "run.yaml").write_text(text)
        status, err = invoke("run", "run.yaml", "--out", "out", *argv)
        assert_one_message(status, err, words)
        assert not (tmp_path / "out" / "metrics.jsonl").exists(), "training began"
        return err

    return check


def assert_one_message(status, err, words):
    assert status == 2, err
    assert err.startswith("gossamer: error: "), err
    assert err.count("gossamer: error:") == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in err, f"{word!r} is not in {err!r}"


def changed(**sections):
    """Return the run with fields changed: a dict merges into its section, None drops the field."""
    values = {k: dict(v) if isinstance(v, dict) else v for k, v in BASE.items()}
    for key, value in sections.items():
        if value is None:
            values.pop(key, None)
        elif isinstance(value, dict) and isinstance(values.get(key), dict) and "name" not in value:
            values[key] |= value
        else:
            values[key] = value
    return values


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "given", "nearest"),
    [
        ("task", "digitz", "digits"),
        ("oracle", "backprob", "backprop"),
        ("optimizer", "adamm", "adam"),
        ("algorithm", "dnasa", "d-nasa"),
        ("topology", "rign", "ring"),
        ("topology", "exponental", "exponential"),
    ],
)
def test_an_unknown_name_offers_the_nearest(refused, section, given, nearest):
    values = changed(**{section: {"name": given}})
    refused(values, [f"{section}.name", given, nearest])


def test_an_unknown_transport_offers_the_nearest(refused):
    refused(BASE, ["transport", "'gloom'", "'gloo'"], "--transport", "gloom")


def test_an_algorithm_far_from_any_lists_the_known_ones(refused):
    refused(changed(algorithm={"name": "zzzz"}), ["algorithm.name", "zzzz", "d-nasa", "module:"])


@pytest.mark.parametrize(
    ("section", "field", "nearest"),
    [
        ("task", "heterogenity", "heterogeneity"),
        ("oracle", "batchsize", "batch_size"),
        ("optimizer", "shedule", "schedule"),
        ("algorithm", "ordr", "order"),
        ("topology", "weight", "weights"),
    ],
)
def test_an_unknown_field_offers_the_nearest(refused, section, field, nearest):
    refused(changed(**{section: {field: 1}}), [f"{section}.{field}", "unknown", f"'{nearest}'"])


def test_an_unknown_field_at_the_top_offers_the_nearest(refused):
    refused(changed(stpes=5), ["stpes", "unknown field", "'steps'"])


# --- types and ranges -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("steps: abc", ["steps", "whole number", "'abc'"]),
        ("steps: '10'", ["steps", "whole number", "'10'", "write 10"]),
        ("steps: 1e3", ["steps", "whole number", "'1e3'", "write 1000"]),
        ("steps: 2.5", ["steps", "whole number", "2.5"]),
        ("steps: yes", ["steps", "number", "true", "YAML"]),
        ("steps: 0", ["steps", "greater than or equal to 1", "0"]),
        ("steps: -3", ["steps", "-3"]),
        ("steps: .nan", ["steps", "whole number", "nan"]),
        ("steps: 12:30", ["steps", "12:30"]),
        ("steps: [1]", ["steps", "[1]"]),
        ("steps: null", ["steps", "None"]),
        ("ranks: 0", ["ranks", "0"]),
        ("ranks: four", ["ranks", "'four'"]),
        ("seed: on", ["seed", "true"]),
        ("threads: 0", ["threads", "0"]),
        ("processes: 0", ["processes", "0"]),
        ("timeout_s: 0", ["timeout_s", "greater than 0"]),
        ("timeout_s: .inf", ["timeout_s", "finite", "inf"]),
        ("timeout_s: no", ["timeout_s", "number", "false"]),
        ("log_every: 0", ["log_every", "0"]),
        ("checkpoint_every: -1", ["checkpoint_every", "-1"]),
        ("keep_checkpoints: 0", ["keep_checkpoints", "0"]),
        ("trace: maybe", ["trace", "'maybe'"]),
        ("log_every: 10\nevaluate_every: 15", ["evaluate_every", "multiple", "10", "15"]),
    ],
)
def test_a_wrong_value_at_the_top_is_named(refused, line, words):
    kept = {k: v for k, v in BASE.items() if k != line.split(":")[0]}
    refused("\n".join([f"{k}: {json.dumps(v)}" for k, v in kept.items()] + [line]), words)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("optimizer.lr=nan", ["optimizer.lr", "finite", "nan"]),
        ("optimizer.lr=.nan", ["optimizer.lr", "finite", "nan"]),
        ("optimizer.lr=inf", ["optimizer.lr", "finite", "inf"]),
        ("optimizer.lr=-1", ["optimizer.lr", "greater than 0", "-1"]),
        ("optimizer.lr=0", ["optimizer.lr", "greater than 0"]),
        ("optimizer.lr=fast", ["optimizer.lr", "number", "'fast'"]),
        ("optimizer.lr=yes", ["optimizer.lr", "number", "true"]),
        ("optimizer.lr=", ["optimizer.lr", "None"]),
        ("optimizer.schedule=cosin", ["optimizer.schedule", "'cosine'", "'cosin'"]),
        ("oracle.batch_size=0", ["oracle.batch_size", "0"]),
        ("oracle.batch_size=yes", ["oracle.batch_size", "true"]),
        ("oracle.batch_size=many", ["oracle.batch_size", "'many'"]),
        ("task.model=transformr", ["task.model", "'transformr'", "mlp"]),
        ("task.examples=100000", ["task.examples", "100000"]),
        ("task.positive=7", ["task.positive", "7"]),
        ("algorithm.order=act", ["algorithm.order", "'atc'", "'act'"]),
        ("topology.weights=metropolitan", ["topology.weights", "metropolitan", "metropolis"]),
        ("topology.lazy=7", ["topology.lazy", "7"]),
    ],
)
def test_a_wrong_value_in_a_section_is_named(refused, setting, words):
    refused(BASE, words, "-s", setting)


def test_text_such_as_1e_minus_3_is_the_number_it_means(invoke, tmp_path):
    (tmp_path / "run.yaml").write_text(json.dumps(BASE).replace('"lr": 0.1', '"lr": "1e-3"'))
    status, err = invoke("run", "run.yaml", "--out", "out", "-s", "steps=1")
    assert status == 0, err
    assert "lr: 0.001" in (tmp_path / "out" / "config.yaml").read_text()


# --- sections ---------------------------------------------------------------------------------


@pytest.mark.parametrize("section", ["task", "algorithm", "steps"])
def test_a_missing_section_is_named_with_how_to_write_it(refused, section):
    refused(changed(**{section: None}), [section, "missing", f"add '{section}: ...'"])


@pytest.mark.parametrize("section", ["task", "oracle", "optimizer", "algorithm", "topology"])
def test_a_section_without_a_name_is_refused(refused, section):
    refused(BASE | {section: {}}, [f"{section}.name", "missing"])


@pytest.mark.parametrize("section", ["task", "oracle", "optimizer", "algorithm", "topology"])
def test_a_name_where_a_section_belongs_is_refused(refused, section):
    refused(BASE | {section: "ring"}, [section, "'ring'", f"{section}: {{name: ring}}"])


@pytest.mark.parametrize("section", ["task", "oracle", "optimizer", "algorithm", "topology"])
def test_a_name_that_is_no_text_is_refused(refused, section):
    refused(BASE | {section: {"name": 3}}, [f"{section}.name", "3"])


def test_an_algorithm_that_needs_an_optimizer_says_so(refused):
    refused(changed(optimizer=None), ["optimizer", "dsgd", "{name: sgd, lr: 0.1}"])


def test_an_optimizer_without_effect_is_refused(refused, tmp_path):
    own_rule = NO_STEP + "\n    def step(self, comm, oracle, state, batches):\n        return {}\n"
    (tmp_path / "own_rule.py").write_text(own_rule)
    values = changed(algorithm={"name": "own_rule:Mine"})
    refused(values, ["optimizer", "own_rule:Mine", "remove it"])


def test_an_optimizer_inside_the_algorithm_is_sent_outside(refused):
    refused(
        changed(algorithm={"optimizer": {"name": "sgd", "lr": 1}}),
        ["algorithm.optimizer", "beside 'algorithm:'"],
    )


def test_all_reduce_takes_an_oracle_that_has_no_objective_to_choose():
    oracle = {"name": "gossamer.launch.reproduce.linear_oracle:LinearLogistic"}
    Experiment(resolve(changed(algorithm={"name": "all-reduce"}) | {"oracle": oracle}), 2)


def test_several_oracles_that_do_not_stack_are_refused(refused):
    refused(BASE | {"oracle": ["backprop", "backprop"]}, ["oracle"])


def test_an_empty_stack_of_oracles_is_refused(refused):
    refused(BASE | {"oracle": []}, ["oracle", "[]"])


@pytest.mark.parametrize(
    ("compare", "words"),
    [
        ([1, 2], ["compare", "[1, 2]"]),
        ("dsgd", ["compare", "'dsgd'"]),
        ({}, ["compare", "{}"]),
        ({"a": 3}, ["compare", "3"]),
        ({"a": {"algorithm": {"name": "dsdg"}}}, ["compare.a", "algorithm.name", "'dsgd'"]),
        ({"a": {"stpes": 3}}, ["compare.a", "stpes", "'steps'"]),
        ({"../a": {"steps": 3}}, ["compare", "'../a'", "folder"]),
        ({"..": {"steps": 3}}, ["compare", "'..'", "folder"]),
        ({"a": {"transport": "stacked"}}, ["compare.a.transport", "outside compare"]),
        ({"a": {"processes": 2}}, ["compare.a.processes", "outside compare"]),
    ],
)
def test_a_malformed_comparison_is_refused(refused, compare, words):
    refused(BASE | {"compare": compare}, words)


COMPARED = BASE | {
    "compare": {
        "mine": {"algorithm": {"name": "d-nasa"}, "optimizer": None},
        "theirs": {"algorithm": {"name": "dsgd"}, "seed": 3},
    }
}


def sections(settings, **options):
    """Return the runs of COMPARED as a command line changes them."""
    return variants_of(with_overrides(COMPARED, settings, options))


def test_an_override_reaches_every_run_of_a_comparison_whatever_its_entry_says():
    runs = sections(["algorithm={name: dsgd, order: cta}", "seed=5", "threads=2"], ranks=2)
    assert [run.algorithm for run in runs.values()] == [{"name": "dsgd", "order": "cta"}] * 2
    assert [(run.seed, run.threads, run.ranks) for run in runs.values()] == [(5, 2, 2)] * 2


def test_an_override_of_one_run_of_a_comparison_reaches_it_alone():
    runs = sections(["compare.mine.algorithm.c=0.25"])
    assert runs["mine"].algorithm == {"name": "d-nasa", "c": 0.25}
    assert runs["theirs"].algorithm == {"name": "dsgd"}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("algorithm.c=0.25", ["'dsgd' of run 'theirs'", "'c'", "-s compare.mine.algorithm.c=0.25"]),
        ("algorithm.cc=0.25", ["compare.", "algorithm.cc", "unknown"]),
        ("compare.mien.seed=1", ["no run 'mien'", "'mine'"]),
        ("compare.mine.compare={a: {}}", ["compare.mine.compare", "no comparison"]),
    ],
)
def test_an_override_that_fits_no_run_or_some_only_is_refused(refused, setting, words):
    refused(COMPARED, words, "-s", setting)


def test_more_threads_than_the_machine_could_run_are_refused(refused):
    refused(BASE, ["threads", "100000", "cores"], "-s", "threads=100000")


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
