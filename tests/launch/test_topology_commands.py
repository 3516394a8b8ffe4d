"""gossamer topology and gossamer plan: what they print, and how they refuse."""

import json

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from gossamer.launch.commands import plan, topology
from gossamer.topologies import (
    TopologyConnectivityError,
    TopologyError,
    TopologyParameterError,
    TopologyStochasticError,
    build,
    names,
)

app = typer.Typer()
app.add_typer(topology.app, name="topology")
app.command("plan")(plan.plan)
NETWORK = ["--params", "100e6", "--latency", "50e-6", "--bandwidth", "3.125e9"]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def output(*arguments):
    result = invoke(*arguments)
    assert result.exception is None, result.exception
    return result.stdout


def refusal(*arguments):
    result = invoke(*arguments)
    assert isinstance(result.exception, TopologyError), result.output
    return result.exception


def test_list_names_every_topology_with_parameters_and_a_line_of_text():
    rows = json.loads(output("topology", "list", "--json"))
    assert [row["name"] for row in rows] == names()
    assert next(row for row in rows if row["name"] == "base")["parameters"]["k"] == 1
    assert all(row["description"].endswith(".") for row in rows)
    assert "de_bruijn" in output("topology", "list")


def test_show_gives_the_rounds_of_which_the_matrices_can_be_rebuilt():
    shown = json.loads(output("topology", "show", "base", "--ranks", 25, "-s", "k=4", "--json"))
    assert (shown["n"], shown["period"], shown["kind"], shown["degree"]) == (25, 2, "SDS", 4)
    assert (shown["rho_period"], shown["exact_after"], shown["rounds_to_1e-6"]) == (0.0, 2, 2)
    expected = build("base", 25, k=4)
    for entry in shown["rounds"]:
        matrix = np.diag(entry["self_weights"])
        for source, target, weight in entry["edges"]:
            matrix[target, source] = weight
        np.testing.assert_array_equal(matrix, expected.round(entry["t"]).matrix())


def test_show_gives_the_norm_of_a_static_graph():
    shown = json.loads(output("topology", "show", "ring", "--json"))
    assert shown["n"] == 8
    assert shown["rho"] == pytest.approx(0.804738, abs=5e-7)
    assert shown["lambda_min"] == pytest.approx(-1 / 3)
    assert shown["bytes_per_step"] is None


def test_show_prints_facts_and_weights_and_bytes():
    text = output("topology", "show", "one-peer-hypercube", "--ranks", 4, "--params", "1e6")
    assert "bytes_per_step" in text
    assert "4000000" in text
    assert "3: 1/2  2: 1/2" in text


def test_parameters_are_yaml_and_may_be_nested():
    arguments = ["-s", "hierarchical.local=2", "-s", "lazy=true", "-s", "weights=best_constant"]
    shown = json.loads(output("topology", "show", "star", *arguments, "--json"))
    assert shown["params"]["hierarchical"] == {"local": 2}
    assert shown["params"]["lazy"] is True
    shown = json.loads(output("topology", "show", "circulant", "-s", "offsets=[1, 3]", "--json"))
    assert shown["degree"] == 2


def test_every_listed_topology_can_be_shown():
    for name in names():
        if name == "custom":
            continue
        options = ["-s", "offsets=[1]"] if name == "circulant" else []
        ranks = {"paley": 13, "margulis": 9}.get(name, 8)
        arguments = ("topology", "show", name, "--ranks", ranks, *options)
        shown = json.loads(output(*arguments, "--json"))
        assert shown["rho"] <= 1 + 1e-12
        assert name in output(*arguments)


def test_show_and_draw_write_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output("topology", "show", "ring", "--plot", "ring.svg", "--json")
    assert (tmp_path / "ring.svg").read_text().startswith("<?xml")
    assert "wrote base-6.png" in output("topology", "draw", "base", "--ranks", 6)
    assert (tmp_path / "base-6.png").stat().st_size > 1000
    output("topology", "draw", "base", "--ranks", 6, "--round", 2, "--out", "one.svg")
    assert "round 2" in (tmp_path / "one.svg").read_text()


def test_check_describes_a_good_graph_and_refuses_a_faulty_one(tmp_path):
    good = tmp_path / "good.edgelist"
    good.write_text("0 1\n1 2\n2 0\n")
    assert json.loads(output("topology", "check", good, "--json"))["n"] == 3
    cut = tmp_path / "cut.edgelist"
    cut.write_text("0 1\n2 3\n")
    assert isinstance(refusal("topology", "check", cut), TopologyConnectivityError)
    np.save(tmp_path / "w.npy", np.array([[0.5, 0.5], [0.5, 0.47]]))
    fault = refusal("topology", "check", tmp_path / "w.npy")
    assert isinstance(fault, TopologyStochasticError)
    assert "row 1 of W sums to 0.97" in str(fault)


def test_check_reads_the_topology_of_an_experiment(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("topology: {name: base, k: 2}\nranks: 9\n")
    assert json.loads(output("topology", "check", file, "--json"))["period"] == 2
    file.write_text("topology: hypercube\nranks: 6\n")
    assert "hypercube needs a power of two, got 6" in str(refusal("topology", "check", file))
    assert "rounds_to_1e-6" in output("topology", "check", file, "--ranks", 8)


FAULTS = [
    (("show", "rign"), "did you mean 'ring'"),
    (("show", "hypercube", "--ranks", 6), "hypercube needs a power of two, got 6"),
    (("show", "base", "-s", "k"), "-s: expected KEY=VALUE, got 'k'"),
    (("show", "base", "-s", "k=[1"), "-s k: '[1' is not YAML"),
    (("show", "base", "-s", "kk=2"), "did you mean 'k'"),
    (("show", "ring", "--plot", "ring.txt"), "a picture is a .png, .svg or .pdf file"),
    (("draw", "ring", "--ranks", 2000), "at most 1024 ranks, got 2000"),
    (("check", "gone.gml"), "there is no file 'gone.gml'"),
    (("check", "gone.yaml"), "gone.yaml: cannot be read as YAML"),
]


@pytest.mark.parametrize(("arguments", "message"), FAULTS)
def test_bad_input_is_refused_by_name(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fault = refusal("topology", *arguments)
    assert isinstance(fault, TopologyParameterError)
    assert message in str(fault)


@pytest.mark.parametrize(
    ("text", "message"),
    [("ranks: 4", "has no 'topology"), ("topology: ring", "has no 'ranks:'; give --ranks"),
     ("topology: [", "cannot be read as YAML")],
)  # fmt: skip
def test_experiments_without_a_topology_are_refused(text, message, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert message in str(refusal("topology", "check", file))


def test_plan_prints_the_table_behind_its_advice():
    text = output("plan", "--ranks", 16, *NETWORK)
    assert "->" in text
    assert "halving-doubling all-reduce" in text
    assert "All-reduce is cheaper for an average" in text
    assert "topology: {name: one_peer_exponential}" in text


def test_plan_gives_json():
    made = json.loads(output("plan", "--ranks", 25, *NETWORK, "--json"))
    assert made["topology"] == {"name": "base", "k": 1}
    ring = next(method for method in made["methods"] if method["method"] == "ring")
    assert ring["copies_per_round"] == 2
    few = json.loads(output("plan", "--ranks", 4, *NETWORK, "--json"))
    assert few["topology"] is None
    assert "all-reduce" in few["choice"]
    assert "Use halving-doubling all-reduce." in output("plan", "--ranks", 4, *NETWORK)


def test_plan_refuses_bad_figures():
    assert "plan.compute_time" in str(refusal("plan", "--ranks", 16, *NETWORK, "--heterogeneous"))
    assert invoke("plan", "--ranks", 16, *NETWORK, "--goal", "fast").exit_code == 2
