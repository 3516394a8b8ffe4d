"""Answers in words: what a language model goes on with, and how near it is to the right ones.

Each token is the likeliest one (greedy decoding), up to a newline (arXiv:2305.17333, SQuAD and
DROP). Nothing is cached between tokens, so that any scheme's model will do: a token costs a forward
pass over all before it.
"""

# Shapes: B examples, T tokens.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.algorithms.tasks.candidates import Candidates
from gossamer.algorithms.tasks.words import exact_match, word_f1

__all__ = ["AnswerScore", "Questions", "generate"]

_AT_ONCE = 16
"""Examples that are answered together: a model gives the logits of all their tokens."""


@dataclass(frozen=True)
class Questions:
    """Examples that are answered in words.

    Attributes:
        first: the first right answer of each, to train on: one candidate.
        prompts: int64 (N, T), what is gone on with, padded at the right.
        lengths: int64 (N,), of the prompts.
        numbers: int64 (N,), by which an AnswerScore knows the right answers.
    """

    pads_lookups: ClassVar[bool] = True
    first: Candidates
    prompts: Tensor
    lengths: Tensor
    numbers: Tensor

    @property
    def labels(self) -> Tensor:
        """One class, int64 (N,): words are none."""
        return self.first.labels

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, ...]:
        """Return what a lookup in ``first`` gives, then prompts (B, T), lengths and numbers."""
        lengths = self.lengths[indices]
        longest = int(lengths.max()) if len(indices) else 1
        prompts = self.prompts[indices, :longest]
        return (*self.first[indices], prompts, lengths, self.numbers[indices])


class AnswerScore:
    """Scores a language model by the words it answers with.

    Where several answers are right, the one that is nearest counts.
    """

    def __init__(self, tokenizer: Any, most: int) -> None:
        """Prepare.

        Args:
            tokenizer: of the model.
            most: tokens of an answer.
        """
        self._tokenizer, self._most = tokenizer, most
        self._right: list[list[str]] = []
        self._is_end = cache(self._is_end_token)

    def take(self, answers: Sequence[list[str]]) -> Tensor:
        """Keep the right answers of N examples; return their numbers, int64 (N,)."""
        begin = len(self._right)
        self._right += answers
        return torch.arange(begin, len(self._right))

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return ``{"f1": ..., "exact_match": ...}``, sums over the examples, () float64.

        Args:
            module: Scores.
            inputs: as of a lookup in Questions.
        """
        *_, prompts, lengths, numbers = inputs
        found = self.answer(module, prompts, lengths)
        pairs = [(text, self._right[k]) for text, k in zip(found, numbers.tolist(), strict=True)]
        return {
            name: torch.tensor(
                sum(max(measure(text, answer) for answer in right) for text, right in pairs),
                dtype=torch.float64,
            )
            for name, measure in (("f1", word_f1), ("exact_match", exact_match))
        }

    def answer(self, module: nn.Module, prompts_BT: Tensor, lengths_B: Tensor) -> list[str]:
        """Return the B answers, without what follows a newline, nor spaces around them."""
        model: Any = module.model
        parts = zip(prompts_BT.split(_AT_ONCE), lengths_B.split(_AT_ONCE), strict=True)
        found = (generate(model, *part, self._most, self._is_end) for part in parts)
        texts = (self._text(tokens) for answers in found for tokens in answers)
        return [text.partition("\n")[0].strip() for text in texts]

    def _is_end_token(self, token: int) -> bool:
        return token == self._tokenizer.eos_token_id or "\n" in self._text([token])

    def _text(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


@torch.no_grad()
def generate(
    model: Callable[..., Any],
    prompts_BT: Tensor,
    lengths_B: Tensor,
    most: int,
    is_end: Callable[[int], bool],
) -> list[list[int]]:
    """Return how the model goes on with each prompt: B lists of tokens, the end's included.

    Prompts are padded at the right, where a causal model does not look, so that each example's
    tokens are those it would have alone. An example that has ended is computed no further.

    Args:
        model: of ``transformers``: input_ids and attention_mask (B, T) -> an object with `logits`.
        prompts_BT: int64.
        lengths_B: int64, of the prompts.
        most: tokens to add.
        is_end: whether a token is the last.
    """
    tokens, stops = F.pad(prompts_BT, (0, most)), lengths_B.clone()
    going = torch.arange(len(stops), device=stops.device)
    for _ in range(most):
        if not len(going):
            break
        lengths = stops[going]
        longest = int(lengths.max())
        mask = (torch.arange(longest, device=lengths.device) < lengths[:, None]).long()
        logits = model(input_ids=tokens[going, :longest], attention_mask=mask).logits
        found = logits[torch.arange(len(going), device=going.device), lengths - 1].argmax(dim=-1)
        tokens[going, lengths] = found
        stops[going] += 1
        ended = torch.tensor([is_end(token) for token in found.tolist()], device=going.device)
        going = going[~ended]
    bounds = zip(tokens.tolist(), lengths_B.tolist(), stops.tolist(), strict=True)
    return [row[begin:end] for row, begin, end in bounds]
