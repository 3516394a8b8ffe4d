"""The decentralized algorithms of this folder's tests, each beside its slow reference.

The oracle gives exact local gradients plus the noise of the batch, elementwise, in any dtype.
"""

import math
from functools import partial

import decentralized_reference as ref
import numpy as np
import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from gossamer.algorithms.decentralized.all_reduce import AllReduce
from gossamer.algorithms.decentralized.d2 import D2, EDM
from gossamer.algorithms.decentralized.decentlam import DecentLaM
from gossamer.algorithms.decentralized.dnasa import DNASA
from gossamer.algorithms.decentralized.dnasa_baselines import DASAGT, OfficialDSGD, OfficialDSGT
from gossamer.algorithms.decentralized.dsgd import DSGD
from gossamer.algorithms.decentralized.extra import Extra
from gossamer.algorithms.decentralized.gradient_tracking import GradientTracking
from gossamer.algorithms.decentralized.kgt import KGT
from gossamer.algorithms.decentralized.momentum_tracking import MomentumTracking
from gossamer.algorithms.decentralized.mt_dsgt import MTDSGT
from gossamer.algorithms.decentralized.quasi_global import QGAdam, QGDSGDm
from gossamer.algorithms.estimates import Estimate
from gossamer.algorithms.optimizers.sgd import SGD, Momentum
from gossamer.algorithms.problems import Batch, DataPlan
from gossamer.algorithms.protocols import Oracle
from gossamer.runtime import Communicator, RowLayout, StackedTransport

SIZES = (8, 5)  # two tensors; the second is padded to 8 elements of float64
D, MAX_STEPS, MAX_DRAWS, MAX_RANKS = 16, 40, 4, 16
MASK = np.arange(D) < 13
_rng = np.random.default_rng(7)
CURVATURE = _rng.uniform(0.3, 1.5, (MAX_RANKS, D)) * MASK
CENTER = 2 * _rng.normal(size=(MAX_RANKS, D)) * MASK
NOISE = _rng.normal(size=(MAX_STEPS, MAX_DRAWS, MAX_RANKS, D)) * MASK
X0 = _rng.normal(size=D) * MASK


class Bowls(Oracle):
    """f_i(x) = sum_j a_ij (x_j - b_ij)^2 / 2 + 0.05 x_j^2 / (1 + x_j^2), plus the batch's noise."""

    first_rank: int = 0
    scale: float = 1.0
    _grad: Tensor | None = PrivateAttr(default=None)

    @property
    def layout(self):
        module = nn.Module()
        module.a, module.b = (nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in SIZES)
        return RowLayout(module)

    def setup(self, comm, problem):
        return DataPlan(batch_size=1)

    def __call__(self, x, batch, *, combine=None, sink=None):
        ranks = slice(self.first_rank, self.first_rank + len(x))
        a, b = (torch.from_numpy(v[ranks]).to(x.dtype) for v in (CURVATURE, CENTER))
        noise = torch.stack([examples.inputs[0] for examples in batch]).to(x.dtype)
        bump = 1 + x * x
        grad = (a * (x - b) + 0.1 * x / (bump * bump) + noise) * self.scale
        self._grad = grad if self._grad is None else self._grad.copy_(grad)  # reused, as backprop's
        return Estimate(torch.zeros(len(x)), self._grad, torch.ones(len(x)))

    def loss(self, x, batch):
        return torch.zeros(len(x))


def batches(comm, draws, noise):
    """The samples of this step: draws x hosted ranks."""
    step = noise * NOISE[comm.step % MAX_STEPS] if noise else np.zeros((MAX_DRAWS, MAX_RANKS, D))
    return [
        [Batch((torch.from_numpy(step[j % MAX_DRAWS, r]),)) for r in comm.ranks]
        for j in range(draws)
    ]


def start(algorithm, topology, *, transport=None, steps=20, noise=0.3, x0=X0, dtype=torch.float64):
    """Return (comm, state) before the first step."""
    comm = Communicator(topology, transport or StackedTransport(), steps=steps)
    x = comm.alloc(D, dtype)
    x[:] = torch.from_numpy(x0)
    return comm, algorithm.init(comm, oracle_of(comm), x, batches(comm, 1, noise))


def oracle_of(comm, scale=1.0):
    return Bowls(first_rank=comm.ranks.start, scale=scale)


def advance(algorithm, comm, state, count, *, noise=0.3, scale=1.0):
    """Make ``count`` steps as the loop does; return the rows after each."""
    oracle, rows = oracle_of(comm, scale), []
    for _ in range(count):
        draws = batches(comm, algorithm.batches_per_step, noise)
        algorithm.step(comm, oracle, state, draws)
        comm.step += 1
        comm.round += algorithm.rounds_per_step
        rows.append(state.x.clone())
    return rows


def run(algorithm, topology, count=20, *, noise=0.3, scale=1.0, **options):
    comm, state = start(algorithm, topology, steps=count, noise=noise, **options)
    return advance(algorithm, comm, state, count, noise=noise, scale=scale), state


def gradients(n, noise=0.3, scale=1.0):
    def G(X, k, draw=0):
        g = CURVATURE[:n] * (X - CENTER[:n]) + 0.1 * X / (1 + X * X) ** 2
        return scale * (g + noise * NOISE[k % MAX_STEPS, draw % MAX_DRAWS, :n])

    return G


def rate(lr=0.05, schedule="constant"):
    """The same rates for both sides: an SGD, and k -> eta_k."""
    return SGD(
        lr=lr, schedule=schedule
    ), lambda k: lr / math.sqrt(k + 1 if schedule == "sqrt" else 1)


SGD05, ETA = rate(0.05)
FALLING, ETA_FALLING = rate(0.2, "sqrt")

DNASA_CASES = {
    "old": ({}, {}),
    "half": ({"grad_point": "half"}, {"point": "half"}),
    "new": ({"grad_point": "new"}, {"point": "new"}),
    "constant": ({"schedule": "constant"}, {"constant": True}),
    "official": ({"preset": "official_nn"}, {"a": 0.3, "clip": False, "layer": True}),
    "layer": ({"norm": "layer", "a": 0.7, "c": 0.5}, {"layer": True, "a": 0.7, "c": 0.5}),
    "rounds": ({"rounds": 3}, {"rounds": 3}),
    "l1": ({"l1": 0.5, "weight_decay": 0.1}, {"l1": 0.5, "wd": 0.1}),
    "gt": ({"tracking": "gt"}, {"gt": True}),
    "gt-half": ({"tracking": "gt", "grad_point": "half", "rounds": 2},
                {"gt": True, "point": "half", "rounds": 2}),
    "gt-new-l1": ({"tracking": "gt", "grad_point": "new", "l1": 0.3, "clip": False},
                  {"gt": True, "point": "new", "l1": 0.3, "clip": False}),
}  # fmt: skip
MOMENTUM = Momentum(lr=0.05, beta=0.8)
NESTEROV = Momentum(lr=0.05, beta=0.8, nesterov=True)

CASES = {  # name -> (algorithm, reference)
    "all-reduce": (AllReduce(optimizer=FALLING), partial(ref.all_reduce, eta=ETA_FALLING)),
    "dsgd": (DSGD(optimizer=FALLING), partial(ref.dsgd, eta=ETA_FALLING)),
    "dsgd-cta": (DSGD(optimizer=SGD05, order="cta"), partial(ref.dsgd, eta=ETA, cta=True)),
    "dmsgd": (DSGD(optimizer=MOMENTUM), partial(ref.dsgd, eta=ETA, beta=0.8)),
    "dsgdm-n": (DSGD(optimizer=NESTEROV), partial(ref.dsgd, eta=ETA, beta=0.8, nesterov=True)),
    "mixed-momentum": (DSGD(optimizer=MOMENTUM, order="cta", mix_momentum=True),
                       partial(ref.dsgd, eta=ETA, beta=0.8, cta=True, mixed=True)),
    "gradient-tracking": (GradientTracking(optimizer=FALLING),
                          partial(ref.gradient_tracking, eta=ETA_FALLING)),
    "gradient-tracking-cta": (GradientTracking(optimizer=SGD05, order="cta"),
                              partial(ref.gradient_tracking, eta=ETA, cta=True)),
    "dsgtm": (GradientTracking(optimizer=MOMENTUM),
              partial(ref.gradient_tracking, eta=ETA, beta=0.8)),
    "qg-dsgdm": (QGDSGDm(optimizer=FALLING, mu=0.7),
                 partial(ref.quasi_global, eta=ETA_FALLING, mu=0.7)),
    "qg-dsgdm-n": (QGDSGDm(optimizer=SGD05, nesterov=True),
                   partial(ref.quasi_global, eta=ETA, nesterov=True)),
    "qg-adam": (QGAdam(optimizer=SGD05), partial(ref.qg_adam, eta=ETA)),
    "decentlam": (DecentLaM(optimizer=FALLING), partial(ref.decentlam, eta=ETA_FALLING)),
    "momentum-tracking": (MomentumTracking(optimizer=SGD05),
                          partial(ref.momentum_tracking, eta=ETA)),
    "d2": (D2(optimizer=FALLING, lazy="always"), partial(ref.d2, eta=ETA_FALLING)),
    "d2-never": (D2(optimizer=SGD05, lazy="never"), partial(ref.d2, eta=ETA, lazy=False)),
    "edm": (EDM(optimizer=SGD05), partial(ref.edm, eta=ETA)),
    "extra": (Extra(optimizer=FALLING), partial(ref.extra, eta=ETA_FALLING)),
    "k-gt": (KGT(optimizer=SGD05, local_steps=3), partial(ref.kgt, eta=ETA)),
    "k-gt-outer": (KGT(optimizer=SGD05, local_steps=2, outer_lr=0.7),
                   partial(ref.kgt, eta=ETA, K=2, outer=0.7)),
    "mt-dsgt": (MTDSGT(optimizer=SGD05, rounds=3), partial(ref.mt_dsgt, eta=ETA)),
    "mt-dsgt-plain": (MTDSGT(optimizer=SGD05, rounds=2, chebyshev=False),
                      partial(ref.mt_dsgt, eta=ETA, rounds=2, chebyshev=False)),
    "official-dsgd": (OfficialDSGD(optimizer=FALLING),
                      partial(ref.official, eta=ETA_FALLING, tracks=False)),
    "official-dsgt": (OfficialDSGT(optimizer=FALLING),
                      partial(ref.official, eta=ETA_FALLING, tracks=True)),
    "synthetic-dsgd": (OfficialDSGD(optimizer=FALLING, form="synthetic"),
                       partial(ref.official, eta=ETA_FALLING, tracks=False, synthetic=True)),
    "synthetic-dsgt": (OfficialDSGT(optimizer=FALLING, form="synthetic"),
                       partial(ref.official, eta=ETA_FALLING, tracks=True, synthetic=True)),
    "d-asagt": (DASAGT(optimizer=SGD05), partial(ref.d_asagt, eta=ETA)),
    "synthetic-d-asagt": (DASAGT(optimizer=FALLING, form="synthetic", schedule="constant"),
                          partial(ref.d_asagt, eta=ETA_FALLING, synthetic=True, constant=True)),
    **{f"d-nasa-{name}": (DNASA(**options), partial(ref.dnasa, **arguments))
       for name, (options, arguments) in DNASA_CASES.items()},
}  # fmt: skip
ANY_SCHEDULE = [n for n in CASES if not n.startswith(("d2", "edm", "extra", "mt-dsgt"))]
