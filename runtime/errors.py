"""The errors of a run: what the user wrote wrongly, and what failed between processes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CommError",
    "CommTimeout",
    "ConfigError",
    "PeerLost",
    "RanksDiffer",
    "RoundMismatch",
    "nearest",
]


class ConfigError(ValueError):
    """A field of the configuration is wrong; the message names field, value and fix."""


class CommError(RuntimeError):
    """A communication failed; the round did not happen."""


class CommTimeout(CommError):
    """A peer did not answer within ``timeout_s``; the message names peer and operation."""


class PeerLost(CommError):
    """A peer's process is gone; the message names peer and operation."""


class RoundMismatch(CommError):
    """The processes hold different rounds (graph, weights or schedule); raised on every one."""


class RanksDiffer(CommError):
    """Ranks hold different tensors where all must hold the same; raised on every process."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` or ``; known: a, b, c`` for an unknown ``name``.

    Nothing where nothing is known.
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=2)
    if close:
        return "; did you mean " + " or ".join(f"'{c}'" for c in close) + "?"
    return "; known: " + ", ".join(known) if known else ""
