"""Noise shared by neighbors, under mpirun: it cancels over ranks of several processes."""

import pytest
import torch

from gossamer.algorithms.privacy.pairwise import PairwiseNoise
from gossamer.runtime import Communicator, RowLayout, open_transport
from gossamer.topologies import build

pytestmark = pytest.mark.mpi

LAYOUT = RowLayout(torch.nn.Linear(40, 3, dtype=torch.float64))


@pytest.fixture(scope="module", params=["mpi", "native"])
def transport(request):
    """One transport for all tests."""
    opened = open_transport(request.param, timeout_s=60)
    yield opened
    opened.close()


@pytest.mark.parametrize("graph", ["ring", "star", "erdos_renyi", "one_peer_exponential"])
def test_only_own_noise_is_left_in_the_sum_over_processes(transport, graph):
    comm = Communicator(build(graph, 8), transport, timeout_s=60)
    noise = PairwiseNoise(comm, None, 20.0, 1.0, [1.0] * 8)  # keys of the operating system
    noise.agree(LAYOUT)
    rows = torch.zeros(comm.local, LAYOUT.d, dtype=torch.float64)
    for release in range(2):
        noise.add_(rows, LAYOUT, release, [0.0] * comm.local)
    assert rows.abs().max() > 20
    assert comm.all_reduce(rows).abs().max() < 1e-10
