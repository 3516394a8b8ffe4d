"""How near an answer is to the right one, by its words: the scores of SQuAD (arXiv:1606.05250).

Words are lower-case, without punctuation; articles are left out.
"""

from __future__ import annotations

import re
import string
from collections import Counter

__all__ = ["exact_match", "word_f1"]


def word_f1(text: str, answer: str) -> float:
    """Return the harmonic mean of the share of words that are the answer's, and of its words given.

    A word counts as often as both have it. Where one has none left, 1 if the other has none either
    (as the evaluation of SQuAD 2.0, arXiv:1806.03822).
    """
    found, right = _words(text), _words(answer)
    if not found or not right:
        return float(found == right)
    common = (Counter(found) & Counter(right)).total()
    return 2 * common / (len(found) + len(right))


def exact_match(text: str, answer: str) -> float:
    """Return 1 if the words are the answer's, in its order; else 0."""
    return float(_words(text) == _words(answer))


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _words(text: str) -> list[str]:
    bare = text.lower().translate(_NO_PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()
