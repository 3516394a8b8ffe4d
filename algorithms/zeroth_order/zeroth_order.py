"""``zeroth-order``: gradients estimated from two losses each (arXiv:2305.17333, arXiv:2402.11592).

No graph, no activations, no gradient: what is held beyond the parameters is what a forward pass
needs, and scratch for one layer. An estimate is a number for each random direction, which any rank
can make again: with ``all-reduce`` the ranks exchange these numbers alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from gossamer.algorithms.estimates import Estimate, Metrics, Sink
from gossamer.algorithms.optimizers.sgd import SGD, SignSGD
from gossamer.algorithms.oracles.module_oracle import ModuleOracle
from gossamer.algorithms.problems import DataPlan, Problem, RankBatches
from gossamer.algorithms.protocols import Algorithm
from gossamer.algorithms.zeroth_order.blocks import Partition, blocks_of
from gossamer.algorithms.zeroth_order.hybrid import FirstOrderPart, Hybrid
from gossamer.algorithms.zeroth_order.losses import Directed, LossesBeside, Restore
from gossamer.algorithms.zeroth_order.objectives import find_objective
from gossamer.algorithms.zeroth_order.probes import Along, Probes
from gossamer.runtime import Communicator, ConfigError
from gossamer.runtime import combine as combine_rows
from gossamer.runtime.perturb import Mask
from gossamer.runtime.random import derive_key

__all__ = ["ZerothOrder"]

log = logging.getLogger("gossamer")


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
    one's losses are taken (Gauss-Seidel), unless ``sweep: jacobi``. Numbered layers before
    the block do not run again for its losses: with ``minimize: loss``, on whole batches, where they
    run one after another."""
    sweep: Literal["gauss-seidel", "jacobi"] = "gauss-seidel"
    """``jacobi``: all blocks at the same x; algorithms that need a whole gradient do so anyway."""
    first_order: tuple[str, ...] = ()
    """Parameters, or modules with all of theirs (``blocks.1``, ``output``), that get their gradient
    by backpropagation instead, which keeps no more than what lies behind them: the last layers."""
    minimize: str = "loss"
    """``loss``; a score of the task (``accuracy``; ``f1`` of generated answers) or ``f1`` of
    classes, which are maximised; or ``package.module:function``, (module, inputs) -> a number. None
    needs a gradient."""
    restore: Restore = "auto"
    """How x comes back to the bit. It is never written: ``transient``: layers compute with moved
    copies of their parameters, one at a time; ``snapshot``: all with a moved copy of the row, which
    is faster for small models. auto: transient for rows of more than 2^18 elements whose loss
    allows it."""

    _directed: Directed = PrivateAttr(default=Directed(0, "normal", None))
    _beside: LossesBeside = PrivateAttr()
    _forwards: int = PrivateAttr(default=0)
    _blocks: list[frozenset[int] | None] = PrivateAttr()
    _part: FirstOrderPart | None = PrivateAttr(default=None)
    _has_warned: bool = PrivateAttr(default=False)

    def adapt(self, algorithm: Algorithm) -> None:
        """Refuse an optimizer that needs a row, or would move all of it in an update of a part."""
        optimizer = algorithm.optimizer
        if optimizer is not None and algorithm.defers:
            optimizer.require_directions()
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
        self._problem = replace(problem, loss=objective)
        self._directed = Directed(
            derive_key(comm.seed.value, "zeroth-order"),
            "rademacher" if self.distribution == "rademacher" else "normal",
            Mask(self.sparsity, self.mask_interval) if self.sparsity else None,
        )
        self._beside = LossesBeside(
            self._problem,
            self._layout,
            self._directed,
            self._bound_loss,
            self.restore,
            further=problem.loss,
        )
        # Other objectives may run the module again on what it gave (a generated answer); parts of a
        # batch are to save the memory of what layers return.
        one_pass = self.minimize == "loss" and self.micro_batch_size is None
        if self.estimate != "forward" and self.blocks != "none" and one_pass:
            blocks = [block for block in self._blocks if block is not None]
            self._beside.skip_before(blocks, self.examples_at_once)
        return plan

    @property
    def backpropagates(self) -> bool:
        """No: an evaluation must not take more memory than a step."""
        return False

    @property
    def keeps_whole(self) -> str:
        """Why it takes no sink: its estimate is numbers, written down a part at a time as it is."""
        return "zeroth-order makes no gradient at all, only numbers that are applied part by part"

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
            "seed": self._directed.seed,
            "distribution": self._directed.elements,
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
        finally:  # an error may have come in between
            self._beside.forget()

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
            self._beside.forget()

    def _estimate(
        self,
        x: Tensor,
        batch: RankBatches,
        blocks: Sequence[frozenset[int] | None],
        draw: int,
        combine: Sequence[tuple[float, Tensor]] | None,
    ) -> Estimate:
        comm, batch = self._comm, self._moved(batch)
        weight = self._weights(batch)
        factors = self._factors(batch, weight)
        along = [self._directions(rank, draw, blocks) for rank in range(comm.n)]
        points = combine or [(1.0, x)]
        slopes = torch.zeros(comm.local, len(along[0]), dtype=torch.float64)
        losses = torch.zeros(comm.local, dtype=torch.float64)
        for i, (rank, examples) in enumerate(zip(comm.ranks, batch, strict=True)):
            if weight[i] == 0 and self._problem.uneven:
                continue  # means over no token are nan
            for k, (c, rows) in enumerate(points):
                found, loss = self._slopes(rows[i], i, k, examples.inputs, along[rank])
                slopes[i] += c * found
                losses[i] = loss if rows is x else losses[i]
                if len(blocks) > 1:  # the sweep is over
                    self._beside.forget()
        if not any(rows is x for _, rows in points):
            losses = self.loss(x, batch)
        per_direction = 2 if self.estimate == "two-sided" else 1
        once = 1 if self.estimate == "one-sided" else 0
        once += self._part is not None
        self._forwards += len(points) * (once + per_direction * len(along[0]))
        coefficients = slopes / self.queries
        if factors is not None:
            coefficients *= factors
        seed, elements, mask = self._directed
        probes = Probes(comm, self._layout, seed, along, coefficients, elements, mask)
        grad: Probes | Hybrid = probes
        if self._part is not None:
            rows = self._rows(self._part, points, batch, weight, factors)
            grad = Hybrid(probes, self._part, rows)
        metrics: Metrics = {"slope": slopes.abs().mean(dim=1), "forwards": float(self._forwards)}
        return Estimate(losses, grad, weight, metrics=metrics)

    def loss(self, x: Tensor, batch: RankBatches) -> Tensor:
        """Return the losses at x, (local,) float64: a forward pass each."""
        self._forwards += 1
        return super().loss(x, batch)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the buffers and how many forward passes were made."""
        made = torch.full((self._comm.local,), self._forwards, dtype=torch.int64)
        return {**super().state_dict(), "forwards": made}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take them back."""
        super().load_state_dict(state)
        self._forwards = int(state["forwards"][0])

    # --- inside -----------------------------------------------------------------------------

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
        self._module_at(self._beside.base(row), i)
        at_x = self._bound_loss(inputs) if self.estimate == "one-sided" else 0.0
        slopes, losses = [], []
        for direction in along:
            # What losses are taken along is length z.
            length = self._beside.length(direction) if self.distribution == "sphere" else 1.0
            beside = partial(self._beside.loss, row, (i, k), inputs, direction)
            if self.estimate == "forward":
                with self._cast():
                    slope, loss = self._beside.derivative(row, inputs, direction)
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

    def _rows(
        self,
        part: FirstOrderPart,
        points: Sequence[tuple[float, Tensor]],
        batch: RankBatches,
        weight: Tensor,
        factors: Tensor | None,
    ) -> Tensor:
        """Return the gradients of the tensors that losses do not serve, (local, width)."""
        device, loss = self._comm.device, self._problem.loss
        total, one = part.empty(self._comm.local, device), part.empty(1, device)
        for i, examples in enumerate(batch):
            if weight[i] == 0 and self._problem.uneven:
                continue
            for c, rows in points:
                self._module_at(rows[i], i)
                with self._cast():
                    part.gradient(loss, examples.inputs, one[0])
                total[i] += c * one[0]
        if factors is not None:
            combine_rows([(factors, total)], out=total)
        return total

    def _warn_of_zero(self, slope: float) -> None:
        if slope == 0.0 and self.minimize == "loss" and not self._has_warned:
            self._has_warned = True
            log.warning(
                "zeroth order: two losses were equal to the bit at step %d, so the estimate is 0: "
                "oracle.eps: %g may be too small for the loss's precision",
                self._comm.step,
                self.eps,
            )
