"""From documents to tokens: bytes as they are, or any tokenizer of ``transformers``.

Documents are bytes (UTF-8 where a tokenizer reads them), whatever file they came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from gossamer.algorithms.tasks.hub import load_tokenizer
from gossamer.runtime.errors import ConfigError

__all__ = ["ByteTokenizer", "HubTokenizer", "Tokenizer", "open_tokenizer"]


class Tokenizer(Protocol):
    """Turns documents into tokens."""

    @property
    def vocabulary(self) -> int:
        """How many tokens a model must know."""
        ...

    @property
    def pad(self) -> int:
        """A token to fill up with."""
        ...

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Return each document's tokens (integers), with an end-of-text token where there is one.

        For texts that follow one another.
        """
        ...

    def encode_alone(self, documents: Sequence[bytes], most: int) -> list[np.ndarray]:
        """Return each document's first tokens, at most so many, as the tokenizer frames a text."""
        ...


class ByteTokenizer:
    """A token per byte; there is none for the end of a text."""

    vocabulary = 256
    pad = 0

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Return the bytes, uint8."""
        return [np.frombuffer(document, np.uint8) for document in documents]

    def encode_alone(self, documents: Sequence[bytes], most: int) -> list[np.ndarray]:
        """Return the first bytes, uint8."""
        return self.encode([document[:most] for document in documents])


class HubTokenizer:
    """A tokenizer of ``transformers``.

    Attributes:
        vocabulary: how many tokens there are, or fewer: those beyond it become the unknown token.
        pad: a token to fill up with.
    """

    def __init__(self, name: str, vocabulary: int | None = None) -> None:
        """Load it.

        Args:
            name: on the hub, or a folder.
            vocabulary: of the model; the special tokens that only a text's own spelling could
                bring (T5's 100 last ones) may lie beyond it.

        Raises:
            ConfigError: it cannot be loaded, or has more tokens than that.
        """
        self._tokenizer: Any = load_tokenizer(name, "task.tokenizer")
        known = set(self._tokenizer.get_vocab().values())
        # Numbers may have gaps, and embeddings go up to the last one.
        self.vocabulary = vocabulary or max(len(self._tokenizer), 1 + max(known))
        used = (self._tokenizer.eos_token_id, self._tokenizer.bos_token_id)
        self._end, self._unknown = used[0], self._tokenizer.unk_token_id
        self.pad = self._tokenizer.pad_token_id or 0
        rare = set(self._tokenizer.all_special_ids) - {*used, self._unknown, self.pad}
        if self._unknown is None:
            rare = set()
        needed = 1 + max(known - rare)
        if self.vocabulary < needed:
            raise ConfigError(
                f"task.vocabulary: the tokenizer '{name}' has {needed} tokens, more than "
                f"{self.vocabulary}; leave it out, or use at least {needed}"
            )

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Return the tokens, int64, without what the tokenizer puts around a text."""
        end = [] if self._end is None else [self._end]
        ids = self._ids(documents, add_special_tokens=False)
        return [self._known([*each, *end]) for each in ids]

    def encode_alone(self, documents: Sequence[bytes], most: int) -> list[np.ndarray]:
        """Return the first tokens, int64, with what the tokenizer puts around a text."""
        ids = self._ids(documents, truncation=True, max_length=most)
        return [self._known(each) for each in ids]

    def _ids(self, documents: Sequence[bytes], **options: Any) -> list[list[int]]:
        if not documents:
            return []
        texts = [document.decode("utf-8", errors="replace") for document in documents]
        found: list[list[int]] = self._tokenizer(texts, verbose=False, **options)["input_ids"]
        return found

    def _known(self, ids: list[int]) -> np.ndarray:
        tokens = np.array(ids, dtype=np.int64)
        if self._unknown is None:
            return tokens
        return np.where(tokens < self.vocabulary, tokens, self._unknown)


def open_tokenizer(name: str, vocabulary: int | None = None) -> Tokenizer:
    """Return a tokenizer: ``bytes``, or one of ``transformers`` by name or folder.

    Args:
        name: which.
        vocabulary: how many tokens the model is to know; None: as many as the tokenizer.

    Raises:
        ConfigError: it cannot be loaded, or has more tokens than that.
    """
    if name != "bytes":
        return HubTokenizer(name, vocabulary)
    if vocabulary is not None and vocabulary < ByteTokenizer.vocabulary:
        raise ConfigError(
            f"task.vocabulary: there are {ByteTokenizer.vocabulary} bytes, got {vocabulary}; leave "
            "it out"
        )
    return ByteTokenizer()
