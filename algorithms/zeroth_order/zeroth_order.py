"""``zeroth-order``: gradients estimated from two losses each (arXiv:2305.17333, arXiv:2402.11592).

No graph, no activations, no gradient: what is held beyond the parameters is what a forward pass
needs, and scratch for one layer. An estimate is a number for each random direction, which any rank
can make again: with ``all-reduce`` the ranks exchange these numbers alone.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gossamer.algorithms.estimates import Estimate, Metrics, Sink
from gossamer.algorithms.optimizers.sgd import SGD, SignSGD
from gossamer.algorithms.oracles.module_oracle import ModuleOracle
from gossamer.algorithms.oracles.vectorized import Stateless
from gossamer.algorithms.problems import DataPlan, Loss, Problem, RankBatches
from gossamer.algorithms.protocols import Algorithm
from gossamer.algorithms.zeroth_order.blocks import Partition, blocks_of
from gossamer.algorithms.zeroth_order.hybrid import FirstOrderPart, Hybrid
from gossamer.algorithms.zeroth_order.objectives import find_objective
from gossamer.algorithms.zeroth_order.prefix import PrefixCache
from gossamer.algorithms.zeroth_order.probes import Along, Probes
from gossamer.algorithms.zeroth_order.transient import TransientModule
from gossamer.runtime import Communicator, ConfigError, row_dot
from gossamer.runtime import combine as combine_rows
from gossamer.runtime.native import Piece
from gossamer.runtime.perturb import Distribution, Mask, add_, perturb_
from gossamer.runtime.random import derive_key

__all__ = ["ZerothOrder"]

log = logging.getLogger("gossamer")

_CHECKED = 8
"""Examples with which the losses of moved and of written parameters are compared."""
_BLOCK = 2**18


class ZerothOrder(ModuleOracle):
    """A gradient from losses along random directions z: sum_k (g_k / q) z_k.

    ``two-sided``: g = (L(x + eps z) - L(x - eps z)) / (2 eps); ``one-sided``: g = (L(x + eps z) -
    L(x)) / eps; ``forward``: g = <grad L(x), z> by one forward-mode derivative (arXiv:2202.08587),
    without eps, with the memory of a tangent. All at the same x, on the same examples, without
    dropout. E |estimate|^2 is about d / q |grad|^2: rates are that much smaller than backprop's.
    """

    name: Literal["zeroth-order"] = "zeroth-order"
    eps: float = Field(default=1e-3, gt=0)
    """How far along z a loss is taken."""
    queries: int = Field(default=1, ge=1)
    """Directions q per rank and estimate."""
    estimate: Literal["two-sided", "one-sided", "forward"] = "two-sided"
    """Losses behind a g: 2 for each direction; 1, and 1 for all; a derivative."""
    distribution: Literal["normal", "rademacher", "sphere"] = "normal"
    """Of z; ``sphere``: normal, then scaled to the length sqrt(d)."""
    directions: Literal["shared", "own"] = "shared"
    """``shared``: all ranks take the same; ``own``: each its own, n q in all."""
    coefficient: Literal["value", "sign"] = "value"
    """``sign``: g becomes 1 or -1, as in the released code of sign-SGD (arXiv:2402.11592); the
    elementwise sign is the optimizer ``sign-sgd``."""
    sparsity: float = Field(default=0.0, ge=0, le=1)
    """Share of the elements of z that are 0, at random."""
    mask_interval: int = Field(default=1, ge=1)
    """Steps that one random mask serves."""
    pool: int | None = Field(default=None, ge=1)
    """Draw directions from a pool of so many (arXiv:2312.06353); None: always new ones."""
    blocks: Partition = "none"
    """Take losses along the parts of z on ``layer``, ``sublayer`` or ``module`` one by one: 2 q
    losses for each, and less variance. A step with ``all-reduce`` moves each block before the next
    one's losses are taken (Gauss-Seidel), unless ``sweep: jacobi``. Layers before the block run for
    the first of its losses alone."""
    sweep: Literal["gauss-seidel", "jacobi"] = "gauss-seidel"
    """``jacobi``: all blocks at the same x; algorithms that need a whole gradient do so anyway."""
    first_order: tuple[str, ...] = ()
    """Parameters, or modules with all of theirs (``blocks.1``, ``output``), that get their gradient
    by backpropagation instead, which keeps no more than what lies behind them: the last layers."""
    minimize: str = "loss"
    """``loss``; ``f1`` or a score of the task (``accuracy``), which is maximised; or
    ``package.module:function``, (module, inputs) -> a number. None needs a gradient."""
    restore: Literal["auto", "transient", "snapshot"] = "auto"
    """How x comes back to the bit. It is never written: ``transient``: layers compute with moved
    copies of their parameters, one at a time; ``snapshot``: all with a moved copy of the row, which
    is faster for small models. auto: transient for rows of more than 2^18 elements whose loss
    allows it."""

    _transient: TransientModule | None = PrivateAttr(default=None)
    _copy: Tensor = PrivateAttr()
    _seed: int = PrivateAttr(default=0)
    _forwards: int = PrivateAttr(default=0)
    _blocks: list[frozenset[int] | None] = PrivateAttr()
    _part: FirstOrderPart | None = PrivateAttr(default=None)
    _prefix: PrefixCache | None = PrivateAttr(default=None)
    _has_warned: bool = PrivateAttr(default=False)

    def adapt(self, algorithm: Algorithm) -> None:
        """Refuse updates of a part of the row that would move all of it."""
        optimizer = algorithm.optimizer
        in_turn = self.blocks != "none" and self.sweep == "gauss-seidel" and algorithm.sweeps
        if in_turn and (not isinstance(optimizer, SGD | SignSGD) or optimizer.weight_decay):
            raise ConfigError(
                "oracle.sweep: gauss-seidel updates one block after another, and this optimizer "
                "would move the others too; use optimizer: {name: sgd} (or sign-sgd) without "
                "weight_decay, or oracle.sweep: jacobi"
            )

    def setup(self, comm: Communicator, problem: Problem) -> DataPlan:
        """Lay out the module, without dropout, and see how its parameters can be moved.

        Raises:
            ConfigError: there is nothing of the name ``minimize``, or the fields do not fit.
        """
        plan = super().setup(comm, problem)
        problem.module.eval()
        objective = find_objective(self.minimize, problem, "oracle.minimize")
        if self.minimize != "loss" and self.estimate == "forward":
            raise ConfigError(
                "oracle.estimate: forward takes a derivative, which only minimize: loss has; use "
                "two-sided"
            )
        if self.first_order and (self.blocks != "none" or self.minimize != "loss"):
            field = "blocks" if self.blocks != "none" else "minimize"
            raise ConfigError(
                f"oracle.{field}: does not go with first_order, which takes a gradient of the loss "
                "beside one estimate for the other parameters; leave one out"
            )
        if self.pool is not None and self.sparsity:
            raise ConfigError(
                "oracle.sparsity: a pool's directions are those of one step, whose mask would stay "
                "for good; leave out sparsity or pool"
            )
        if self.micro_batch_size is not None and (self.first_order or self.estimate == "forward"):
            field = "first_order" if self.first_order else "estimate: forward"
            raise ConfigError(
                f"oracle.micro_batch_size: {field} takes a derivative on the whole batch; leave "
                "one out"
            )
        if self.pool is not None and self.queries > self.pool:
            raise ConfigError(
                f"oracle.queries: {self.queries} different directions out of a pool of "
                f"{self.pool}; use a larger oracle.pool"
            )
        if self.minimize != "loss" and self.micro_batch_size is not None:
            raise ConfigError(
                "oracle.micro_batch_size: a score of parts says nothing of the whole; leave it out "
                "with minimize"
            )
        self._blocks = blocks_of(self._layout, self.blocks)
        if self.first_order:
            self._part = FirstOrderPart(problem.module, self._layout, self.first_order)
            self._blocks = [self._part.others]
        self._seed = derive_key(comm.seed.value, "zeroth-order")
        self._problem = replace(problem, loss=objective)
        if self.restore == "transient" or (self.restore == "auto" and self._layout.d > _BLOCK):
            self._transient = self._find_transient(problem)
        if self._transient is None:
            self._copy = torch.empty(self._layout.d, dtype=self._layout.dtype, device=comm.device)
        if self.blocks != "none" and self.estimate != "forward":
            self._prefix = self._find_prefix(problem)
        return plan

    def _find_prefix(self, problem: Problem) -> PrefixCache:
        """Return what skips the layers before a block."""
        one_pass = min(_CHECKED, self.micro_batch_size or _CHECKED)
        inputs = tuple(t.to(self._comm.device) for t in problem.examples(one_pass))
        blocks = [block for block in self._blocks if block is not None]
        return PrefixCache(problem.module, self._layout, blocks, partial(self._bound_loss, inputs))

    def _find_transient(self, problem: Problem) -> TransientModule | None:
        """Return what moves the parameters; None where it would miss some."""
        found = TransientModule(problem.module, self._layout)
        inputs = tuple(t.to(self._comm.device) for t in problem.examples(_CHECKED))
        losses = {problem.loss, self._problem.loss}
        if all(found.follows(partial(_value, loss, problem.module, inputs)) for loss in losses):
            return found
        if self.restore == "transient":
            raise ConfigError(
                "oracle.restore: the loss takes parameters past the forward of their layers (a "
                "penalty, or weights of another layer), so transient would miss them; use snapshot"
            )
        log.info("zeroth order: the loss takes parameters past their layers, so rows are copied")
        return None

    @property
    def backpropagates(self) -> bool:
        """No: an evaluation must not take more memory than a step."""
        return False

    @property
    def examples_at_once(self) -> int | None:
        """Those of a loss."""
        return self.micro_batch_size or (None if self.sampling == "full" else self.batch_size)

    @property
    def recipe(self) -> dict[str, Any] | None:
        """What makes its directions; None where they are no new ones of whole rows each step."""
        if self.pool is not None or self.blocks != "none" or self.first_order:
            return None
        return {
            "seed": self._seed,
            "distribution": self._elements,
            "eps": self.eps,
            "sparsity": self.sparsity,
            "mask_interval": self.mask_interval,
            "directions": self.directions,
            "queries": self.queries,
        }

    def __call__(
        self,
        x: Tensor,
        batch: RankBatches,
        *,
        combine: Sequence[tuple[float, Tensor]] | None = None,
        sink: Sink | None = None,
    ) -> Estimate:
        """Return the estimate as rows."""
        estimate = self.deferred(x, batch, combine=combine).dense()
        if sink is not None:
            for s in self._layout.slices:
                sink(slice(s.begin, s.end), estimate.grad[:, s.begin : s.end])
        return estimate

    def deferred(
        self,
        x: Tensor,
        batch: RankBatches,
        *,
        combine: Sequence[tuple[float, Tensor]] | None = None,
    ) -> Estimate:
        """Return the estimate as Probes; the loss is the mean of those that were taken."""
        try:
            return self._estimate(x, batch, self._blocks, self._next_draw(), combine)
        finally:
            self._forget()

    def _forget(self) -> None:
        if self._prefix is not None:
            self._prefix.clear()

    def sweep_over(self, x: Tensor, batch: RankBatches) -> Iterator[Estimate]:
        """Yield an estimate for each block, at x as it is by then."""
        if self.sweep == "jacobi" or self.blocks == "none":
            yield self.deferred(x, batch)
            return
        draw = self._next_draw()
        try:
            for block in self._blocks:
                yield self._estimate(x, batch, [block], draw, None)
        finally:
            self._forget()

    def _estimate(
        self,
        x: Tensor,
        batch: RankBatches,
        blocks: Sequence[frozenset[int] | None],
        draw: int,
        combine: Sequence[tuple[float, Tensor]] | None,
    ) -> Estimate:
        comm, batch = self._comm, self._moved(batch)
        along = [self._directions(rank, draw, blocks) for rank in range(comm.n)]
        points = combine or [(1.0, x)]
        slopes = torch.zeros(comm.local, len(along[0]), dtype=torch.float64)
        losses = torch.zeros(comm.local, dtype=torch.float64)
        for i, (rank, examples) in enumerate(zip(comm.ranks, batch, strict=True)):
            for k, (c, rows) in enumerate(points):
                found, loss = self._slopes(rows[i], i, k, examples.inputs, along[rank])
                slopes[i] += c * found
                losses[i] = loss if rows is x else losses[i]
        if not any(rows is x for _, rows in points):
            losses = self.loss(x, batch)
        per_direction = 2 if self.estimate == "two-sided" else 1
        once = 1 if self.estimate == "one-sided" else 0
        self._forwards += len(points) * (once + per_direction * len(along[0]))
        coefficients = slopes / self.queries
        if self._factors is not None:
            coefficients *= self._factors
        probes = Probes(
            comm, self._layout, self._seed, along, coefficients, self._elements, self._mask
        )
        grad: Probes | Hybrid = probes
        if self._part is not None:
            grad = Hybrid(probes, self._part, self._rows(self._part, points, batch))
        metrics: Metrics = {"slope": slopes.abs().mean(dim=1), "forwards": float(self._forwards)}
        return Estimate(losses, grad, self._weights(batch), metrics=metrics)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the buffers and how many forward passes were made."""
        made = torch.full((self._comm.local,), self._forwards, dtype=torch.int64)
        return {**super().state_dict(), "forwards": made}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take them back."""
        super().load_state_dict(state)
        self._forwards = int(state["forwards"][0])

    # --- inside -----------------------------------------------------------------------------

    @property
    def _elements(self) -> Distribution:
        return "rademacher" if self.distribution == "rademacher" else "normal"

    @property
    def _mask(self) -> Mask | None:
        return Mask(self.sparsity, self.mask_interval) if self.sparsity else None

    def _directions(
        self, rank: int, draw: int, blocks: Sequence[frozenset[int] | None]
    ) -> list[Along]:
        """Return what a rank's ``draw``-th call of a step takes losses along."""
        first, per_call = 0, self.queries
        if self.directions == "own":
            first, per_call = rank * self.queries, self._comm.n * self.queries
        step, numbers = self._comm.step, range(first, first + self.queries)
        if self.pool is None:
            numbers = range(draw * per_call + first, draw * per_call + first + self.queries)
            return [Along(step, k, block) for block in blocks for k in numbers]
        ids = (rank if self.directions == "own" else 0,)
        order = self._comm.seed.stream("zeroth-order/pool", ids, step, draw).permutation(self.pool)
        return [Along(0, k, b) for b in blocks for k in order[0, : self.queries].tolist()]

    def _slopes(
        self, row: Tensor, i: int, k: int, inputs: tuple[Tensor, ...], along: Sequence[Along]
    ) -> tuple[Tensor, float]:
        """Return what multiplies each z in the sum over directions, float64, and the loss.

        The row is that of hosted rank i at point k.
        """
        if self._transient is None:
            self._module_at(self._copy.copy_(row), i)
        else:
            self._module_at(row, i)
        at_x = self._bound_loss(inputs) if self.estimate == "one-sided" else 0.0
        slopes, losses = [], []
        for direction in along:
            length = self._length(direction)  # what losses are taken along is length z
            beside = partial(self._loss_beside, row, (i, k), inputs, direction)
            if self.estimate == "forward":
                slope, loss = self._derivative(row, inputs, direction)
                slope *= length
            else:
                high = beside(self.eps * length)
                if self.estimate == "two-sided":
                    low = beside(-self.eps * length)
                    slope, loss = (high - low) / (2 * self.eps), (high + low) / 2
                else:
                    slope, loss = (high - at_x) / self.eps, at_x
                self._warn_of_zero(slope)
            if self.coefficient == "sign" and math.isfinite(slope):  # others are to be seen
                slope = float((slope > 0) - (slope < 0))
            slopes.append(slope * length)
            losses.append(loss)
        return torch.tensor(slopes, dtype=torch.float64), sum(losses) / len(losses)

    def _loss_beside(
        self,
        row: Tensor,
        place: tuple[int, int],
        inputs: tuple[Tensor, ...],
        along: Along,
        scale: float,
    ) -> float:
        """Return the loss at ``row + scale z``; the row, at ``place``, is kept."""
        z = (self._seed, along.step, along.number, scale, self._elements, self._mask)
        tensors = along.tensors
        with contextlib.ExitStack() as stack:
            if self._prefix is not None and tensors is not None:
                stack.enter_context(self._prefix.before(tensors, place))
            if self._transient is not None:
                stack.enter_context(self._transient.moved(partial(_move, z), tensors))
            else:
                perturb_(self._copy.copy_(row), self._layout, *z, tensors=tensors)
            return self._bound_loss(inputs)

    def _derivative(
        self, row: Tensor, inputs: tuple[Tensor, ...], along: Along
    ) -> tuple[float, float]:
        """Return <grad L, z> and L."""
        layout, problem = self._layout, self._problem
        z = (self._seed, along.step, along.number, 1.0, self._elements, self._mask)
        tangent = perturb_(torch.zeros_like(row), layout, *z, tensors=along.tensors)
        names = [s.name for s in layout.slices]
        values, tangents = (
            dict(zip(names, layout.views(vector), strict=True)) for vector in (row, tangent)
        )

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return problem.loss(Stateless(problem.module, parameters), inputs)

        # The fused kernels of attention have no forward-mode derivative.
        with torch.no_grad(), self._cast(), sdpa_kernel(SDPBackend.MATH):
            value, slope = torch.func.jvp(loss, (values,), (tangents,))[:2]
        return slope.double().item(), value.double().item()

    def _rows(
        self, part: FirstOrderPart, points: Sequence[tuple[float, Tensor]], batch: RankBatches
    ) -> Tensor:
        """Return the gradients of the tensors that losses do not serve, (local, width)."""
        device, loss = self._comm.device, self._problem.loss
        total, one = part.empty(self._comm.local, device), part.empty(1, device)
        for i, examples in enumerate(batch):
            for c, rows in points:
                self._module_at(rows[i], i)
                with self._cast():
                    part.gradient(loss, examples.inputs, one[0])
                total[i] += c * one[0]
        if self._factors is not None:
            combine_rows([(self._factors, total)], out=total)
        return total

    def _length(self, along: Along) -> float:
        """Return what makes z as long as sqrt(d), for ``sphere``; 1 for the others."""
        if self.distribution != "sphere":
            return 1.0
        layout, square = self._layout, 0.0
        for begin in range(0, layout.d, _BLOCK):
            part = torch.zeros(1, min(_BLOCK, layout.d - begin), device=self._comm.device)
            z = (self._seed, along.step, along.number, 1.0)
            perturb_(part[0], layout, *z, begin=begin, tensors=along.tensors)
            square += row_dot(part, part).item()
        chosen = (s for s in layout.slices if along.tensors is None or s.tensor in along.tensors)
        return float((sum(s.shape.numel() for s in chosen) / square) ** 0.5)

    def _warn_of_zero(self, slope: float) -> None:
        if slope == 0.0 and self.minimize == "loss" and not self._has_warned:
            self._has_warned = True
            log.warning(
                "zeroth order: two losses were equal to the bit at step %d, so the estimate is 0: "
                "oracle.eps: %g may be too small for the loss's precision",
                self._comm.step,
                self.eps,
            )


def _move(
    z: tuple[int, int, int, float, Distribution, Mask | None],
    flat: Tensor,
    pieces: list[Piece],
    source: Tensor,
) -> None:
    add_(flat, pieces, *z, source=source)


def _value(loss: Loss, module: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    return loss(module, inputs).double().item()
