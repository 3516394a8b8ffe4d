"""The page and the table about runs."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from gossamer.launch.cli import app
from gossamer.launch.recorder import Recorder, to_json
from gossamer.launch.report import finish, print_table, write_report
from gossamer.launch.report_charts import charts_of, draw_chart, run_colors
from gossamer.launch.report_page import render_page
from gossamer.launch.report_runs import format_value, read_runs, table_row
from gossamer.launch.start import start_run
from gossamer.launch.status import exit_status
from gossamer.runtime.errors import ConfigError

COMPARISON = {
    "task": {"name": "digits", "model": "mlp", "hidden": [8], "heterogeneity": "sorted"},
    "ranks": 4,
    "steps": 12,
    "log_every": 2,
    "evaluate_every": 4,
    "compare": {
        "second": {"algorithm": {"name": "d-nasa"}},
        "first": {
            "algorithm": {"name": "dsgd"},
            "optimizer": {"name": "sgd", "lr": 0.1},
            "topology": {"name": "one_peer_exponential"},
        },
    },
}
VOID = {"meta", "input", "br", "link", "img"}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    (folder / "two.yaml").write_text(yaml.safe_dump(COMPARISON, sort_keys=False))
    assert start_run(folder / "two.yaml", [], {}, folder / "two", None) == 0
    return folder / "two"


@pytest.fixture(scope="module")
def page(comparison):
    return (comparison / "report.html").read_text()


class Page(HTMLParser):
    """Checks nesting; keeps links, identifiers and tags."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.ids, self.tags = [], [], [], []
        self.feed(text)
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        named = dict(attributes)
        self.links += [named[k] for k in ("src", "href", "xlink:href", "data") if k in named]
        self.ids += [named["id"]] if "id" in named else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_complete_in_itself_and_well_formed(page):
    parsed = Page(page)
    assert all(link.startswith("#") for link in parsed.links)
    assert {link[1:] for link in parsed.links} <= set(parsed.ids)
    assert not {"script", "link", "img", "iframe"} & set(parsed.tags)
    assert "url(http" not in page
    assert "@import" not in page


def test_identifiers_are_not_shared_between_figures(page):
    ids = Page(page).ids
    assert len(ids) == len(set(ids))


def test_table_has_the_figures_of_every_summary(comparison, page):
    for name in ("first", "second"):
        summary = json.loads((comparison / name / "summary.json").read_text())
        assert summary["parameters_sha256"] in page
        for column in ("loss", "accuracy", "grad_norm", "consensus", "bytes_sent"):
            assert f">{format_value(column, summary[column])}</td>" in page


def test_runs_stand_in_the_order_they_ran(comparison):
    assert [run.name for run in read_runs([comparison])] == ["second", "first"]


def test_every_figure_that_was_logged_is_drawn_against_step_and_bytes(page):
    drawn = set(re.findall(r'aria-label="([^"]*), against ([^"]*)"', page))
    for title in ("Training loss", "Test loss", "Accuracy", "Gradient norm", "alpha", "gamma"):
        assert {(title, "step"), (title, "bytes_sent"), (title, "seconds")} <= drawn


def test_a_run_has_one_color_everywhere(page):
    legend = re.findall(r'background:(#[0-9a-f]{6})"></span>(second|first)', page)
    colors = {name: {c for c, n in legend if n == name} for name in ("second", "first")}
    assert [len(c) for c in colors.values()] == [1, 1]
    charts = re.findall(r'aria-label="Consensus distance, .*?</svg>', page, flags=re.S)
    assert len(charts) == 3
    for chart in charts:
        strokes = re.findall(r"stroke: (#[0-9a-f]{6})", chart)
        assert list(dict.fromkeys(strokes)) == [*colors["second"], *colors["first"]]


def test_graphs_are_drawn_with_their_weights_and_spectra(page):
    assert "<h3>ring, 4 ranks: second</h3>" in page
    assert "Eigenvalues of W" in page
    assert "Eigenvalues of a period" in page
    assert "edges 1/3" in page
    assert "rho</td><td>0.3333" in page  # the ring of four: 1/3
    assert "exact average after</td><td>2 rounds" in page  # one peer, four ranks


def test_what_differs_between_runs_is_shown_and_what_is_common_is_not(page):
    differs = page[page.index("what differs") : page.index("<details>")]
    assert re.findall(r"<tr><td>(\w+)</td>", differs) == ["algorithm", "topology", "optimizer"]


def test_names_are_escaped(comparison, tmp_path):
    run = tmp_path / "<b>bold & co"
    shutil.copytree(comparison / "first", run)
    write_report([run], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<b>" not in text
    assert "&lt;b&gt;bold &amp; co" in text
    Page(text)


def test_unknown_figures_get_a_chart_and_counters_none(comparison, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(comparison / "first", run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({**line, "epsilon": 0.1}) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text)
    titles = [chart.title for chart in charts_of(read_runs([run]))]
    assert titles[-1] == "epsilon"
    assert len(titles) == len(set(titles))
    assert not {"messages sent", "seconds", "rank loss", "step"} & set(titles)


def test_figures_over_decades_are_drawn_on_a_log_scale_without_the_rounding_of_step_0(tmp_path):
    records = [
        {"step": step, "consensus": 3e-7 if step == 0 else 10.0 ** -(step / 10), "bytes_sent": step}
        for step in range(0, 31, 5)
    ]
    run = synthetic_run(tmp_path / "run", records)
    chart = charts_of([run])[0]
    labels = re.findall(r">([0-9.e+-]+)</text>", draw_chart(chart, [run], ["#000000"], "step"))
    assert {"0.001", "0.01", "0.1"} <= set(labels)
    assert not [label for label in labels if "e-" in label]


def test_private_runs_state_their_privacy(tmp_path):
    said = {"private": True, "epsilon": 3.98, "trust": "one <rank> holds all"}
    seeded = {"private": False, "epsilon_if_secret": 4.0, "reservations": ["NOT PRIVATE: why"]}
    runs = [
        synthetic_run(tmp_path / "a", [], {"privacy": said, "filter": {"name": "disk"}}),
        synthetic_run(tmp_path / "b", [], {"privacy": seeded}),
        synthetic_run(tmp_path / "c", []),
    ]
    page = render_page(runs, "three")
    privacy = page.split("<h2>Privacy</h2>")[1].split("</table>")[0]
    for words in ("3.98", "one &lt;rank&gt; holds all", "name disk", "NOT PRIVATE: why"):
        assert words in privacy
    assert [table_row(run)["epsilon"] for run in runs] == [3.98, None, None]
    assert "<h2>Privacy</h2>" not in render_page(runs[2:], "one")


def test_the_terminal_states_what_the_page_does(tmp_path, capsys):
    said = {"private": True, "epsilon": 3.98, "trust": "one [rank] holds all", "clip": "auto-s"}
    public = {"private_examples": 90, "covers": "epsilon refers to the private examples"}
    runs = [
        synthetic_run(tmp_path / "a", [], {"privacy": said, "public_data": public}),
        synthetic_run(tmp_path / "b", []),
    ]
    print_table(runs)
    shown, page = capsys.readouterr().out, render_page(runs, "two")
    for words in ("3.98", "one [rank] holds all", "auto-s", "epsilon refers to the private"):
        assert words in shown
        assert words in page
    print_table(runs[1:])
    assert "privacy" not in capsys.readouterr().out


def test_a_page_about_long_runs_stays_small(tmp_path):
    records = [{"step": s, "loss": 1 / (s + 1), "bytes_sent": s} for s in range(20_000)]
    run = synthetic_run(tmp_path / "run", records)
    assert len(draw_chart(charts_of([run])[0], [run], ["#000000"], "step")) < 60_000


def test_a_figure_that_is_not_finite_is_left_out(tmp_path):
    records = [{"step": s, "loss": float("nan") if s else 1.0, "bytes_sent": s} for s in range(3)]
    run = synthetic_run(tmp_path / "run", records)
    assert draw_chart(charts_of([run])[0], [run], ["#000000"], "step")


def test_many_runs_get_different_colors():
    assert len(set(run_colors(25))) == 25


def test_finish_writes_one_page_and_prints_the_table(comparison, tmp_path, capsys):
    root = tmp_path / "root"
    root.mkdir()
    finish(root, [comparison / "second", comparison / "first"])
    printed = capsys.readouterr().out
    assert f"Report: {root / 'report.html'}" in printed
    assert (root / "report.html").is_file()
    for name in ("first", "second"):
        summary = json.loads((comparison / name / "summary.json").read_text())
        assert summary["parameters_sha256"][:12] in printed


def test_json_gives_the_table(comparison, tmp_path):
    out = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["report", str(comparison), "--json", "--out", str(out)])
    rows = json.loads(result.stdout)
    assert [row["run"] for row in rows] == ["second", "first"]
    summary = json.loads((comparison / "second" / "summary.json").read_text())
    assert rows[0]["parameters_sha256"] == summary["parameters_sha256"]
    assert out.is_file()


def test_runs_of_the_same_name_are_told_apart(comparison, tmp_path):
    for parent in ("a", "b"):
        shutil.copytree(comparison / "first", tmp_path / parent / "run")
    runs = read_runs([tmp_path / "a" / "run", tmp_path / "b" / "run"])
    assert [run.name for run in runs] == ["a/run", "b/run"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: shutil.rmtree(run), "RUN: no folder .*; name one that 'gossamer run' wrote"),
        (lambda run: (run / "config.yaml").unlink(), "RUN: .* has no config.yaml"),
        (lambda run: (run / "summary.json").unlink(), "has no summary.json, .*--resume"),
        (lambda run: (run / "summary.json").write_text("{"), "RUN: .* is broken .*; run it again"),
        (lambda run: (run / "metrics.jsonl").unlink(), "has no metrics.jsonl"),
        (
            lambda run: (run / "metrics.jsonl").write_text('{"step": 0}\n{"st'),
            "metrics.jsonl, line 2: .*--resume",
        ),
    ],
)
def test_an_incomplete_folder_is_refused_before_anything_is_written(
    comparison, tmp_path, damage, message
):
    run = tmp_path / "run"
    shutil.copytree(comparison / "first", run)
    damage(run)
    with pytest.raises(ConfigError, match=message):
        write_report([run], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_topology_that_cannot_be_built_again_is_named_and_the_page_written(comparison, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(comparison / "first", run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["topology"] = {"name": "gone_away"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    write_report([run], tmp_path / "page.html")
    assert "topology.name: unknown &#x27;gone_away&#x27;" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("column", "value", "shown"),
    [
        ("bytes_sent", 999, "999 B"),
        ("bytes_sent", 61_644_800, "61.6 MB"),
        ("bytes_sent", 4_200_000_000_000, "4.2 TB"),
        ("seconds", 1.0127, "1.0"),
        ("loss", 0.6153638, "0.6154"),
        ("accuracy", None, "-"),
        ("steps", 100_000, "100,000"),
        ("parameters_sha256", "8e55efd16d82f8d5ba7b", "8e55efd16d82"),
    ],
)
def test_figures_are_shown_as_people_read_them(column, value, shown):
    assert format_value(column, value) == shown


def synthetic_run(folder: Path, records, summary=None):
    folder.mkdir()
    (folder / "config.yaml").write_text("ranks: 4\n")
    (folder / "summary.json").write_text(json.dumps(summary or {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return read_runs([folder])[0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_message_and_status_one(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    recorder = Recorder(tmp_path, "run", 3, leader=True, tensorboard=False)

    def log() -> int:
        with recorder:
            recorder.log({"step": 0, "loss": 1.0})
        return 0

    assert exit_status(log) == 1
    err = capsys.readouterr().err
    assert "metrics.jsonl: cannot be written (No space left on device)" in err
    assert "--resume" in err
    assert "Traceback" not in err


def test_what_is_not_finite_is_null_and_read_back(tmp_path):
    recorder = Recorder(tmp_path, "run", 3, leader=True, tensorboard=False)
    with recorder:
        recorder.log({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "seconds": 1.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "loss": None, "grad_norm": None, "seconds": 1.0}
    (tmp_path / "config.yaml").write_text("algorithm: {name: dsgd}")
    (tmp_path / "summary.json").write_text(to_json(recorder.last))
    assert "NaN" not in (tmp_path / "summary.json").read_text()
    run = read_runs([tmp_path])[0]
    assert run.records == [{"step": 1, "seconds": 1.0}]
    assert table_row(run)["loss"] is None
    again = Recorder(tmp_path, "run", 3, leader=True, tensorboard=False)
    again.truncate(1)
    with again:
        again.log({"step": 3, "batch_loss": 2.0, "seconds": 1.0})
