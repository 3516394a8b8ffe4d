"""How much a frozen representation tells of the classes: nearest neighbours, a linear classifier.

Both see representations as they are, not normalised, of images without augmentation.
"""

# Shapes: N training and M test examples, F features of a representation.

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from gossamer.algorithms.contrastive.shares import share_of
from gossamer.runtime.collectives import RankGroup
from gossamer.runtime.component import Component, named
from gossamer.runtime.random import Random

__all__ = ["KNN", "Linear", "Probe", "ProbeField", "Represented"]

Count = Annotated[int, Field(ge=1, strict=True)]
_BLOCK = 512


class Represented(NamedTuple):
    """Examples as a probe sees them.

    Attributes:
        features_NF: floating.
        labels_N: int64, classes 0..C-1.
    """

    features_NF: Tensor
    labels_N: Tensor


class Probe(Component, ABC):
    """Learns classes from frozen representations and says how many it tells right."""

    @abstractmethod
    def figures(
        self, comm: RankGroup, train: Represented, test: Represented, random: Random
    ) -> dict[str, float]:
        """Return accuracies on the test examples; every process calls it with the same."""


class KNN(Probe):
    """The vote of the nearest training examples by Euclidean distance; ties: the lowest class."""

    name: Literal["knn"] = "knn"
    k: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 10)
    """How many vote, each giving a figure `knn{k}_accuracy`."""

    def figures(
        self, comm: RankGroup, train: Represented, test: Represented, random: Random
    ) -> dict[str, float]:
        """Return each k's; rank i looks at its part of the test examples."""
        device = train.features_NF.device
        right = torch.zeros(comm.local, len(self.k), dtype=torch.float64, device=device)
        for sums, rank in zip(right, comm.ranks, strict=True):
            own = share_of(len(test.labels_N), comm.n, rank)
            for start in range(own.start, own.stop, _BLOCK):
                part = slice(start, min(start + _BLOCK, own.stop))
                sums += self._count(train, Represented(*(t[part] for t in test)))
        shares = comm.all_reduce(right, count=False)[0] / len(test.labels_N)
        return {f"knn{k}_accuracy": s for k, s in zip(self.k, shares.tolist(), strict=True)}

    def _count(self, train: Represented, test: Represented) -> Tensor:
        """Return how many are right, one number for each k."""
        distances = torch.cdist(test.features_NF.double(), train.features_NF.double())
        most = min(max(self.k), len(train.labels_N))
        nearest = distances.topk(most, largest=False).indices
        votes = F.one_hot(train.labels_N[nearest], int(train.labels_N.max()) + 1).cumsum(dim=1)
        elected = [votes[:, min(k, most) - 1].argmax(dim=1) for k in self.k]
        return torch.stack([(e == test.labels_N).sum() for e in elected]).double()


class Linear(Probe):
    """A linear classifier, trained by SGD with momentum from zero weights: `probe_accuracy`.

    As arXiv:2404.10575 evaluates; its released code starts from random weights.
    """

    name: Literal["linear"] = "linear"
    lr: float = Field(default=1e-3, gt=0)
    """Step size."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of SGD."""
    batch_size: Count = 1024
    """Examples per step."""
    epochs: Count = 100
    """Passes over the training examples, each in an order of its own."""

    def figures(
        self, comm: RankGroup, train: Represented, test: Represented, random: Random
    ) -> dict[str, float]:
        """Return the accuracy; the process of rank 0 trains, the others wait."""
        device = train.features_NF.device
        found = torch.zeros(comm.local, 1, dtype=torch.float64, device=device)
        if 0 in comm.ranks:
            weight_CF, bias_C = self.fit(train, random)
            scores = test.features_NF.float() @ weight_CF.T + bias_C
            found[0] = (scores.argmax(dim=1) == test.labels_N).double().mean()
        return {"probe_accuracy": comm.broadcast(found, count=False).item()}

    def fit(self, train: Represented, random: Random) -> tuple[Tensor, Tensor]:
        """Return the classifier's weight (C, F) and bias (C,), float32."""
        features, labels = train.features_NF.float(), train.labels_N
        classes = int(labels.max()) + 1
        weight, bias = features.new_zeros(classes, features.shape[1]), features.new_zeros(classes)
        parameters = [weight.requires_grad_(), bias.requires_grad_()]
        optimizer = torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum)
        for epoch in range(self.epochs):
            stream = random.stream("contrastive/probe", step=epoch)
            order = stream.permutation(len(labels))[0].to(labels.device)
            for batch in order.split(self.batch_size):
                optimizer.zero_grad()
                with torch.enable_grad():
                    scores = features[batch] @ weight.T + bias
                    F.cross_entropy(scores, labels[batch]).backward()
                optimizer.step()
        return weight.detach(), bias.detach()


_PROBES: dict[str, type[Probe]] = {"knn": KNN, "linear": Linear}

ProbeField = Annotated[
    KNN | Linear,
    named(_PROBES, "task.probes"),
]
"""A probe: its name, or a section with a name and fields."""
