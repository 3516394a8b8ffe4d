"""D-NASA: decentralized normalized averaged stochastic approximation (arXiv:2402.08821).

Minimises a smooth nonconvex f over a gossip network with step sizes that use n, the step and (in
constant mode) the horizon only: no Lipschitz constant, noise level, heterogeneity or spectral gap.
It is invariant to the scale of the loss, not to the scale of the parameters, nor to ``c``.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from gossamer.algorithms.estimates import Metrics
from gossamer.algorithms.problems import Batches
from gossamer.algorithms.protocols import Algorithm, Oracle
from gossamer.algorithms.schedules import horizon
from gossamer.runtime import Communicator, combine, row_norm

__all__ = ["DNASA"]

log = logging.getLogger("gossamer")

# The official network code differs from the theory in four choices.
_OFFICIAL_NN = {"a": 0.3, "clip": False, "norm": "layer", "eps": 2.2e-16}


@dataclass
class DNASAState:
    """The exchanged row [x | z] or [x | z | u], and what stays local.

    Attributes:
        row: (local, 2 d) or, when tracking, (local, 3 d): one message.
        d: length of one part.
        v_prev: (local, d), the last gradient, when tracking.
        optimizer: state of the optimizer, when one makes the local step.
    """

    row: Tensor
    d: int
    v_prev: Tensor | None
    optimizer: Any

    @property
    def x(self) -> Tensor:
        """The parameters, a view."""
        return self.row[:, : self.d]

    @property
    def z(self) -> Tensor:
        """The gossiped moving average of gradients, a view."""
        return self.row[:, self.d : 2 * self.d]

    @property
    def u(self) -> Tensor:
        """The tracked gradient, a view; only when tracking."""
        return self.row[:, 2 * self.d :]


class DNASA(Algorithm):
    """Normalized averaged stochastic approximation over a graph (arXiv:2402.08821).

    With z_i = 0 at the start, step k on rank i is, in the letters of the paper::

        x_i <- sum_j w_ij (x_j - gamma_k z_j / ||z_j||)
        z_i <- sum_j w_ij ((1 - alpha_k) z_j + alpha_k v_j),   v_j a stochastic gradient of f_j

    W must be doubly stochastic. A step is never longer than gamma_k, whatever the smoothness and
    the noise; the way is at most sum gamma_k ~ 4 c (n T)^(1/4), so a far minimum needs a long run.
    The first step moves nothing, as z = 0. n counts replicas that gossip. The direction is
    normalised after the exchange: normalised local gradients would be biased.

    Differences from the authors' code: it gossips a tracked gradient that it never uses, a third
    of its traffic; ``tracking: gt`` uses it (our own reading), ``none`` leaves it out. An
    ``optimizer``, when given, gets gamma u in place of a gradient.
    """

    optional_optimizer: ClassVar[bool] = True
    sends: ClassVar[str] = (
        "its parameters and its moving average of gradients (with tracking: gt, its "
        "tracked gradient too)"
    )
    name: Literal["d-nasa"] = "d-nasa"
    preset: Literal["theory", "official_nn"] = "theory"
    """``official_nn``: a 0.3, no clipping, norms per layer, as the authors' network code."""
    a: float = Field(default=1.0, gt=0)
    """Base of the averaging weight alpha."""
    c: float = Field(default=1.0, gt=0)
    """Base of the step length gamma; 1 is 'untuned'."""
    schedule: Literal["diminishing", "constant"] = "diminishing"
    """alpha ~ sqrt(n / k), gamma ~ n^(1/4) / k^(3/4) with k the step, or the horizon."""
    clip: bool = True
    """Keep alpha (and a diminishing gamma) at most 1."""
    norm: Literal["global", "layer"] = "global"
    """Normalise the whole row, or each parameter tensor by itself."""
    grad_point: Literal["old", "half", "new"] = "old"
    """Where the gradient is taken: before the step, after it, or after the average."""
    rounds: int = Field(default=1, ge=1)
    """How many times the same W is applied in a step."""
    eps: float = Field(default=1e-30, ge=0)
    """A direction no longer than this is zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    """L2 penalty added to the gradient."""
    l1: float = Field(default=0.0, ge=0)
    """Weight of an l1 term, handled by soft thresholding after the step."""
    tracking: Literal["none", "gt"] = "none"
    """``gt``: average tracked gradients; 3 d per message."""

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") == "official_nn":
            return {**_OFFICIAL_NN, **values}
        return values

    def init(self, comm: Communicator, oracle: Oracle, x: Tensor, batches: Batches) -> DNASAState:
        """Start at x with z = 0 (and u = v_prev = 0)."""
        if x.element_size() < 4:
            log.warning(
                "d-nasa on rows of %s: late steps are below their resolution and vanish; keep the "
                "parameters in float32 (oracle: {autocast: bfloat16} computes in bfloat16)",
                x.dtype,
            )
        d, gt = x.shape[1], self.tracking == "gt"
        row = comm.alloc((3 if gt else 2) * d, x.dtype)
        row[:, :d] = x
        return DNASAState(
            row=row,
            d=d,
            v_prev=torch.zeros_like(x) if gt else None,
            optimizer=self.optimizer.init(row[:, :d]) if self.optimizer else None,
        )

    def step(
        self, comm: Communicator, oracle: Oracle, state: DNASAState, batches: Batches
    ) -> Metrics:
        """One gradient; one exchange of [x | z], or x and z apart for ``half`` and ``new``."""
        alpha, gamma = self._rates(comm)
        x, tail = state.x, state.row[:, state.d :]  # the tail is [z] or [z | u]
        if self.grad_point == "old":
            estimate = oracle(x, batches[0])
            v = self._decayed(estimate.grad, x)
            self._move_(comm, oracle, state, x, gamma)
            self._average_(state, v, alpha)
            comm.neighbor_average(state.row, out=state.row, rounds=self.rounds)
        elif self.grad_point == "half":
            x_half = x.clone()
            self._move_(comm, oracle, state, x_half, gamma)
            mixing = comm.neighbor_average_async(x_half, out=x, rounds=self.rounds)
            estimate = oracle(x_half, batches[0])  # while x_half travels
            self._average_(state, self._decayed(estimate.grad, x_half), alpha)
            mixing.wait()
            comm.neighbor_average(tail, out=tail, rounds=self.rounds)
        else:
            self._move_(comm, oracle, state, x, gamma)
            comm.neighbor_average(x, out=x, rounds=self.rounds)
            estimate = oracle(x, batches[0])
            self._average_(state, self._decayed(estimate.grad, x), alpha)
            comm.neighbor_average(tail, out=tail, rounds=self.rounds)
        return {"loss": estimate.loss, "alpha": alpha, "gamma": gamma, **estimate.metrics}

    def _rates(self, comm: Communicator) -> tuple[float, float]:
        """Return alpha_k and gamma_k; square roots only, which round the same everywhere."""
        constant = self.schedule == "constant"
        k = horizon(comm, "algorithm.schedule: constant") if constant else comm.step + 1
        alpha = self.a * math.sqrt(comm.n / k)
        gamma = self.c * math.sqrt(math.sqrt(comm.n)) / (math.sqrt(k) * math.sqrt(math.sqrt(k)))
        if not self.clip:
            return alpha, gamma
        return min(1.0, alpha), gamma if constant else min(1.0, gamma)

    def _decayed(self, grad: Tensor, x: Tensor) -> Tensor:
        return combine([(1.0, grad), (self.weight_decay, x)]) if self.weight_decay else grad

    def _move_(
        self, comm: Communicator, oracle: Oracle, state: DNASAState, x: Tensor, gamma: float
    ) -> None:
        """``x -= gamma * z / ||z||``, or hand gamma z / ||z|| to the optimizer as a gradient."""
        parts = [slice(0, state.d)]
        if self.norm == "layer":
            parts = [slice(s.begin, s.end) for s in oracle.layout.slices]
        moved, sign = (x, -1.0) if self.optimizer is None else (torch.zeros_like(x), 1.0)
        for part in parts:
            z = state.z[:, part]
            length = row_norm(z)
            scale = torch.where(length > self.eps, sign * gamma / length, 0.0)
            combine([(1.0, moved[:, part]), (scale, z)], out=moved[:, part])
        if self.optimizer is not None:
            self.optimizer.update_(state.optimizer, x, moved, comm)
        if self.l1:
            x.sub_(x.clamp(-gamma * self.l1, gamma * self.l1))

    def _average_(self, state: DNASAState, v: Tensor, alpha: float) -> None:
        """``z = (1 - alpha) z + alpha v``, with the tracked gradient u in place of v for ``gt``."""
        if state.v_prev is not None:
            combine([(1.0, state.u), (1.0, v), (-1.0, state.v_prev)], out=state.u)
            state.v_prev.copy_(v)
            v = state.u
        combine([(1.0 - alpha, state.z), (alpha, v)], out=state.z)
