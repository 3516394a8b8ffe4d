"""Documents that are read, shuffled and tokenized while a run goes on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from gossamer.algorithms.tasks.corpus import join
from gossamer.algorithms.tasks.language import PaddedDocuments
from gossamer.algorithms.tasks.tokenizers import Tokenizer

__all__ = ["DocumentStream"]

_AT_ONCE = 64
"""Documents that are tokenized together."""


@dataclass
class _Place:
    """Where a rank has got to.

    Attributes:
        examples: those to come, each int64 (tokens,).
        next: the batch they begin with.
        size: examples of a batch.
        batch: the one before.
    """

    examples: Iterator[np.ndarray]
    next: int
    size: int
    batch: tuple[Tensor, ...] = ()


@dataclass
class DocumentStream:
    """Rank i of n learns from documents i, i + n, i + 2n, ... of a shuffled sequence.

    Once all are used the next epoch goes on, in another order. Batch t of a rank is a function of
    (t, its size) alone. Consecutive batches are read on from where the last one ended; any other,
    as after a resume, is found by reading from the start: documents that are not packed are skipped
    unread, packed ones must be tokenized again. Each hosted rank reads the sequence for itself.

    Attributes:
        documents: epoch -> that epoch's documents in their order, the same whenever and wherever
            asked; none is blank.
        tokenizer: makes the tokens.
        context: tokens that a prediction can see, at most.
        packed: windows of context + 1 tokens of texts that follow one another; or a document per
            example, cut or padded, as ``PaddedDocuments``.
        n: number of ranks.
        seed: of the run; what is asked for with another one, to evaluate on, are the documents
            that a rank learns from first.
    """

    sequential: ClassVar[bool] = True

    documents: Callable[[int], Iterable[bytes]]
    tokenizer: Tokenizer
    context: int
    packed: bool
    n: int
    seed: int
    _places: dict[int, _Place] = field(default_factory=dict)
    _first: dict[tuple[int, int], tuple[Tensor, ...]] = field(default_factory=dict)

    def draw(self, seed: int, rank: int, step: int, draw: int, count: int) -> tuple[Tensor, ...]:
        """Return batch ``step`` of ``count`` examples of a rank; see ``Stream``.

        Returns:
            tokens (count, context + 1) where packed; else tokens and labels, (count, context).
        """
        assert draw == 0, "a sequential stream has one draw a step"
        if seed != self.seed:
            if (rank, count) not in self._first:
                examples = islice(self._examples(rank, 0), count)
                self._first[rank, count] = self._stacked(list(examples))
            return self._first[rank, count]
        place = self._places.get(rank)
        if place is not None and (place.next - 1, place.size) == (step, count) and place.batch:
            return place.batch
        if place is None or (place.next, place.size) != (step, count):
            place = _Place(self._examples(rank, step * count), step, count)
            self._places[rank] = place
        place.batch = self._stacked(list(islice(place.examples, count)))
        place.next += 1
        return place.batch

    def _stacked(self, examples: list[np.ndarray]) -> tuple[Tensor, ...]:
        if self.packed:
            return (torch.from_numpy(np.stack(examples)),)
        padded = PaddedDocuments(*join(examples), self.context, self.tokenizer.pad)
        return padded[torch.arange(len(examples))]

    def _examples(self, rank: int, begin: int) -> Iterator[np.ndarray]:
        """Yield a rank's examples from number ``begin`` on."""
        if self.packed:
            return islice(self._windows(rank), begin, None)
        documents = islice(self._documents(rank), begin, None)
        chunks = iter(lambda: list(islice(documents, _AT_ONCE)), [])
        encoded = (self.tokenizer.encode_alone(chunk, self.context) for chunk in chunks)
        return itertools.chain.from_iterable(encoded)

    def _windows(self, rank: int) -> Iterator[np.ndarray]:
        documents, rest = self._documents(rank), np.empty(0, dtype=np.int64)
        while True:
            rest = np.concatenate([rest, *self.tokenizer.encode(list(islice(documents, _AT_ONCE)))])
            begin = 0
            # A window shares its last token with the next one, as of a finite text.
            while begin + self.context < len(rest):
                yield rest[begin : begin + self.context + 1]
                begin += self.context
            rest = rest[begin:]

    def _documents(self, rank: int) -> Iterator[bytes]:
        place = 0
        for epoch in itertools.count():
            before = place
            for document in self.documents(epoch):
                if place % self.n == rank:
                    yield document
                place += 1
            assert place > before, "an epoch without a document never ends"
