"""Every way to get a field wrong: status 2 and one message that names field, value and fix."""

import json

import pytest
from refusals import BASE, changed

from gossamer.launch.comparison import variants_of, with_overrides
from gossamer.launch.config import Experiment, resolve

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


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lr_floor": 0.1}, ["lr_floor", "no effect", "schedule: constant", "cosine"]),
        ({"schedule": "cosine", "cycle": 5}, ["cycle", "no effect", "cosine-restarts"]),
        ({"schedule": "cosine-restarts"}, ["cycle", "cosine-restarts needs"]),
        (
            {"schedule": "cosine-restarts", "cycle": 7},
            ["optimizer.cycle", "7 does not divide", "steps: "],
        ),
        ({"max_norm": 0}, ["optimizer.max_norm", "greater than 0"]),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused(refused, fields, words):
    refused(changed(optimizer={"name": "sgd", "lr": 0.1} | fields, steps=20), words)


def test_an_optimizer_inside_the_algorithm_is_sent_outside(refused):
    refused(
        changed(algorithm={"optimizer": {"name": "sgd", "lr": 1}}),
        ["algorithm.optimizer", "beside 'algorithm:'"],
    )


def test_all_reduce_takes_an_oracle_that_has_no_objective_to_choose():
    oracle = {"name": "gossamer.launch.reproduce.linear_oracle:LinearLogistic"}
    Experiment(resolve(changed(algorithm={"name": "all-reduce"}) | {"oracle": oracle}), 2)


def test_an_oracle_whose_gradients_the_algorithm_does_not_take_is_refused(refused, tmp_path):
    (tmp_path / "scalars.py").write_text(
        "from gossamer.algorithms.oracles.backprop import Backprop\n"
        "class Scalars(Backprop):\n    name: str = 'scalars'\n    form = 'directions'\n"
    )
    refused(
        changed(oracle={"name": "scalars:Scalars"}),
        ["oracle: scalars gives directions", "dsgd", "it takes row", "use another oracle"],
    )


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
