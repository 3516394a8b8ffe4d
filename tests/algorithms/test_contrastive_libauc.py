"""SogCLR's and iSogCLR's gradients beside those of the library of their authors."""

import copy

import pytest
import torch
from contrastive_for_tests import build

from gossamer.algorithms.contrastive.contrastive import Contrastive
from gossamer.algorithms.problems import Batch
from gossamer.runtime import Communicator, StackedTransport
from gossamer.runtime.component import validate
from gossamer.runtime.random import Random
from gossamer.topologies import build as build_topology

libauc = pytest.importorskip(
    "libauc.losses.contrastive", reason="pip install --no-deps libauc==2.0.1"
)

BETA, BATCH = 8.0, 6


@pytest.mark.parametrize(
    ("loss", "theirs", "factor"),
    [
        ({"name": "sogclr"}, {}, BETA / 2),
        ({"name": "sogclr", "compat": "official"}, {}, 1.0),
        ({"name": "sogclr", "gamma": 0.3}, {"gamma": 0.3}, BETA / 2),
        ({"name": "isogclr"}, {"enable_isogclr": True}, 0.5),
    ],
    ids=["sogclr", "official", "gamma", "isogclr"],
)
def test_gradients_are_the_librarys_times_a_known_factor(loss, theirs, factor):
    problem = build(n=1, data="digits", examples=2 * BATCH)
    plain = copy.deepcopy(problem.module)
    section = {"batch_size": BATCH, "loss": {"beta": BETA, **loss}}
    oracle = validate(Contrastive, section, "oracle")
    comm = Communicator(build_topology("ring", 1), StackedTransport())
    oracle.setup(comm, problem)
    x = oracle.layout.adopt(problem.module, torch.empty(oracle.layout.d))[None]
    library = libauc.GCLoss_v1(N=2 * BATCH, tau=1 / BETA, device="cpu", **theirs)

    # The library takes gamma = 1 where no example of a batch was seen, so batches come again whole.
    for step, ids in enumerate(torch.arange(2 * BATCH).split(BATCH) * 3):
        inputs = problem.train[ids]
        found = oracle(x, [Batch(inputs, ids)]).grad[0]
        views = [problem.contrast.view(inputs, ids, v, Random(0), step, 0)[0] for v in (0, 1)]
        plain.zero_grad()
        library(*plain(torch.cat(views)).split(BATCH), ids).backward()
        if "enable_isogclr" in theirs:  # its temperatures keep the graphs they came from
            library.learnable_tau = library.learnable_tau.detach()
            library.grad_tau = library.grad_tau.detach()
        for view, parameter in zip(oracle.layout.views(found), plain.parameters(), strict=True):
            expected = factor * parameter.grad
            # float32, and a loss that the library forms as a difference of two large ones.
            torch.testing.assert_close(view, expected, rtol=1e-4, atol=1e-5 * factor)
        comm.step += 1
