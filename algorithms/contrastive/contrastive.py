"""``contrastive``: gradients of comparisons between examples, whose embeddings cross ranks.

Every rank embeds two views of its own examples, all embeddings come to every rank (or those of the
neighbours do), each rank weighs and differentiates the terms of its own rows, and gradients of
embeddings go back to who made them: a reduce-scatter. With f_i the mean over rank i's rows, a row
of ``grad`` is the gradient of sum_j f_j along the rank's own parameters: its mean over ranks is
that of the mean of f, and with all-reduce a step is that of one process with the batch of all, to
rounding. Nothing has to be multiplied by the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import ClassVar, Literal, cast

import numpy as np
import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from gossamer.algorithms.contrastive.choice import LossField
from gossamer.algorithms.contrastive.columns import Exchange, exchange
from gossamer.algorithms.contrastive.conditions import (
    local_batch,
    parts_of,
    refuse_shared_statistics,
    require_neighbors,
)
from gossamer.algorithms.contrastive.contrast import Contrast
from gossamer.algorithms.contrastive.emc2 import EMC2
from gossamer.algorithms.contrastive.losses import (
    Keys,
    Rows,
    Setting,
    Visit,
)
from gossamer.algorithms.contrastive.owners import Owners, strided_shards
from gossamer.algorithms.contrastive.passes import Passes
from gossamer.algorithms.contrastive.recall import Encode, Recalls
from gossamer.algorithms.contrastive.terms import differentiated, figures_of
from gossamer.algorithms.estimates import Estimate, Sink
from gossamer.algorithms.oracles.module_oracle import ModuleOracle
from gossamer.algorithms.problems import Batch, DataPlan, Dataset, Problem, RankBatches
from gossamer.runtime import Communicator, combine

__all__ = ["Contrastive"]


class Contrastive(ModuleOracle):
    """Gradients of a contrastive loss over the batch of all ranks."""

    name: Literal["contrastive"] = "contrastive"
    criterion: LossField = Field(default_factory=EMC2, alias="loss")
    """`emc2`, `simclr`, `dcl`, `sogclr`, `isogclr`, `moco`, `negcache`, `full`, or such a section:
    {name: emc2, beta: 14.28, burn_in: 0.5}."""
    negatives: Literal["all", "neighbors"] = "all"
    """With whose embeddings a rank's are compared: those of `all` ranks, or of the `neighbors` it
    hears in round t. Neighbours that never change offer a rank only their own examples; a topology
    whose rounds reach all ranks, such as one_peer_exponential, offers all in turn."""
    shards: int | None = Field(default=None, ge=1)
    """Cut the data into so many fixed shards (example g in shard g mod shards), shuffled one by
    one, of which each rank owns an equal part: then neither a batch nor its chains depend on the
    number of ranks, nor on how the task would split them. A multiple of the ranks, and a divisor of
    the examples of all ranks' batches. None: the task's own split."""

    compares: ClassVar[bool] = True

    _contrast: Contrast = PrivateAttr()
    _shards: Sequence[np.ndarray] = PrivateAttr()
    _owners: Owners = PrivateAttr()
    _exchange: Exchange = PrivateAttr()
    _draws: int = PrivateAttr(default=1)
    _row: Tensor | None = PrivateAttr(default=None)
    _of_rows: Tensor | None = PrivateAttr(default=None)
    """(local, 2b): how often a row counts, where f is a mean over examples of unequal shards."""

    def setup(self, comm: Communicator, problem: Problem) -> DataPlan:
        """Lay out the module, and find out who owns which example."""
        super().setup(comm, problem)
        assert problem.contrast is not None
        self._contrast = problem.contrast
        refuse_shared_statistics(problem.module)
        size = None if self.sampling == "full" else self.batch_size
        shards, parts = problem.shards, 1
        if self.shards is not None:
            parts = parts_of(self.shards, comm.n, size)
            shards = strided_shards(len(cast(Dataset, problem.train)), self.shards)
        self._shards = shards
        self._owners = Owners(shards, parts, len(cast(Dataset, problem.train)))
        batch = local_batch(shards, parts, size)
        if self.negatives == "neighbors":
            require_neighbors(comm, self.criterion)
        self._exchange = exchange(comm, self.negatives)
        one = self._one_embedding()
        self.criterion.setup(
            Setting(
                comm=comm,
                owners=self._owners,
                mode=self._contrast.mode,
                local_batch=batch,
                layout=self._layout,
                dim=one.shape[1],
                dtype=one.dtype,
            )
        )
        if problem.figures is not None and hasattr(problem.figures, "beta"):
            problem.figures.beta = self.criterion.beta
        if self.weighting == "examples":
            self._of_rows = _shares(shards, parts, comm, batch, one)
        return DataPlan(
            batch_size=self.batch_size,
            sampling=self.sampling,
            indices=True,
            shards=shards,
            parts=parts,
        )

    def start(self, steps: int | None, draws: int) -> None:
        """Learn how many batches a step has."""
        self._draws = draws

    def __call__(
        self,
        x: Tensor,
        batch: RankBatches,
        *,
        combine: Sequence[tuple[float, Tensor]] | None = None,
        sink: Sink | None = None,
    ) -> Estimate:
        """Return each rank's row of the gradient; it is reused.

        The loss is the surrogate whose gradient it is. Of ``combine`` every point is estimated with
        the same views and the same numbers from the same states, which move once, as at x.
        """
        draw = self._next_draw()
        if combine is None:
            estimate = self._estimate(x, x, batch, draw, advances=True)
        else:
            estimate = self._combined(x, batch, draw, combine)
        if sink is not None:
            for s in self._layout.slices:
                sink(slice(s.begin, s.end), estimate.grad[:, s.begin : s.end])
            estimate.grad = None
        return estimate

    def loss(self, x: Tensor, batch: RankBatches) -> Tensor:
        """Return the means of (1) over each rank's rows, with the batch's negatives, (local,).

        With the views and masks of the last gradient of this step, or of the first to come.
        """
        step, calls = self._calls
        draw = calls if step == self._comm.step else 0
        passes = self._passes(x, None, draw)
        beta, losses = self.criterion.beta, []
        for rows in self._compared(batch, self._embedded(passes, batch, draw)[0]):
            scores = (beta * rows.cosines).masked_fill(~rows.valid, -torch.inf)
            own = rows.cosines.gather(1, rows.positives[:, None])[:, 0]
            sums = torch.logsumexp(scores, dim=1).masked_fill_(~rows.valid.any(dim=1), 0.0)
            losses.append((sums - beta * own).double().mean().cpu())
        return torch.stack(losses)

    @property
    def remembers(self) -> str | None:
        """What the loss does."""
        return self.criterion.remembers

    def state_dict(self) -> dict[str, Tensor]:
        """Return the buffers, and what the loss remembers of examples."""
        of_loss = {f"loss.{name}": rows for name, rows in self.criterion.state_dict().items()}
        return {**super().state_dict(), **of_loss}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take them back."""
        super().load_state_dict(state)
        mine = {k.removeprefix("loss."): v for k, v in state.items() if k.startswith("loss.")}
        self.criterion.load_state_dict(mine)

    def take_over(self, state: Mapping[str, Tensor]) -> bool:
        """Find each example's state with its former owner; shards that stay tell who that was."""
        theirs = {k.removeprefix("loss."): v for k, v in state.items() if k.startswith("loss.")}
        ranks = {len(table) for table in theirs.values()}
        if self.shards is None or len(ranks) != 1 or self.shards % (n := ranks.pop()):
            return False
        total = len(cast(Dataset, self._problem.train))
        return self.criterion.take_over(Owners(self._shards, self.shards // n, total), theirs)

    # --- one estimate -------------------------------------------------------------------------

    def _estimate(
        self, x: Tensor, point: Tensor, batch: RankBatches, draw: int, *, advances: bool
    ) -> Estimate:
        """Return the gradients at ``point`` (local, d) of a run that stands at x (local, d)."""
        comm, grad = self._comm, self._grad.zero_()
        passes = self._passes(point, grad, draw)
        z, made = self._embedded(passes, batch, draw)
        rows = self._compared(batch, z)
        dim = z.shape[-1]
        recalls = Recalls(comm, self._owners, z, self._encoder(passes), passes.backward)
        visit = Visit(
            x=x,
            rows=rows,
            step=comm.step,
            draw=draw,
            number=comm.step * self._draws + draw,
            advances=advances,
            recall=recalls,
            look=partial(self._look, passes),
            look_at_batch=partial(self._look_at_batch, passes, batch, draw),
        )
        weights = self.criterion.weigh(visit)
        terms = [
            differentiated(r, w, None if self._of_rows is None else self._of_rows[r.place])
            for r, w in zip(rows, weights, strict=True)
        ]
        grads = torch.stack([t.rows for t in terms]).view(z.shape)
        if terms[0].columns is not None:
            of_columns = [t.columns for t in terms if t.columns is not None]
            back = self._exchange.scatter(of_columns, z.shape)
            grads += back
        for one, of_rank in zip(grads.flatten(1, 2), made, strict=True):
            for part, of_pass in zip(one.split(len(one) // len(of_rank)), of_rank, strict=True):
                passes.backward(of_pass, part)
        for number in recalls.open:
            nothing = z.new_zeros(0, dim)  # to a rank that asked for none
            recalls.backward(number, [t.recalled.get(number, nothing) for t in terms])
        return Estimate(
            loss=torch.stack([t.loss for t in terms]),
            grad=grad,
            weight=torch.full((comm.local,), float(z.shape[2]), dtype=torch.float64),
            metrics=figures_of(rows, weights),
        )

    def _combined(
        self,
        x: Tensor,
        batch: RankBatches,
        draw: int,
        points: Sequence[tuple[float, Tensor]],
    ) -> Estimate:
        """Return the combination over ``points``; states move as at x, after all of them."""
        total = torch.zeros_like(self._grad)
        here = None
        ordered = sorted(points, key=lambda p: p[1] is x)
        for k, (c, point) in enumerate(ordered, 1):
            found = self._estimate(x, point, batch, draw, advances=point is x and k == len(ordered))
            combine([(1.0, total), (c, self._grad)], out=total)
            here = found if point is x else here
        if here is None:
            here = self._estimate(x, x, batch, draw, advances=True)
        self._grad.copy_(total)
        return here

    def _embedded(
        self, passes: Passes, batch: RankBatches, draw: int
    ) -> tuple[Tensor, list[list[range]]]:
        """Return embeddings (local, 2, b, dim), and each rank's passes: one, or one per side."""
        z, made = [], []
        for i, each in enumerate(batch):
            found = [passes.embed(i, *part) for part in self._views(each, draw)]
            z.append(torch.cat([embedded for embedded, _ in found]))
            made.append([of_pass for _, of_pass in found])
        rows = torch.stack(z)
        return rows.view(len(z), 2, -1, rows.shape[-1]), made

    def _views(self, batch: Batch, draw: int) -> list[tuple[tuple[Tensor, ...], int]]:
        """Return the encoder's inputs and side: both views at once, or each side of the pairs."""
        assert batch.indices is not None
        random, step = self._comm.seed, self._comm.step
        device = self._comm.device
        inputs = tuple(t.to(device) for t in batch.inputs)
        views = [
            self._contrast.view(inputs, batch.indices, view, random, step, draw) for view in (0, 1)
        ]
        if self._contrast.mode == "pairs":
            return [(views[0], 0), (views[1], 1)]
        return [(tuple(torch.cat(pair) for pair in zip(*views, strict=True)), 0)]

    def _compared(self, batch: RankBatches, z: Tensor) -> list[Rows]:
        """Bring embeddings (local, 2, b, dim) to who compares with them."""
        ids = torch.stack([b.indices for b in batch if b.indices is not None])
        device, found = self._comm.device, []
        for i, columns in enumerate(self._exchange.gather(z, ids.to(device))):
            b, count = ids.shape[1], len(columns.ids)
            valid = (ids[i].to(device)[:, None] != columns.ids).repeat(2, 2)
            if self._contrast.mode == "pairs":
                valid[:b, :count] = valid[b:, count:] = False
            own = torch.arange(columns.own.start, columns.own.stop, device=device)
            found.append(
                Rows(
                    place=i,
                    ids=ids[i],
                    z=z[i].flatten(0, 1),
                    columns=columns,
                    cosines=z[i].flatten(0, 1) @ columns.z.T,
                    valid=valid,
                    positives=torch.cat([own + count, own]),
                )
            )
        return found

    # --- the encoder --------------------------------------------------------------------------

    @property
    def _grad(self) -> Tensor:
        """The row for gradients, (local, d); every process asks for it at the same point."""
        if self._row is None:
            self._row = self._comm.alloc(self._layout.d, self._layout.dtype)
        return self._row

    def _passes(self, x: Tensor, grad: Tensor | None, draw: int) -> Passes:
        """Return the passes of one call at x (local, d); ``grad`` None: none goes back."""

        def module_at(i: int, row: Tensor | None) -> nn.Module:
            mine = None if grad is None or row is not None else grad[i]
            return self._module_at(x[i] if row is None else row, i, mine)

        @contextmanager
        def around(i: int, number: int) -> Iterator[None]:
            self._seed_dropout(self._comm.ranks[i], draw, number)
            with self._cast():
                yield

        return Passes(
            self._contrast,
            module_at,
            around,
            chunk=self.micro_batch_size,
            keeps_graph=grad is not None and self._comm.n == self._comm.transport.processes,
        )

    def _encoder(self, passes: Passes) -> Encode:
        """Return what encodes the examples of some keys, with a gradient to come."""

        def encode(i: int, keys: Keys) -> list[tuple[Tensor, Tensor, range]]:
            groups = []
            for view, places, inputs in self._held(keys):
                z, made = passes.embed(i, inputs, view)
                groups.append((places, z, made))
            return groups

        return encode

    def _look(self, passes: Passes, i: int, keys: Keys) -> Tensor:
        """Return embeddings (k, dim) of the examples of some keys, without a gradient."""
        parts = [(places, passes.look(i, inputs, v)) for v, places, inputs in self._held(keys)]
        z = parts[0][1].new_empty(len(keys), parts[0][1].shape[1])
        for places, part in parts:
            z[places] = part
        return z

    def _look_at_batch(
        self, passes: Passes, batch: RankBatches, draw: int, i: int, row: Tensor
    ) -> Tensor:
        """Return embeddings (2b, dim) of a rank's views by other parameters (d,)."""
        views = self._views(batch[i], draw)
        return torch.cat([passes.look(i, inputs, view, row) for inputs, view in views])

    def _held(self, keys: Keys) -> Iterator[tuple[int, Tensor, tuple[Tensor, ...]]]:
        """Yield, per view, the places among ``keys`` (k,) and the inputs of the encoder."""
        train = cast(Dataset, self._problem.train)
        keys = keys.cpu()
        for view in (0, 1):
            places = (keys % 2 == view).nonzero().flatten()
            if len(places):
                ids = keys[places] // 2
                inputs = tuple(t.to(self._comm.device) for t in train[ids])
                yield view, places.to(self._comm.device), self._contrast.held(inputs, ids, view)

    def _one_embedding(self) -> Tensor:
        """Return an embedding (1, dim), as the module's own parameters make it."""
        key = torch.from_numpy(2 * self._owners.ids[0][:1])
        _, _, inputs = next(self._held(key))
        with torch.no_grad(), self._cast():
            return self._contrast.embed(self._problem.module, inputs, 0)


def _shares(
    shards: Sequence[np.ndarray], parts: int, comm: Communicator, batch: int, like: Tensor
) -> Tensor | None:
    """Return V N_v / N of the shard v of each row, (local, 2b) like ``like``; None: all are 1."""
    sizes = [len(own) for own in shards]
    if len(set(sizes)) == 1:
        return None
    each = torch.tensor(sizes, dtype=torch.float64) * len(sizes) / sum(sizes)
    of_ranks = each.view(comm.n, parts)[comm.ranks.start : comm.ranks.stop]
    return of_ranks.repeat_interleave(batch // parts, dim=1).repeat(1, 2).to(like)
