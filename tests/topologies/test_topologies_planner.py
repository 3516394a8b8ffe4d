"""The planner: the worked example, the rule, and what it says about all-reduce."""

from math import log

import pytest

from gossamer.topologies import TopologyParameterError, build, plan

CLUSTER = {"params": 100e6, "latency_s": 50e-6, "bandwidth": 3.125e9}  # S = 400 MB
WIDE_AREA = {"params": 1e6, "latency_s": 30e-3, "bandwidth": 12.5e6}  # S = 4 MB


def row(made, label):
    return next(method for method in made.methods if method.label == label)


WORKED = {
    "ring": (0.256050, 133, 34.05),
    "exponential": (0.512050, 14, 7.1687),
    "one_peer_exponential": (0.128050, 4, 0.5122),
    "base_4": (0.384050, 2, 0.7681),
}


@pytest.mark.parametrize("label", WORKED)
def test_the_worked_example(label):
    method = row(plan(16, **CLUSTER), label)
    round_s, rounds, total_s = WORKED[label]
    assert method.round_s == pytest.approx(round_s, abs=1e-9)
    assert method.rounds == rounds
    assert method.total_s == pytest.approx(total_s, rel=2e-4)


def test_all_reduce_in_the_worked_example_and_over_a_wide_area():
    assert row(plan(16, **CLUSTER), "ring all-reduce").total_s == pytest.approx(0.2415, abs=1e-9)
    far = plan(16, **WIDE_AREA)
    assert row(far, "one_peer_exponential").round_s == pytest.approx(0.350, abs=1e-9)
    assert row(far, "ring all-reduce").round_s == pytest.approx(1.50, abs=1e-9)
    assert row(far, "halving-doubling all-reduce").round_s == pytest.approx(0.84, abs=1e-9)


@pytest.mark.parametrize(
    ("n", "expected"),
    [(8, "one_peer_exponential"), (25, "base_2"), (64, "one_peer_exponential"), (1000, "base_2")],
)
def test_training_on_equal_data_takes_the_cheapest_exact_schedule(n, expected):
    made = plan(n, **CLUSTER)
    assert made.choice.label == expected
    topology = build(n=n, **made.config())
    assert topology.degree == 1


def test_the_recommended_section_builds_for_machines_of_several_ranks():
    made = plan(48, **CLUSTER, ranks_per_node=8)
    assert made.parties == 6
    assert made.config() == {"name": "base", "k": 1, "hierarchical": {"local": 8}}
    assert build(n=48, **made.config()).machines.n == 6
    # Sharded: each rank carries an eighth of the model.
    assert made.choice.round_s == pytest.approx(50e-6 + 400e6 / 8 / 3.125e9, abs=1e-9)
    assert any("8 ranks per machine" in reason for reason in made.reasons)


@pytest.mark.parametrize(("ranks", "per_node"), [(1, 1), (2, 1), (4, 1), (8, 8), (16, 4)])
def test_few_parties_or_one_machine_use_all_reduce(ranks, per_node):
    made = plan(ranks, **CLUSTER, ranks_per_node=per_node)
    assert not made.choice.is_gossip
    assert made.config() is None
    assert made.reasons[0].startswith("Rule 1")


@pytest.mark.parametrize(("compute_time_s", "k"), [(0.01, 1), (0.3, 2), (0.7, 5), (100.0, 24)])
def test_heterogeneous_data_take_as_many_peers_as_hide_behind_computation(compute_time_s, k):
    made = plan(25, **CLUSTER, heterogeneous=True, compute_time_s=compute_time_s)
    assert made.config() == {"name": "base", "k": k}


def test_an_average_takes_the_least_time_all_reduce_included():
    assert not plan(16, **CLUSTER, goal="average").choice.is_gossip
    slow_start = plan(1000, params=10, latency_s=1e-3, bandwidth=1e9, goal="average")
    assert slow_start.choice.is_gossip
    assert slow_start.choice.total_s == min(method.total_s for method in slow_start.methods)


def test_it_says_plainly_when_all_reduce_is_cheaper():
    said = " ".join(plan(16, **CLUSTER).reasons)
    assert "All-reduce is cheaper for an average: 0.2404 s against 0.5122 s" in said
    assert "1.88 times one round of one_peer_exponential" in said
    assert "at best about half an all-reduce" in said
    dear = plan(25, **CLUSTER, heterogeneous=True, compute_time_s=1.0)
    assert "LESS than one round of base_8" in " ".join(dear.reasons)


def test_it_says_when_gossip_is_cheaper_even_for_an_average():
    said = " ".join(plan(1000, params=10, latency_s=1e-3, bandwidth=1e9).reasons)
    assert "Gossip is cheaper even for an average" in said
    assert "Latency decides here" in said


def test_agreement_per_byte_is_printed_for_every_method():
    made = plan(16, **CLUSTER)
    exponential = row(made, "exponential")
    assert exponential.nats_per_copy == pytest.approx(-log(0.6) / 4, abs=1e-9)
    assert all(method.nats_per_copy > 0 for method in made.methods)


REFUSED = [
    ({"ranks": 0}, "plan.ranks: must be above 0"),
    ({"bandwidth": 0.0}, "plan.bandwidth: must be above 0"),
    ({"params": float("inf")}, "plan.params: must be above 0 and finite"),
    ({"latency_s": -1.0}, "plan.latency, plan.epsilon"),
    ({"epsilon": 1.0}, "need latency >= 0 and 0 < epsilon < 1"),
    ({"ranks_per_node": 3}, "plan.ranks_per_node: 3 does not divide 16 ranks"),
    ({"heterogeneous": True}, "plan.compute_time: heterogeneous data call for"),
    ({"rho_max": 1e-9}, "plan.rho_max: no topology contracts by 1e-09"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_figures_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(TopologyParameterError) as caught:
        plan(**{"ranks": 16, **CLUSTER, **options})
    assert message in str(caught.value)
