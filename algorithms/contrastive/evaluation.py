"""How good embeddings are: the exact loss, whether they collapsed, what they tell of classes."""

# Shapes: N examples, 2 views, D elements of an embedding, F features of a representation.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gossamer.algorithms.contrastive.contrast import Contrast
from gossamer.algorithms.contrastive.global_loss import GlobalLoss
from gossamer.algorithms.contrastive.probes import Probe, Represented
from gossamer.algorithms.contrastive.shares import in_shares, share_of
from gossamer.algorithms.problems import Dataset
from gossamer.runtime.collectives import RankGroup
from gossamer.runtime.random import Random
from gossamer.runtime.rows import RowLayout, empty_rows, row_norm

__all__ = ["ContrastFigures", "EvaluatedViews", "Labelled", "Probing"]

_CHUNK = 256
"""Examples of a forward pass."""
_COLLAPSED_COSINE = 0.99
_COLLAPSED_LOSS = 0.02


class EvaluatedViews(Contrast, Protocol):
    """Views that can be evaluated, too."""

    def evaluated(self, inputs: tuple[Tensor, ...], ids: Tensor, view: int) -> tuple[Tensor, ...]:
        """Return view 0 or 1 of some examples, the same ones at each call."""
        ...

    def plain(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return what the encoder takes for examples without augmentation."""
        ...

    def represent(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return the representation (B, F), which comes before the projector."""
        ...


class Labelled(NamedTuple):
    """Examples whose classes are known.

    Attributes:
        dataset: gives the examples.
        places: int64 (N,), those looked at.
        labels: int64 (N,), theirs.
    """

    dataset: Dataset
    places: Tensor
    labels: Tensor


class Probing(NamedTuple):
    """Probes, and the labelled examples they learn from and are tested on."""

    probes: Sequence[Probe]
    train: Labelled
    test: Labelled


@dataclass
class ContrastFigures:
    """The figures of an evaluation, all at the mean row.

    Attributes:
        module: the encoder.
        views: of the examples.
        dataset: the training examples.
        places: int64 (N,), those whose exact loss is computed, each against all others of them.
        random: the run's.
        probing: what is probed; None: nothing.
        beta: inverse temperature of the loss; an oracle that trains with one sets it in ``setup``.
    """

    module: nn.Module
    views: EvaluatedViews
    dataset: Dataset
    places: Tensor
    random: Random
    probing: Probing | None = None
    beta: float = 14.28

    def __call__(
        self, comm: RankGroup, layout: RowLayout, rows: Tensor, mean: Tensor
    ) -> dict[str, float]:
        """Return the figures; every process calls it, and rank i does its part of the examples.

        - ``loss``, ``grad_norm``: L of ``GlobalLoss`` and |grad L|.
        - ``collapsed_loss``: log m, which is L where all embeddings are equal.
        - ``retrieval_accuracy``: the share of rows that are nearer to their positive than to any
          negative; where views are sides of pairs, both directions' mean recall at 1.
        - ``pairwise_cosine``: the mean over all rows and their negatives.
        - ``collapse``: 1 where that is over 0.99, or L within 0.02 of log m; else 0.
        - what the probes find.

        Args:
            comm: how ranks talk.
            layout: of a row.
            rows: (local, d), of which nothing is asked.
            mean: (1, d).
        """
        layout.bind(self.module, mean[0])
        loss, count = GlobalLoss(self.beta, self.views.mode == "pairs"), len(self.places)
        with torch.no_grad():
            embedded = in_shares(comm, count, lambda part: torch.cat(self._rows(part), dim=1))
            z_2ND = embedded.view(count, 2, -1).transpose(0, 1).contiguous()
            found = in_shares(comm, count, lambda part: loss.negatives(z_2ND, part).flatten(0, 1).T)
            log_sums_2N, highest_2N = (found[:, k::2].T.contiguous() for k in (0, 1))
            value, cosine = loss.value(z_2ND, log_sums_2N), loss.pairwise_cosine(z_2ND)
        collapsed = loss.collapsed(count)
        near = abs(value - collapsed) < _COLLAPSED_LOSS
        figures = {
            "loss": value,
            "grad_norm": self._grad_norm(comm, layout, mean, loss, z_2ND, log_sums_2N),
            "collapsed_loss": collapsed,
            "retrieval_accuracy": loss.first(z_2ND, highest_2N),
            "pairwise_cosine": cosine,
            "collapse": float(near or cosine > _COLLAPSED_COSINE),
        }
        return figures | self._probed(comm, layout, mean)

    def _grad_norm(
        self,
        comm: RankGroup,
        layout: RowLayout,
        mean: Tensor,
        loss: GlobalLoss,
        z_2ND: Tensor,
        log_sums_2N: Tensor,
    ) -> float:
        """Return |grad L|: dL/dz in closed form, then back through the encoder once more."""
        grads = empty_rows(comm.local, layout.d, layout.dtype, mean.device)
        for rank, grad in zip(comm.ranks, grads, strict=True):
            own = share_of(len(self.places), comm.n, rank)
            if not own:
                continue
            layout.bind(self.module, mean[0], grad)
            toward_2kD = loss.gradient(z_2ND, log_sums_2N, own)
            for start in range(0, len(own), _CHUNK):
                chunk = own[start : start + _CHUNK]
                for view in (0, 1):
                    with torch.enable_grad():
                        rows = self._embed(chunk, view)
                        toward = toward_2kD[view, start : start + _CHUNK]
                        rows.backward(toward.to(rows))
        return float(row_norm(comm.all_reduce(grads, count=False)))

    def _rows(self, part: range) -> tuple[Tensor, Tensor]:
        """Return both views' embeddings of a part of ``places``, (k, D) each."""
        chunks = [part[start : start + _CHUNK] for start in range(0, len(part), _CHUNK)]
        first, second = (torch.cat([self._embed(c, view) for c in chunks]) for view in (0, 1))
        return first, second

    def _embed(self, part: range, view: int) -> Tensor:
        ids = self.places[part.start : part.stop]
        inputs = self._look_up(self.dataset, ids)
        return self.views.embed(self.module, self.views.evaluated(inputs, ids, view), view)

    def _probed(self, comm: RankGroup, layout: RowLayout, mean: Tensor) -> dict[str, float]:
        if self.probing is None:
            return {}
        layout.bind(self.module, mean[0])
        with torch.no_grad():
            train, test = (self._represented(comm, e) for e in self.probing[1:])
        found: dict[str, float] = {}
        for probe in self.probing.probes:
            found |= probe.figures(comm, train, test, self.random)
        return found

    def _represented(self, comm: RankGroup, examples: Labelled) -> Represented:
        def rows(part: range) -> Tensor:
            chunks = examples.places[part.start : part.stop].split(_CHUNK)
            inputs = [self.views.plain(self._look_up(examples.dataset, c)) for c in chunks]
            return torch.cat([self.views.represent(self.module, i).flatten(1) for i in inputs])

        features = in_shares(comm, len(examples.places), rows)
        return Represented(features, examples.labels.to(features.device))

    def _look_up(self, dataset: Dataset, places: Tensor) -> tuple[Tensor, ...]:
        parameter: Any = next(self.module.parameters())
        return tuple(t.to(parameter.device) for t in dataset[places])
