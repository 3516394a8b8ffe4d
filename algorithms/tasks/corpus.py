"""Texts to train language models on: read, divided, tokenized once, held as one array."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.algorithms.tasks.files import read_bytes, suffix_of
from gossamer.algorithms.tasks.hub import explained
from gossamer.algorithms.tasks.tokenizers import Tokenizer
from gossamer.runtime.errors import ConfigError, nearest

__all__ = [
    "Corpus",
    "CorpusBuilder",
    "divide",
    "join",
    "read_documents",
    "read_rows",
    "tail",
]

_LINES = {".json", ".jsonl"}
"""Endings of JSON lines; C4's own files are called .json.gz."""
_TABLES = {".csv", ".tsv", ".parquet"}
"""Endings of what `dataset` reads, and is no running text."""
_LOOKED_AT = 2**16
"""Bytes at a file's start that would show that it is no text."""
_AT_ONCE = 1000
"""Documents that are tokenized together."""


# --- documents --------------------------------------------------------------------------------


def read_documents(file: Path, column: str, where: str) -> list[bytes]:
    """Return the documents of a file that are not blank: a text is one, JSON lines are many.

    Args:
        file: a text, or JSON lines (.jsonl or .json); either with .gz.
        column: of JSON lines, that holds the text.
        where: the user wrote the file's name, for the message.

    Raises:
        ConfigError: it cannot be read, is a table or no text, or a line is no object with such a
            column.
    """
    suffix = suffix_of(file)
    if suffix in _TABLES:
        raise ConfigError(
            f"{where}: {file} is a table; name it in task.dataset instead, and the column with the "
            "text in task.column"
        )
    content = read_bytes(file, where)
    if b"\0" in content[:_LOOKED_AT]:
        raise ConfigError(
            f"{where}: {file} has zero bytes, so that it is no text of UTF-8; leave it out, or "
            "name what the package datasets can read in task.dataset"
        )
    if suffix not in _LINES:
        return [] if _is_blank(content) else [content]
    lines = enumerate(content.split(b"\n"), start=1)
    texts = (
        _text_of(line, column, f"{file}, line {k}", where)
        for k, line in lines
        if not _is_blank(line)
    )
    return [text for text in texts if not _is_blank(text)]


def _text_of(line: bytes, column: str, place: str, where: str) -> bytes:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(
            f"{where}: {place}, is no JSON ({error}); give JSON lines, an object in each"
        ) from error
    return _encoded(row if isinstance(row, dict) else {}, column, place)


def read_rows(rows: Iterable[Mapping[str, Any]], column: str, dataset: str) -> Iterator[bytes]:
    """Yield the documents of a dataset's rows that are neither missing nor blank.

    Args:
        rows: of the dataset, or of a part or another order of it.
        column: that holds the text.
        dataset: its name, for the message.

    Raises:
        ConfigError: a row cannot be read, or has no such column or no text there.
    """
    coming = iter(rows)
    for number in itertools.count(1):
        with explained("task.dataset", dataset, number):
            row = next(coming, None)
        if row is None:
            return
        text = _encoded(row, column, f"'{dataset}', row {number} as read")
        if not _is_blank(text):
            yield text


def _encoded(row: Mapping[str, Any], column: str, place: str) -> bytes:
    """Return a row's text; of one that is null, nothing."""
    text = row.get(column)
    if isinstance(text, str):
        return text.encode("utf-8", errors="surrogatepass")
    if column in row and text is None:
        return b""
    known = [name for name, value in row.items() if isinstance(value, str)]
    found = f" but {text!r:.60}" if column in row else ""
    advice = nearest(column, known) or "; mend it, or name the column with the text"
    raise ConfigError(f"task.column: {place}, has no text '{column}'{found}{advice}")


def _is_blank(document: bytes) -> bool:
    return not document or document.isspace()


def divide(
    documents: Sequence[bytes], number: int, files: int, every: int
) -> tuple[Sequence[bytes], Sequence[bytes]]:
    """Return which of a file's documents to train on, and which to validate on.

    Of ``every`` files or more, each ``every``-th validates as a whole. Of fewer, the end of each
    does: one in ``every`` documents, at least one; of a single document its last bytes.

    Args:
        documents: of the file.
        number: of the file, from 0.
        files: how many there are.
        every: so many parts train and validate, one of them the latter; 0: all train.
    """
    if every == 0 or not documents:
        return documents, ()
    if files >= every:
        return ((), documents) if number % every == every - 1 else (documents, ())
    if len(documents) > 1:
        cut = len(documents) - tail(len(documents), every)
        return documents[:cut], documents[cut:]
    (text,) = documents
    cut = len(text) - len(text) // every
    while cut < len(text) and text[cut] & 0xC0 == 0x80:  # inside a character of UTF-8
        cut += 1
    return (text[:cut],), (text[cut:],)


def tail(count: int, every: int) -> int:
    """Return how many documents at the end validate: one in ``every``, at least one of several."""
    return 0 if every == 0 or count < 2 else max(1, count // every)


# --- tokens -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Tokens of documents, one document after another.

    Attributes:
        tokens: (tokens,) of the smallest of uint8, uint16 and int32 that holds them.
        offsets: int64 (documents + 1,): document k has tokens[offsets[k] : offsets[k + 1]].
        files: int64 (documents,), the number of the file each comes from.
    """

    tokens: Tensor
    offsets: Tensor
    files: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def files_at(self, places: np.ndarray) -> np.ndarray:
        """Return the file that each of the tokens at ``places`` comes from."""
        return self.files[np.searchsorted(self.offsets.numpy(), places, side="right") - 1]


@dataclass
class CorpusBuilder:
    """Tokenizes documents as they come; meanwhile it holds tokens alone, and at the end twice.

    Attributes:
        tokenizer: makes the tokens.
        alone: None: texts follow one another, each with an end-of-text token where there is one;
            else each is cut to so many tokens.
        most: documents beyond so many are left out; None: none is.
    """

    tokenizer: Tokenizer
    alone: int | None = None
    most: int | None = None
    _parts: list[np.ndarray] = field(default_factory=list)
    _files: list[int] = field(default_factory=list)

    def add(self, documents: Iterable[bytes], file: int = 0) -> None:
        """Append documents of one file."""
        room = None if self.most is None else self.most - len(self._parts)
        coming = islice(documents, room)
        while some := list(islice(coming, _AT_ONCE)):
            if self.alone is None:
                found = self.tokenizer.encode(some)
            else:
                found = self.tokenizer.encode_alone(some, self.alone)
            self._parts += [part.astype(self._dtype()) for part in found]
            self._files += [file] * len(found)

    def finish(self) -> Corpus:
        """Return all that came."""
        tokens, offsets = join(self._parts or [np.empty(0, self._dtype())])
        if not self._parts:
            offsets = offsets[:1]
        return Corpus(tokens, offsets, np.array(self._files, dtype=np.int64))

    def _dtype(self) -> type[np.integer]:
        sizes = (np.uint8, np.uint16, np.int32)
        return next(t for t in sizes if self.tokenizer.vocabulary - 1 <= np.iinfo(t).max)


def join(parts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Return the parts one after another, and the int64 offsets at which each begins and ends."""
    offsets = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    return torch.from_numpy(np.concatenate(parts)), torch.from_numpy(offsets)
