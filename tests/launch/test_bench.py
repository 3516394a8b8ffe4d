import json
import os
import subprocess
import sys

import pytest

from gossamer.launch.bench.limit import bytes_to_move
from gossamer.launch.bench.measure import Options, interleave, parse_bytes, print_rows, spread, text
from gossamer.launch.bench.simulate import fit, simulate
from gossamer.runtime import native
from gossamer.runtime.errors import ConfigError
from gossamer.topologies import build

TINY = Options(min_bytes=64, max_bytes=4096, factor=8, iters=3, warmup=1, dtype="float32")


def bench(*arguments, timeout=200):
    done = subprocess.run(
        [sys.executable, "-m", "gossamer", "bench", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(autouse=True)
def _threads_as_before():
    yield
    native.use_threads(None)


@pytest.mark.parametrize(
    ("text_", "expected"), [("8", 8), ("64K", 65536), ("1m", 1 << 20), ("2GB", 2 << 30)]
)
def test_sizes_are_read_as_powers_of_1024(text_, expected):
    assert parse_bytes(text_) == expected


@pytest.mark.parametrize("text_", ["", "x", "1.5M", "-8", "8T"])
def test_what_is_no_size_is_refused(text_):
    with pytest.raises(ConfigError, match="is not a size; write 8, 64K"):
        parse_bytes(text_)


def test_a_sweep_has_each_size_once():
    assert TINY.counts() == [16, 128, 1024]
    assert Options(1, 4, 1.5, 1, 0, "float32").counts() == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int8"}, "--dtype: unknown dtype 'int8'"),
        ({"min_bytes": 8192}, "--max-bytes: 4096 is below --min-bytes 8192"),
        ({"factor": 1.0}, "--factor: must be above 1"),
    ],
)
def test_options_refuse_what_makes_no_sweep(change, message):
    with pytest.raises(ConfigError, match=message):
        Options(**{**vars(TINY), **change})


def test_spread_is_median_and_tenths():
    found = spread(range(101))
    assert (found.median, found.p10, found.p90) == (50, 10, 90)


def test_cases_run_in_turn_and_warm_up():
    calls = []
    found = interleave(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, iters=3, warmup=2
    )
    assert calls == ["a", "b"] * 5
    assert set(found) == {"a", "b"}
    assert all(0 <= s.p10 <= s.median <= s.p90 for s in found.values())


def test_rows_print_as_a_table_and_as_json(capsys):
    rows = [{"name": "ring", "ms": 1.5}, {"name": "torus", "ms": None}]
    columns = {"graph": text("name"), "time": text("ms", "{:.2f}")}
    print_rows(rows, columns, title="x", as_json=True, extra={"fit": 1})
    document = json.loads(capsys.readouterr().out)
    assert document["rows"] == rows
    assert document["fit"] == 1
    assert "torch" in document["versions"]
    print_rows(rows, columns, title="x", as_json=False)
    table = capsys.readouterr().out
    assert "1.50" in table
    assert "torus" in table


def test_simulate_checks_and_measures_every_graph():
    rows = simulate(["ring", "exponential"], [4, 16], TINY)
    assert [(r["graph"], r["ranks"]) for r in rows[::3]] == [
        ("ring", 4),
        ("exponential", 4),
        ("ring", 16),
        ("exponential", 16),
    ]
    assert all(row["rank_steps_per_s"] > 0 and row["share"] > 0 for row in rows)
    assert all(
        row["edges"]
        == row["ranks"] * (2 if row["graph"] == "ring" else {4: 2, 16: 4}[row["ranks"]])
        for row in rows
    )


def test_fit_recovers_the_coefficients_it_is_made_of():
    rows = [
        {"ranks": 10, "d": d, "edges": e, "mix_ms": 1e3 * (2e-9 * 10 * d + 3e-9 * e * d)}
        for d in (100, 1000)
        for e in (20, 40, 130)
    ]
    found = fit([*rows, {"ranks": 5, "d": 1, "edges": 1, "mix_ms": 99.0}])
    assert found["ranks"] == 10
    assert found["ns_per_element"] == pytest.approx(2)
    assert found["ns_per_edge_element"] == pytest.approx(3)
    assert found["r2"] == pytest.approx(1)
    assert found["worst"] < 1e-9


def test_a_large_round_needs_no_more_than_its_result():
    big = Options(
        min_bytes=160_000, max_bytes=160_000, factor=2, iters=1, warmup=0, dtype="float32"
    )
    for row in simulate(["ring", "exponential"], [256], big):  # 39 MiB of rows
        assert row["step_copies"] is None or row["step_copies"] < 0.5
        assert row["mix_copies"] is None or row["mix_copies"] < 1.5


def test_the_command_prints_json():
    status, out, err = bench("simulate", "--ranks=8", "--graphs=ring", "--iters=2", "--json")
    assert status == 0, err
    document = json.loads(out)
    assert document["benchmark"] == "simulate"
    assert document["rows"][0]["d"] == 10_000


def test_collectives_checks_and_times_all_ways_in_one_run():
    pytest.importorskip("mpi4py")
    operations = ["ring", "complete", "all_reduce", "broadcast", "all_gather"]
    status, out, err = bench(
        *("collectives", "--ranks=2", f"--operations={','.join(operations)}", "--json"),
        *("--max-bytes=2K", "--factor=256", "--iters=2", "--warmup=0"),
    )
    assert status == 0, err
    document = json.loads(out)
    assert document["skipped"] == []
    assert [(r["dtype"], r["operation"], r["bytes"]) for r in document["rows"]] == [
        (dtype, operation, size)
        for dtype in ("float32", "bfloat16")
        for operation in operations
        for size in (8, 2048)
    ]
    for row in document["rows"]:
        assert (row["transport"], row["ranks"]) == ("native", 2)
        assert row["us_p10"] <= row["us"] <= row["us_p90"]
        assert row["torch_ratio"] == pytest.approx(row["torch_us"] / row["us"])
        no_sum = row["operation"] == "all_reduce" and row["dtype"] == "bfloat16"
        assert (row["mpi_us"] is None) == no_sum  # Open MPI has none
        assert row["share"] == pytest.approx(row["limit_us"] / row["us"])
        seconds = row["bytes_to_move"] / (1e9 * row["triad_gbps"])
        assert row["limit_us"] == pytest.approx(1e6 * seconds)


def test_collectives_over_another_transport():
    pytest.importorskip("mpi4py")
    status, out, err = bench(
        *("collectives", "--ranks=2", "--transport=gloo", "--operations=ring", "--json"),
        *("--dtypes=float32", "--max-bytes=8", "--iters=2", "--warmup=0"),
    )
    assert status == 0, err
    assert [row["transport"] for row in json.loads(out)["rows"]] == ["gloo"]


def test_overlap_computes_and_averages_in_turn_and_beside():
    pytest.importorskip("mpi4py")
    status, out, err = bench(
        *("overlap", "--transports=native,mpi", "--max-bytes=64K", "--iters=3", "--json")
    )
    assert status == 0, err
    rows = json.loads(out)["rows"]
    assert [(row["transport"], row["bytes"]) for row in rows] == [("native", 65536), ("mpi", 65536)]
    for row in rows:
        shorter = min(row["compute_us"], row["average_us"])
        assert row["saved"] == pytest.approx((row["in_turn_us"] - row["overlap_us"]) / shorter)


def test_ddp_times_both_backends_in_one_run():
    flags = ["--ranks=2", "--widths=8", "--iters=2", "--warmup=1", "--json"]
    status, out, err = bench("ddp", *flags)
    assert status == 0, err
    (row,) = json.loads(out)["rows"]
    assert (row["ranks"], row["width"], row["buckets"]) == (2, 8, 1)
    assert row["ratio"] == pytest.approx(row["gloo_ms"] / row["gossamer_ms"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_checks_and_times_all_ways(dtype):
    arguments = ("--min-bytes=8", "--max-bytes=4K", "--factor=512", "--iters=2", f"--dtype={dtype}")
    status, out, err = bench("random", *arguments, "--json")
    assert status == 0, err
    rows = json.loads(out)["rows"]
    assert [(row["dtype"], row["bytes"]) for row in rows] == [(dtype, 8), (dtype, 4096)]
    for row in rows:
        assert row["normal_torch_ratio"] == pytest.approx(row["torch_ns"] / row["normal_ns"])
        assert row["rademacher_share"] == pytest.approx(row["copy_ns"] / row["rademacher_ns"])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_release_checks_and_times_all_ways(dtype):
    arguments = ("--min-bytes=8", "--max-bytes=4K", "--factor=512", "--iters=2", f"--dtype={dtype}")
    status, out, err = bench("release", *arguments, "--json")
    assert status == 0, err
    document = json.loads(out)
    rows = document["rows"]
    assert [row["examples"] for row in document["examples"]] == [64, 64]
    assert [(row["dtype"], row["bytes"]) for row in rows] == [(dtype, 8), (dtype, 4096)]
    for row in rows:
        assert row["unfused_ratio"] == pytest.approx(row["unfused_ns"] / row["fused_ns"])
        assert row["rest_share"] == pytest.approx(row["limit_ns"] / row["rest_ns"])


def test_what_must_move_counts_rows_read_and_written():
    ring, directed = build("ring", 4).round(0), build("directed_ring", 4).round(0)
    assert bytes_to_move("average", 4, ring, 10) == (4 * (2 + 2) * 10, 2 * 4 * 10)
    assert bytes_to_move("average", 4, directed, 10) == (4 * (1 + 2) * 10, 2 * 4 * 10)
    assert bytes_to_move("all_reduce", 4, ring, 10) == (2 * 4 * 10, 2 * 4 * 10)
    assert bytes_to_move("broadcast", 4, ring, 10) == (2 * 3 * 10, 4 * 10)
    assert bytes_to_move("all_gather", 4, ring, 10) == (2 * 16 * 10, 20 * 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["collectives", "--ranks=1"], "--ranks: '1' must be numbers of at least 2"),
        (["collectives", "--dtypes=int8"], "--dtype: unknown dtype 'int8'"),
        (["simulate", "--graphs=rign"], "rign"),
        (["simulate", "--min-bytes=many"], "'many' is not a size"),
        (["release", "--dtype=bfloat16"], "--dtype: 'bfloat16' has no private sums"),
    ],
)
def test_bad_arguments_end_with_status_2_and_say_why(arguments, message):
    status, _, err = bench(*arguments)
    assert status == 2
    assert message in err
