"""Candidates scored by a language model: their tokens, the scores, and what training minimises.

The score of a candidate is the mean log-probability of its own tokens (arXiv:2402.11592).
"""

# Shapes: N or B examples, C candidates at most, T tokens, K tokens of a candidate at most,
# V vocabulary.

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.algorithms.tasks.templates import Prompt

__all__ = [
    "CandidateEncoder",
    "Candidates",
    "OwnCandidates",
    "Scores",
    "count_any_right",
    "gold_loss",
]

_IGNORED = -100
"""The target where a candidate is shorter than others: torch's own default."""


@dataclass(frozen=True)
class Candidates:
    """Examples as token sequences, one for each candidate.

    A lookup is cut to the longest sequence and the longest candidate in it, so that a batch costs
    what its own examples need.

    Attributes:
        tokens: int64 (N, C, T), padded at the right.
        lengths: int64 (N, C), of the sequences; 0 where an example has fewer candidates.
        places: int64 (N, C, K), whose logits predict the candidate's tokens.
        targets: int64 (N, C, K), these tokens; -100 beyond the candidate's end.
        labels: int64 (N,), the right candidate.
    """

    pads_lookups: ClassVar[bool] = True
    tokens: Tensor
    lengths: Tensor
    places: Tensor
    targets: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, ...]:
        """Return tokens (B, C, T), their mask (1: no padding), places, targets and labels."""
        lengths, targets = self.lengths[indices], self.targets[indices]
        longest = int(lengths.max()) if len(indices) else 1
        most = int((targets != _IGNORED).sum(dim=-1).max()) if len(indices) else 1
        mask = (torch.arange(longest) < lengths[..., None]).long()
        tokens, places = self.tokens[indices, :, :longest], self.places[indices, :, :most]
        return tokens, mask, places, targets[..., :most], self.labels[indices]


class CandidateEncoder:
    """Turns prompts into tokens."""

    def __init__(self, tokenizer: Any, context: int, masked: bool, room: int = 0) -> None:
        """Prepare.

        Args:
            tokenizer: of the model.
            context: longest sequence; longer ones lose tokens of their text at the left, and at
                the right where the candidate stands further left.
            masked: for a masked language model: the candidate's tokens are hidden, and predicted
                at their own places; else each is predicted from what comes before.
            room: tokens of the context that are the candidate's, however short it is.
        """
        self._tokenizer, self._context, self._masked = tokenizer, context, masked
        self._room = room
        inner = tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = tokenizer("a")["input_ids"]
        at = next(k for k in range(len(whole)) if whole[k : k + len(inner)] == inner)
        self._head, self._tail = whole[:at], whole[at + len(inner) :]

    def encode(self, examples: Sequence[Sequence[Prompt]], labels: Sequence[int]) -> Candidates:
        """Return the examples' tokens.

        Args:
            examples: N times up to C prompts.
            labels: which candidate is right.

        Raises:
            ValueError: a candidate has no token, none before it to predict it from, or more tokens
                than ``context`` has room for; says which.
        """
        count = max(len(prompts) for prompts in examples)
        absent: tuple[list[int], list[int], list[int]] = ([], [], [])
        found = []
        for prompts in examples:
            found += [self._one(prompt) for prompt in prompts]
            found += [absent] * (count - len(prompts))
        longest = max(len(tokens) for tokens, _, _ in found)
        most = max(len(places) for _, places, _ in found)
        pad = self._tokenizer.pad_token_id

        def table(rows: Sequence[list[int]], width: int, fill: int) -> Tensor:
            padded = [row + [fill] * (width - len(row)) for row in rows]
            return torch.tensor(padded).view(-1, count, width)

        return Candidates(
            tokens=table([tokens for tokens, _, _ in found], longest, pad),
            lengths=torch.tensor([len(tokens) for tokens, _, _ in found]).view(-1, count),
            places=table([places for _, places, _ in found], most, 0),
            targets=table([targets for _, _, targets in found], most, _IGNORED),
            labels=torch.tensor(labels),
        )

    def encode_starts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return what is to be gone on with: int64 tokens (N, T), and their lengths (N,).

        Each is what ``encode`` puts before a candidate of at most ``room`` tokens, unless one of
        them spans the border: the tokenizer's own, and the text without spaces at its end.

        Raises:
            ValueError: the room takes the whole context.
        """
        most = self._context - len(self._head) - len(self._tail) - self._room
        if most < 1:
            raise ValueError(f"{self._room} tokens for an answer leave none for the text before it")
        found = [self._head + self._ids(text.rstrip(" "))[-most:] for text in texts]
        lengths, pad = torch.tensor([len(ids) for ids in found]), self._tokenizer.pad_token_id
        longest = int(lengths.max())
        return torch.tensor([ids + [pad] * (longest - len(ids)) for ids in found]), lengths

    def _one(self, prompt: Prompt) -> tuple[list[int], list[int], list[int]]:
        """Return the sequence, the places that predict the candidate, and its tokens."""
        before, option, after = self._parts(prompt)
        free = self._context - len(self._head) - len(self._tail)
        room = free - max(len(option), self._room)
        if not option:
            raise ValueError(f"candidate {prompt.option!r} has no tokens")
        if room < 1:
            raise ValueError(f"candidate {prompt.option!r} has {len(option)} tokens")
        before = before[max(0, len(before) + min(len(after), room // 2) - room) :]
        after = after[: room - len(before)]
        begin = len(self._head) + len(before)
        if begin == 0 and not self._masked:
            raise ValueError(f"no token stands before candidate {prompt.option!r}")
        shown = [self._tokenizer.mask_token_id] * len(option) if self._masked else option
        first = begin if self._masked else begin - 1
        tokens = [*self._head, *before, *shown, *after, *self._tail]
        return tokens, list(range(first, first + len(option))), option

    def _parts(self, prompt: Prompt) -> tuple[list[int], list[int], list[int]]:
        """Return the tokens before, of and after the candidate.

        A space before the candidate is of its first token, and a token that spans the border is
        the candidate's.
        """
        start = prompt.before.rstrip(" ")
        without, with_option = self._ids(start), self._ids(prompt.before + prompt.option)
        begin = _common(without, with_option)
        if not prompt.after:
            return with_option[:begin], with_option[begin:], []
        whole = self._ids("".join(prompt))
        end = _common(with_option, whole)
        return whole[:begin], whole[begin:end], whole[end:]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many first elements are equal."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return sum(1 for _ in pairs)


class Scores(nn.Module):
    """A language model of ``transformers`` as a function from candidates to their scores."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens_BCT: Tensor, mask_BCT: Tensor, places_BCK: Tensor, targets_BCK: Tensor
    ) -> Tensor:
        """Return the scores (B, C), float32; the arguments are as of a lookup in Candidates."""
        output = self.model(
            input_ids=tokens_BCT.flatten(0, 1), attention_mask=mask_BCT.flatten(0, 1)
        )
        places = places_BCK.flatten(0, 1)[..., None]
        logits = output.logits.gather(1, places.expand(-1, -1, output.logits.shape[-1]))
        # float32: a loss near 0.7 in half precision has steps of 5e-4 or more.
        losses = F.cross_entropy(
            logits.float().flatten(0, 1),
            targets_BCK.flatten(),
            ignore_index=_IGNORED,
            reduction="none",
        ).view(targets_BCK.shape)
        return -losses.sum(dim=-1) / (targets_BCK != _IGNORED).sum(dim=-1)


@dataclass(frozen=True)
class OwnCandidates:
    """Examples each of which has its own candidates, several of them right.

    Attributes:
        candidates: their tokens; the label is the first right one.
        right: bool (N, C).
    """

    pads_lookups: ClassVar[bool] = True
    candidates: Candidates
    right: Tensor

    @property
    def labels(self) -> Tensor:
        """The first right candidates, int64 (N,)."""
        return self.candidates.labels

    def __len__(self) -> int:
        return len(self.candidates)

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, ...]:
        """Return what a lookup in ``candidates`` gives, and which are right (B, C)."""
        return (*self.candidates[indices], self.right[indices])


def count_any_right(module: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Return ``{"accuracy": of how many examples the likeliest candidate is a right one}``.

    Args:
        module: candidates -> scores (B, C), as Scores.
        inputs: as of a lookup in OwnCandidates.
    """
    tokens, mask, places, targets, _, right = inputs
    count = torch.zeros((), dtype=torch.float64)
    # One by one: examples of a hundred candidates would hold the logits of all of them.
    for k, there in enumerate(mask.any(dim=-1)):
        own = (t[k, there, None] for t in (tokens, mask, places, targets))
        count += right[k, module(*own).argmax()].item()
    return {"accuracy": count}


def gold_loss(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Return the mean over examples of the right candidate's mean negative log-likelihood, ().

    The others are not computed. Examples count alike; arXiv:2305.17333's code counts tokens alike.

    Args:
        module: candidates -> scores (B, C), as Scores.
        inputs: begin as of a lookup in Candidates.
    """
    *features, labels = inputs[:5]
    right = [t.take_along_dim(labels[:, None, None], dim=1) for t in features]
    scores: Tensor = module(*right)
    return -scores.mean()
