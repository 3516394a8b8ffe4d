"""Contrastive losses: who repels whom, and how strongly.

Every loss of this family is a choice of weights w, without a gradient, in

    l_i = (s / 2b) sum_r [ sum_k w_rk <z_r, z_k> - <z_r, z_r+> ]        (arXiv:2404.10575)

over the 2b rows of rank i, r+ the row's positive, whose gradient is an estimate of that of

    L = E_r [ -beta <z_r, z_r+> + log sum_{k in D(r)} exp(beta <z_r, z_k>) ]               (1)

with D(r) the rows of all other examples. ``l_i`` is a surrogate: its value is not that of L.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from gossamer.algorithms.contrastive.columns import Columns
from gossamer.algorithms.contrastive.contrast import ViewMode
from gossamer.algorithms.contrastive.owners import Owners
from gossamer.runtime import Communicator, RowLayout
from gossamer.runtime.component import Component

__all__ = ["ContrastiveLoss", "Keys", "Others", "Rows", "Setting", "Visit", "Weights"]

Keys = Tensor
"""int64: 2 id + view of an embedding; of ``infinite`` views, whose held examples are encoded as
they are, view is 0."""


@dataclass(frozen=True)
class Rows:
    """One hosted rank's part of a visit.

    Attributes:
        place: the rank among the hosted ones.
        ids: int64 (b,), on the CPU.
        z: (2b, dim), view 0 of all, then view 1.
        columns: what they are compared with.
        cosines: (2b, 2B), <z_r, z_k>.
        valid: bool (2b, 2B), which columns are negatives of a row.
        positives: int64 (2b,), the column of each row's positive.
    """

    place: int
    ids: Tensor
    z: Tensor
    columns: Columns
    cosines: Tensor
    valid: Tensor
    positives: Tensor

    @cached_property
    def negatives(self) -> Tensor:
        """How many each row has, int64 (2b,)."""
        return self.valid.sum(dim=1)


@dataclass
class Others:
    """Embeddings beyond a batch that repel, or attract, rows.

    Attributes:
        z: (k, dim).
        weights: (2b, k).
        recalled: which of the visit's recalls made ``z``, whose owners then get its gradient; None:
            they are constants.
    """

    z: Tensor
    weights: Tensor
    recalled: int | None = None


@dataclass
class Weights:
    """What a loss says of one rank's rows.

    Attributes:
        columns: (2b, 2B) w; None: no column repels.
        scale: s.
        attracts: (2b,) or a number, what the positive's term is multiplied by.
        others: further embeddings.
        figures: of this rank, for the log.
    """

    columns: Tensor | None
    scale: float
    attracts: Tensor | float = 1.0
    others: list[Others] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """Where a loss works.

    Attributes:
        comm: the ranks.
        owners: of the examples.
        mode: of the views.
        local_batch: examples of a rank and step.
        layout: of the parameters.
        dim: of an embedding.
        dtype: of embeddings, float32 or float64.
    """

    comm: Communicator
    owners: Owners
    mode: ViewMode
    local_batch: int
    layout: RowLayout
    dim: int
    dtype: torch.dtype

    @property
    def per_example(self) -> int:
        """How many states a method keeps of an example: views that change share one."""
        return 1 if self.mode == "infinite" else 2

    def slots(self, rows: Rows) -> Tensor:
        """Return int64 (2b,): where a table of (examples * per_example) keeps each row's state."""
        first = (self.owners.places(rows.ids) * self.per_example).to(self.comm.device)
        return torch.cat([first, first + (self.per_example - 1)])

    def table(self, fill: float, dtype: torch.dtype | None = None, width: int = 1) -> Tensor:
        """Return a table (local, examples * per_example * width) of the owners, full of ``fill``.

        Of ``dtype``, or where that is None of the embeddings'.
        """
        shape = (self.comm.local, self.owners.most * self.per_example * width)
        return torch.full(shape, fill, dtype=dtype or self.dtype, device=self.comm.device)


@dataclass(frozen=True)
class Visit:
    """One batch of every rank, embedded and compared.

    Attributes:
        x: (local, d), the run's parameters, also where those of another point made the rows.
        rows: of the hosted ranks.
        step: of the run.
        draw: of the call within the step.
        number: of the batch in the run, from 0.
        advances: whether states move; False for another point on the same examples.
        recall: (per hosted rank the keys (k_i,), any k_i; whether a gradient is to come) -> the
            number of this call, and their embeddings (k_i, dim), encoded anew by their owners;
            every process calls it alike.
        look: (hosted place, keys of its own examples) -> their embeddings now, (k, dim).
        look_at_batch: (hosted place, parameters (d,)) -> embeddings (2b, dim) of its rows with
            these parameters.
    """

    x: Tensor
    rows: Sequence[Rows]
    step: int
    draw: int
    number: int
    advances: bool
    recall: Callable[[Sequence[Keys], bool], tuple[int, list[Tensor]]]
    look: Callable[[int, Keys], Tensor]
    look_at_batch: Callable[[int, Tensor], Tensor]


class ContrastiveLoss(Component, ABC):
    """Chooses the weights, and keeps what it needs of former visits."""

    remembers: ClassVar[str | None] = None
    """What is kept of former visits, in the plural."""
    beyond_columns: ClassVar[bool] = False
    """Whether its negatives are of all ranks, whichever columns a rank hears."""

    name: str = ""
    beta: float = Field(default=14.28, gt=0)
    """Inverse temperature; 14.28 is 1 / 0.07."""

    _setting: Setting = PrivateAttr()

    def setup(self, setting: Setting) -> None:
        """Get ready, before the first visit; every process calls it.

        Raises:
            ConfigError: the task or the batches are not such as the loss needs.
        """
        self._setting = setting

    @abstractmethod
    def weigh(self, visit: Visit) -> list[Weights]:
        """Return the weights of each hosted rank's rows; every process calls it alike."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return what is kept of former visits, each (local, m): the tables themselves."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take it back."""
        for name, table in self.state_dict().items():
            table.copy_(state[name])

    def take_over(self, before: Owners, state: Mapping[str, Tensor]) -> bool:
        """Take the states of examples that ranks of another number owned, if they are such.

        Args:
            before: who owned which example.
            state: theirs, each (ranks before, m).

        Returns:
            Whether they are: states of examples, as many of each as here.
        """
        owners, mine = self._setting.owners, self.state_dict()
        each = {name: table.shape[1] / owners.most for name, table in mine.items()}
        if each != {name: table.shape[1] / before.most for name, table in state.items()}:
            return False
        for name, table in mine.items():
            rows = state[name].view(len(before.ids), before.most, -1)
            for row, rank in zip(table, self._setting.comm.ranks, strict=True):
                ids = torch.from_numpy(owners.ids[rank])
                found = rows[before.of(ids), before.places(ids)]
                row.view(owners.most, -1)[: len(ids)] = found.to(row.device)
        return True


def last_of_each(ids: Tensor) -> Tensor:
    """Return the places in ids (b,) where each value stands for the last time, ascending."""
    _, from_the_end = np.unique(ids.numpy()[::-1], return_index=True)
    return torch.from_numpy(np.sort(len(ids) - 1 - from_the_end))
