"""Names and parameters: what is wrong is answered with field, value, rule and fix."""

import inspect

import pytest

from gossamer.topologies import (
    TopologyConnectivityError,
    TopologyError,
    TopologyParameterError,
    TopologySizeError,
    build,
    factories,
    names,
)

REFUSED = [
    ("hypercube", 6, {}, "topology.ranks: hypercube needs a power of two, got 6; use 4 or 8, or "
     "'exponential'"),
    ("one_peer_hypercube", 12, {}, "needs a power of two, got 12; use 8 or 16, or 'base'"),
    ("paley", 15, {}, "paley needs a prime n with n = 1 mod 4, got 15; use 13, or"),
    ("margulis", 10, {}, "margulis needs a square number, got 10; use 9 or 16"),
    ("grid", 12, {"rows": 5}, "needs rows * cols = ranks, got 5 * 2 for 12 ranks; use 3 and 4"),
    ("torus", 12, {"rows": 3, "cols": 3}, "got 3 * 3 for 12 ranks"),
    ("star", 5, {"center": 5}, "must be a rank, 0..4, got 5; use 0"),
    ("tree", 5, {"branching": 0}, "must be 1 or more, got 0"),
    ("de_bruijn", 5, {"degree": 1}, "needs 2 or more, got 1"),
    ("random_regular", 9, {"degree": 3}, "ranks * degree even, got degree 3 for 9 ranks; use 4"),
    ("random_regular", 4, {"degree": 4}, "1 <= degree < ranks"),
    ("random_regular", 8, {"trials": 0}, "topology.trials: must be 1 or more, got 0"),
    ("small_world", 8, {"k": 8}, "needs 2 <= k < ranks=8, got 8; use 4"),
    ("small_world", 8, {"p": 1.5}, "a probability in 0..1, got 1.5"),
    ("erdos_renyi", 8, {"p": -0.1}, "a probability in 0..1, got -0.1"),
    ("base", 5, {"k": 0}, "base needs 1 <= k < ranks=5, got 0; use 1"),
    ("base", 5, {"k": 5}, "base needs 1 <= k < ranks=5, got 5; use 4"),
    ("hyper_hypercube", 10, {"k": 2}, "needs k >= 4 (prime factor 5 of 10)"),
    ("one_peer_exponential", 5, {"p": 5}, "needs 1 <= p < ranks=5, got 5"),
    ("p_peer_exponential", 5, {"p": 0}, "needs 1 <= p < ranks=5, got 0"),
    ("equi_static", 8, {"m": 0}, "topology.m: must be 1 or more, got 0"),
    ("equi_static", 8, {"eps": 0.0}, "need eps > 0"),
    ("equi_dyn", 8, {"eta": 0.0}, "must be in (0, 1], got 0.0; use 0.5"),
    ("equi_dyn", 8, {"basis": [8]}, "needs shifts in 1..7"),
    ("equi_dyn", 8, {"basis": [2, 4]}, "share the divisor 2, so some ranks never meet"),
    ("random_matching", 8, {"seed": -1}, "must be in 0..2^64-1, got -1"),
    ("random_edge", 8, {"graph": "rign"}, "topology.graph: must be 'ring' or 'path'"),
    ("directed_ring", 8, {"direction": "up"}, "must be 'from_prev' or 'from_next', got 'up'"),
    ("rign", 8, {}, "topology.name: unknown 'rign'; did you mean 'ring'"),
    ("zzz", 8, {}, "known are ring, directed_ring"),
    ("base", 8, {"kk": 2}, "topology.kk: not a parameter of base; did you mean 'k'"),
    ("ring", 8, {"k": 2}, "topology.k: not a parameter of ring; it takes none"),
    ("base", 8, {"k": "two"}, "topology.k: must be a whole number, got 'two'"),
    ("base", 8, {"k": True}, "topology.k: must be a whole number, got True"),
    ("base", 8, {"simple": 1}, "topology.simple: must be true or false, got 1"),
    ("erdos_renyi", 8, {"p": float("nan")}, "topology.p: must be a number or null, got nan"),
    ("circulant", 8, {}, "topology.offsets: 'circulant' needs a list of whole numbers"),
    ("circulant", 8, {"offsets": [1, "a"]}, "must be a list of whole numbers"),
    ("ring", 8, {"check": "lax"}, "topology.check: must be 'strict' or 'off', got 'lax'"),
    ("ring", 8, {"weights": "mtropolis"}, "did you mean 'metropolis'"),
    ("ring", 8, {"hierarchical": {"local": 3}}, "3 ranks per machine do not divide 8 ranks"),
    ("ring", 8, {"hierarchical": {"local": 0}}, "must be a whole number, 1 or more, got 0"),
    ("ring", 8, {"hierarchical": {"local": "auto"}}, "filled in by a launcher"),
    ("ring", 8, {"hierarchical": {"lokal": 2}}, "must be {local: RANKS_PER_MACHINE}"),
    ("ring", 8, {"hierarchical": 2}, "must be {local: RANKS_PER_MACHINE}"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "n", "params", "message"), REFUSED)
def test_a_wrong_parameter_is_answered_with_field_value_and_fix(name, n, params, message):
    with pytest.raises(TopologyError) as caught:
        build(name, n, **params)
    assert type(caught.value) is TopologyParameterError
    assert message in str(caught.value)
    assert str(caught.value).startswith("topology.")


@pytest.mark.parametrize("n", [0, -3, 2.0, "8", True, None])
def test_the_number_of_ranks_is_a_positive_whole_number(n):
    with pytest.raises(TopologySizeError, match=r"topology\.ranks: must be a whole number"):
        build("ring", n)


def test_offsets_that_leave_ranks_apart_are_refused_with_the_components():
    with pytest.raises(TopologyConnectivityError, match=r"\{0, 2, 4\}, \{1, 3, 5\}"):
        build("circulant", 6, offsets=[2])


def test_hyphens_and_case_do_not_matter_in_names():
    assert build("One-Peer-Exponential", 8).digest() == build("one_peer_exponential", 8).digest()


def test_a_seed_without_randomness_is_said_to_be_unused(caplog):
    build("base", 6, seed=4)
    assert "topology.seed: nothing in 'base' is random" in caplog.text


def test_the_yaml_example_of_the_specification_builds():
    topology = build(
        "base", 8, k=1, weights="metropolis", seed=0, hierarchical={"local": 2}, check="strict"
    )
    assert (topology.n, topology.machines.n, topology.local) == (8, 4, 2)


def test_setting_the_same_graph_again_with_other_flags_takes_effect():
    variants = [{}, {"lazy": True}, {"weights": "best_constant"}, {"hierarchical": {"local": 2}}]
    assert len({build("ring", 8, **options).digest() for options in variants}) == 4


@pytest.mark.parametrize("name", names())
def test_factories_can_be_described_to_a_schema(name):
    signature = inspect.signature(factories[name])
    first, *others = signature.parameters.values()
    assert first.name == "n"
    assert all(parameter.annotation is not parameter.empty for parameter in others)
    documented = inspect.getdoc(factories[name])
    assert all(f"{parameter.name}:" in documented for parameter in others)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", [name for name in names() if name != "custom"])
def test_one_two_and_three_ranks_work_or_are_refused_by_the_graphs_own_rule(name, n):
    params = {"offsets": [1]} if name == "circulant" else {}
    if n == 3 and name in ("hypercube", "one_peer_hypercube", "paley", "margulis"):
        with pytest.raises(TopologyParameterError, match="got 3; use"):
            build(name, n, **params)
    else:
        topology = build(name, n, **params)
        assert topology.is_doubly_stochastic
        assert topology.n == topology.round(5).n == n


@pytest.mark.parametrize("n", [243, 244, 250, 1000])
@pytest.mark.parametrize("name", ["ring", "torus", "exponential", "base", "equi_dyn", "tree"])
def test_awkward_sizes_build(name, n):
    assert build(name, n).is_doubly_stochastic
