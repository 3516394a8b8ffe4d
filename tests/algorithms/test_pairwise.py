"""Noise that neighbors share: it cancels in the mean, and what it hides from a single rank."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from private_for_tests import noisy, problem, program, run
from thread_ranks import WireTransport, on_processes

from gossamer.algorithms.decentralized.dnasa import DNASA
from gossamer.algorithms.decentralized.dsgd import DSGD
from gossamer.algorithms.decentralized.gradient_tracking import GradientTracking
from gossamer.algorithms.optimizers.sgd import SGD
from gossamer.algorithms.privacy.accounting import Segment
from gossamer.algorithms.privacy.accounting import spent as epsilon_of
from gossamer.algorithms.privacy.noise import SecretNoise
from gossamer.algorithms.privacy.pairwise import PairwiseNoise, alone_multipliers, partners
from gossamer.algorithms.tasks.bundled import Digits
from gossamer.runtime import Communicator, ConfigError, RowLayout, StackedTransport
from gossamer.runtime.perturb import perturb_
from gossamer.topologies import build

PAIRWISE = {"noise_mode": "pairwise", "pairwise_multiplier": 30.0}
GRAPHS = {
    "ring": {},
    "star": {},
    "complete": {},
    "erdos_renyi": {"p": 0.5, "seed": 1},
    "one_peer_exponential": {},
    "directed_ring": {},
}
LAYOUT = RowLayout(torch.nn.Linear(5, 3))


def own_noise(made, calls):
    """What the ranks' own keys make, in the same dtype: (calls, n, elements)."""
    noise, layout = made.oracle._noise, made.layout
    found = []
    for t in range(calls):
        rows = torch.zeros_like(made.state.x)
        for row, terms in zip(rows, SecretNoise.terms(noise, t, noise.scales(2.0)), strict=True):
            for seed, p in terms:
                perturb_(row, layout, seed, p.step, p.probe, p.coefficient)
        found.append(torch.stack([layout.values(row) for row in rows]))
    return torch.stack(found)


# --- cancellation -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", GRAPHS)
def test_over_all_ranks_only_own_noise_is_left(name, dtype):
    options = {"topology": build(name, 8, **GRAPHS[name]), "dtype": dtype, **PAIRWISE}
    noise, made, _ = noisy(8, 3, **options)
    own = own_noise(made, 3)
    # Rows of size 30 sqrt(degree), rounded once per added normal.
    tolerance = {torch.float32: 2e-4, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(noise.sum(1), own.sum(1), rtol=0, atol=tolerance)
    assert (noise - own).abs().mean() > 10


def test_shared_noise_cancels_in_the_mean_where_shards_differ_in_size():
    task = problem(4, 203)
    task.shards = tuple(np.split(np.arange(203), [20, 80, 150]))
    options = {"task": task, "backprop": {"sampling": "full"}, "dtype": torch.float64}
    noise, made, estimate = noisy(4, 1, **options, **PAIRWISE)
    sizes = torch.tensor([20.0, 60.0, 70.0, 53.0], dtype=torch.float64)[:, None]
    own = own_noise(made, 1)
    torch.testing.assert_close((noise[0] / sizes).mean(0), (own[0] / sizes).mean(0))
    expected = ((2.0 / sizes) ** 2).sum() / 16
    assert estimate.mean_origin.noise_var == pytest.approx(float(expected))


@pytest.mark.parametrize("name", ["ring", "star"])
def test_the_optimizer_knows_the_variance_of_each_row(name):
    noise, _, estimate = noisy(4, 1, width=40_000, topology=build(name, 4), **PAIRWISE)
    degrees = torch.tensor([2, 2, 2, 2] if name == "ring" else [3, 1, 1, 1])
    expected = (4 + 900 * degrees.double()) / 15**2
    known = torch.as_tensor(estimate.origin.noise_var).expand(4, 1).flatten()
    torch.testing.assert_close(known.double(), expected)
    # 480,000 normals a row: a standard error of .2%.
    measured = noise[0].double().var(dim=1) / 15**2
    torch.testing.assert_close(measured, expected, rtol=0.01, atol=0)
    assert estimate.mean_origin.noise_var == pytest.approx(4 / 15**2 / 4)


def test_partners_are_those_who_meet_in_some_round():
    assert partners(build("ring", 5))[0] == (1, 4)
    assert partners(build("directed_ring", 5))[0] == (1, 4)
    assert partners(build("star", 4)) == ((1, 2, 3), (0,), (0,), (0,))
    assert partners(build("one_peer_exponential", 8))[0] == (1, 2, 4, 6, 7)


@pytest.mark.parametrize("algorithm", [DNASA(), GradientTracking(optimizer=SGD(lr=0.1))])
def test_the_mean_model_moves_as_under_local_noise_of_the_same_keys(algorithm):
    """Of gradient tracking, whose mean of trackers is the mean of gradients; of D-NASA's z too."""
    means = []
    for options in (PAIRWISE, {"noise_mode": "local"}):
        made = program(4, algorithm=algorithm, noise_multiplier=1.0, **options)
        made.step()
        tracked = made.state.y if hasattr(made.state, "y") else made.state.z
        means.append(tracked.double().mean(0))
    torch.testing.assert_close(means[0], means[1], rtol=0, atol=1e-5)


# --- keys -------------------------------------------------------------------------------------


class Watched(WireTransport):
    """Keeps what it sends."""

    def exchange(self, sends, receives, operation):
        self.sent = [*getattr(self, "sent", []), *((peer, t.clone()) for peer, t in sends)]
        return super().exchange(sends, receives, operation)


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_a_pairs_key_reaches_its_two_ranks_and_no_other_process(processes):
    def work(wire):
        transport = Watched(wire.wire, wire.process, processes)
        comm = Communicator(build("ring", 8), transport, timeout_s=30)
        noise = PairwiseNoise(comm, 4, 2.0, 1.0, [1.0] * 8)
        noise.agree(LAYOUT)
        rows = torch.zeros(comm.local, LAYOUT.d)
        noise.add_(rows, LAYOUT, 0, [0.0] * comm.local)
        hosts = {rank: comm.placement.owner_of(rank) for rank in range(8)}
        return noise.pair_keys, rows, getattr(transport, "sent", []), hosts

    results, _ = on_processes(processes, work)
    keys = torch.cat([found for found, *_ in results])
    rows = torch.cat([rows for _, rows, *_ in results])
    assert rows.abs().max() > 1
    assert rows.sum(0).abs().max() < 1e-5
    pairs, hosts = partners(build("ring", 8)), results[0][3]
    ends = {}
    for rank, peers in enumerate(pairs):
        for k, peer in enumerate(peers):
            assert int(keys[rank, k]) == int(keys[peer, pairs[peer].index(rank)])
            ends[int(keys[rank, k])] = {hosts[rank], hosts[peer]}
    assert len(ends) == 8
    for process, (_, _, sent, _) in enumerate(results):
        for peer, tensor in sent:
            for value in tensor.flatten().tolist():
                assert value not in ends or {process, peer} <= ends[value]


def test_keys_come_from_the_operating_system_unless_a_seed_is_given():
    comm = Communicator(build("ring", 4), StackedTransport())
    keys = []
    for seed in (None, None, 1, 1):
        noise = PairwiseNoise(comm, seed, 1.0, 1.0, [1.0] * 4)
        noise.agree(LAYOUT)
        keys.append(noise.pair_keys)
    assert not (keys[0] == keys[1]).any()
    assert torch.equal(keys[2], keys[3])


def test_a_resumed_run_repeats_the_undisturbed_one_and_a_branch_shares_new_keys():
    options = {"noise_multiplier": 1.0, "algorithm": DNASA(), **PAIRWISE}
    whole, half = (run(program(4, **options), steps) for steps in (6, 3))
    tensors, scalars = half.snapshot()
    tensors = {k: v.clone() for k, v in tensors.items()}
    resumed = program(4, **{**options, "noise_seed": None})  # other keys, until it is restored
    resumed.restore(tensors, scalars)
    resumed.comm.step = 3
    assert torch.equal(run(resumed, 3).state.x, whole.state.x)
    resumed.oracle.branch()
    pairs = resumed.oracle._noise
    assert not (pairs.pair_keys == tensors["oracle/dp.pair_keys"]).any()
    rows = torch.zeros(4, resumed.layout.d)
    pairs.add_(rows, resumed.layout, 9, [0.0] * 4)
    assert rows.sum(0).abs().max() < 1e-4 < rows.abs().max()


# --- what it hides ----------------------------------------------------------------------------


@st.composite
def graphs(draw):
    """Partners and shares of 2 to 7 ranks, each with a partner."""
    n = draw(st.integers(2, 7))
    edges = {(i, draw(st.integers(0, i - 1))) for i in range(1, n)}
    edges |= {(i, j) for i in range(n) for j in range(i) if draw(st.booleans())}
    pairs = tuple(tuple(sorted({a + b - i for a, b in edges if i in (a, b)})) for i in range(n))
    return pairs, draw(st.lists(st.floats(0.3, 3), min_size=n, max_size=n))


@settings(max_examples=60, deadline=None)
@given(graph=graphs(), own=st.floats(0.3, 3), shared=st.floats(0.1, 30))
def test_what_one_rank_cannot_explain_away_is_the_least_noise_that_makes_an_example(
    graph, own, shared
):
    """The numbers that a rank does not know, of least square sum, that look like one example."""
    pairs, shares = graph
    n = len(pairs)
    edges = [(i, j) for i, peers in enumerate(pairs) for j in peers if i < j]
    expected = np.full(n, np.inf)
    for a in range(n):
        others = [i for i in range(n) if i != a]
        unknown = [edge for edge in edges if a not in edge]
        sources = np.zeros((n, len(others) + len(unknown)))
        sources[others, np.arange(len(others))] = own
        for column, (i, j) in enumerate(unknown, start=len(others)):
            sources[i, column], sources[j, column] = shared * shares[i], -shared * shares[j]
        for i in others:
            example = np.eye(n)[i, others]
            least = np.linalg.lstsq(sources[others], example, rcond=None)[0]
            expected[i] = min(expected[i], 1 / np.linalg.norm(least))
    found = alone_multipliers(pairs, own, shared, shares)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (found >= own * (1 - 1e-9)).all()


def test_on_a_ring_much_shared_noise_hides_a_rank_among_all_but_its_observer():
    pairs = partners(build("ring", 6))
    np.testing.assert_allclose(alone_multipliers(pairs, 2.0, 1e4, [1.0] * 6), 2 * 5**0.5, rtol=1e-4)
    np.testing.assert_allclose(alone_multipliers(pairs, 2.0, 1e-6, [1.0] * 6), 2.0)
    leaves = alone_multipliers(partners(build("star", 5)), 2.0, 1e4, [1.0] * 5)
    np.testing.assert_allclose(leaves[1:], 2.0)  # the hub knows all that a leaf shares


def test_epsilon_counts_own_noise_alone_and_one_rank_learns_less():
    options = {"noise_multiplier": 1.0, "delta": 1e-4, "algorithm": DNASA()}
    local = run(program(4, noise_mode="local", **options), 3).oracle.statement()["privacy"]
    made = run(program(4, **PAIRWISE, **options), 3)
    said = made.oracle.statement()["privacy"]
    assert said["epsilon_if_secret"] == local["epsilon_if_secret"]
    noise = alone_multipliers(partners(build("ring", 4)), 1.0, 30.0, [1.0] * 4)
    expected = epsilon_of([Segment(float(noise[0]), 15 / 60, 3)], 1e-4)
    assert said["epsilon_if_secret_against_one_rank"] == pytest.approx(expected)
    assert expected < said["epsilon_if_secret"]
    assert "colludes with none" in said["trust"]
    assert "epsilon_if_secret_against_one_rank" not in local


def test_the_statement_says_why_what_one_rank_learns_was_not_computed(monkeypatch):
    monkeypatch.setattr("gossamer.algorithms.privacy.pairwise._MOST_RANKS", 3)
    made = run(program(4, noise_multiplier=1.0, algorithm=DNASA(), **PAIRWISE), 1)
    said = made.oracle.statement()["privacy"]["epsilon_if_secret_against_one_rank"]
    assert said.startswith("not computed: ")
    assert "n = 4 ranks (up to 3 are done); at most epsilon" in said


def test_each_rank_has_its_epsilon_where_shards_differ(monkeypatch):
    task = problem(4, 203)
    task.shards = tuple(np.split(np.arange(203), [60, 120, 160]))
    options = {"noise_multiplier": 1.0, "delta": 1e-4, "task": task, "algorithm": DNASA()}
    options["accountant"] = "rdp"
    made = run(program(4, backprop={"batch_size": 10}, **options), 3)
    counted = []

    def count(segments, delta, accountant):
        counted.append(segments)
        return epsilon_of(segments, delta, accountant)

    monkeypatch.setattr("gossamer.algorithms.privacy.accounting.spent", count)
    said = made.oracle.statement()["privacy"]
    each = said["epsilon_if_secret_per_rank"]
    assert each == [epsilon_of([Segment(1.0, 10 / n, 3)], 1e-4, "rdp") for n in (60, 60, 40, 43)]
    assert said["epsilon_if_secret"] == max(each) == each[2]
    assert len(counted) == 3  # once for each distinct rate


def digits_accuracy(graph, seed, **options):
    """After 80 steps of DSGD on 8 ranks."""
    task = Digits(model="mlp", hidden=(16,)).build(8, seed)
    options = {"accountant": "rdp", "steps": 80, "topology": build(graph, 8), **options}
    algorithm = options.pop("algorithm", None) or DSGD(optimizer=SGD(lr=0.5))
    backprop = {"batch_size": 45}
    made = program(8, task=task, backprop=backprop, seed=seed, algorithm=algorithm, **options)
    return run(made, 80).evaluate()["accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_where_all_share_noise_one_rank_learns_as_little_from_half_the_own_noise(seed):
    """On a complete graph one average takes all shared noise out; on a ring little is gained."""
    sigma, own, shared = 10.31, 5.156, 5.156  # epsilon .5 by itself, and against one rank
    pairs = partners(build("complete", 8))
    assert alone_multipliers(pairs, own, shared, [1.0] * 8).min() >= sigma
    local = digits_accuracy("complete", seed, noise_multiplier=sigma, noise_mode="local")
    options = {**PAIRWISE, "pairwise_multiplier": shared, "noise_multiplier": own}
    assert digits_accuracy("complete", seed, **options) > local + 0.04


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "options", "message"),
    [
        (4, {"noise_mode": "pairwise"}, "pairwise and pairwise_multiplier go together"),
        (4, {"pairwise_multiplier": 1.0}, "pairwise and pairwise_multiplier go together"),
        (4, {**PAIRWISE, "pairwise_multiplier": 0}, r"oracle\.pairwise_multiplier: must be"),
        (1, PAIRWISE, r"oracle\.noise_mode: pairwise needs neighbors, and rank 0 of 1 has none"),
        (4, {**PAIRWISE, "clip": "adaptive"}, "adaptive counts over all ranks"),
    ],
)
def test_pairwise_noise_that_cannot_be_had_is_refused(n, options, message):
    with pytest.raises(ConfigError, match=message):
        program(n, noise_multiplier=1.0, **options)


def test_another_graph_is_refused_on_a_resume():
    options = {"noise_multiplier": 1.0, "algorithm": DNASA(), **PAIRWISE}
    state = run(program(8, **options), 1).oracle.state_dict()
    other = program(8, topology=build("torus", 8), **options)
    with pytest.raises(ConfigError, match=r"others: pairs .* topology"):
        other.oracle.load_state_dict(state)
