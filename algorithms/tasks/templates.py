"""Prompts: how a row of a dataset becomes a text for each candidate (arXiv:2402.11592).

A template is a text with fields. `{column}` is what the row holds, without spaces around it;
`{column:lower}` passes it through filters, named below; the candidate stands at `{label}`. Each
candidate is a text with fields itself, known by the value of the label that makes it the right one;
or the row's own: a `Cloze` finds them in it, and a `Question` is answered in words.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from gossamer.runtime.errors import ConfigError, nearest

__all__ = ["TEMPLATES", "Cloze", "Prompt", "Question", "Template", "find_template"]


class Prompt(NamedTuple):
    """A text in three parts."""

    before: str
    option: str
    """The candidate, which is scored."""
    after: str


@dataclass(frozen=True)
class Template:
    """How rows become prompts.

    Attributes:
        text: with `{label}` in it once.
        options: value of the label -> candidate; values are compared as text. Empty where rows have
            their own.
        label: column of the label.
        as_classification: whether training minimises the cross-entropy of the candidates' scores,
            or else the loss of the right one's tokens.
        bare: the text without cue words, where there is one: version 1.
        columns: field -> the dataset's column of that content, where names differ.
    """

    text: str
    options: Mapping[str, str] = field(default_factory=dict)
    label: str = "label"
    as_classification: bool = True
    bare: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

    def fields(self) -> set[str]:
        """Return the names in braces, of text and candidates, `label` left out.

        Raises:
            ValueError: braces or filters are wrong.
        """
        found = set()
        for text in (self.text, *self.options.values()):
            for _, name, filters, conversion in string.Formatter().parse(text):
                if name is None:
                    continue
                if not name.isidentifier() or conversion:
                    raise ValueError(
                        f"'{{{name}}}' must hold the name of a column ({{{{ is a brace)"
                    )
                for wanted in (filters or "").split():
                    if wanted not in _FILTERS:
                        raise ValueError(f"no filter '{wanted}'{nearest(wanted, _FILTERS)}")
                found.add(name)
        return found - {"label"}

    def render(self, row: Mapping[str, Any]) -> list[Prompt]:
        """Return a prompt for each candidate, in the order of ``options`` or of the row."""
        values = self._values(row)
        before, _, after = (
            part if part == "{label}" else part.format_map(values)
            for part in self.text.partition("{label}")
        )
        return [Prompt(before, option, after) for option in self.candidates(row)]

    def candidates(self, row: Mapping[str, Any]) -> list[str]:
        """Return the candidates."""
        values = self._values(row)
        return [option.format_map(values) for option in self.options.values()]

    def gold(self, row: Mapping[str, Any]) -> int:
        """Return which candidate is right; the first that is, where several are.

        Raises:
            KeyError: none has the row's label.
        """
        value = str(row[self.label])
        if value not in self.options:
            raise KeyError(value)
        return list(self.options).index(value)

    @property
    def label_column(self) -> str:
        """The dataset's column that ``label`` is, or lies in."""
        return self.label

    def _values(self, row: Mapping[str, Any]) -> dict[str, _Value]:
        return {name: _Value(str(self._content(row, name)).strip()) for name in self.fields()}

    def _content(self, row: Mapping[str, Any], name: str) -> Any:
        return row[self.columns.get(name, name)]


@dataclass(frozen=True)
class Cloze(Template):
    """A template whose candidates are a query, with one of the row's entities in its gap.

    The fields `query` and `entities` are in no text; ``label`` is a column with a list of those
    entities that are right.
    """

    gap: str = "@placeholder"
    as_classification: bool = False

    def fields(self) -> set[str]:
        """Return the names in braces, and the two that make the candidates."""
        return super().fields() | {"query", "entities"}

    def candidates(self, row: Mapping[str, Any]) -> list[str]:
        """Return the query for each entity.

        Raises:
            ConfigError: there is no gap, or there are no entities.
        """
        query, entities = str(self._content(row, "query")).strip(), self._entities(row)
        if self.gap not in query or not entities:
            raise ConfigError(
                f"task.columns: query {query!r} must have the gap '{self.gap}', and entities to "
                "put there; leave such rows out, or name other columns"
            )
        return [query.replace(self.gap, entity) for entity in entities]

    def gold(self, row: Mapping[str, Any]) -> int:
        """Return the first right one."""
        return self.right(row).index(True)

    def right(self, row: Mapping[str, Any]) -> list[bool]:
        """Return of each candidate whether it is right.

        Raises:
            ConfigError: none is.
        """
        answers = _texts(row[self.label])
        found = [entity in answers for entity in self._entities(row)]
        if not any(found):
            raise ConfigError(
                f"task.label: column '{self.label}' holds {row[self.label]!r}, which has none of "
                "the row's entities; leave such rows out, or name another column"
            )
        return found

    def _entities(self, row: Mapping[str, Any]) -> list[str]:
        return list(dict.fromkeys(_texts(self._content(row, "entities"))))


@dataclass(frozen=True)
class Question(Template):
    """A template that is answered in words: each row has answers that are right.

    ``label`` is their column, or a path into it such as `answers.text`. The one candidate is the
    first of them, and the newline that ends it (as the code of arXiv:2305.17333).
    """

    as_classification: bool = False

    def candidates(self, row: Mapping[str, Any]) -> list[str]:
        """Return the first answer, to train on."""
        return [self.answers(row)[0] + "\n"]

    def gold(self, row: Mapping[str, Any]) -> int:
        """Return the only place."""
        return 0

    def answers(self, row: Mapping[str, Any]) -> list[str]:
        """Return the right answers, each of which may be given.

        Raises:
            ConfigError: there are none.
        """
        found: Any = row
        for name in self.label.split("."):
            found = found.get(name) if isinstance(found, Mapping) else None
        answers = _texts(found)
        if not answers:
            raise ConfigError(
                f"task.label: a row has no answer at '{self.label}': column '{self.label_column}' "
                f"holds {row[self.label_column]!r}; leave such rows out, or name another place"
            )
        return answers

    @property
    def label_column(self) -> str:
        """Where the path begins."""
        return self.label.partition(".")[0]


def _texts(given: Any) -> list[str]:
    """Return the texts of a list, or of a text alone; empty ones left out."""
    texts = given if isinstance(given, list) else [given]
    stripped = (str(text).strip() for text in texts if text is not None)
    return [text for text in stripped if text]


class _Value(str):
    """A column's content, which filters change."""

    def __format__(self, filters: str) -> str:
        text = str(self)
        for name in filters.split():
            text = _FILTERS[name](text)
        return text


def _uncapitalized(text: str) -> str:
    """Make the first word lower-case; I stays (as the code of arXiv:2305.17333)."""
    first, space, rest = text.partition(" ")
    return (first if first == "I" else first.lower()) + space + rest


_FILTERS: dict[str, Callable[[str], str]] = {
    "lower": str.lower,
    "capitalized": lambda text: text[:1].upper() + text[1:],
    "uncapitalized": _uncapitalized,
    "unstopped": lambda text: text.removesuffix("."),
    "unasked": lambda text: text.rstrip("? "),
    "conjunction": {"cause": "because", "effect": "so"}.__getitem__,
    "bulleted": lambda text: text.replace("@highlight\n", "- "),
    "before_blank": lambda text: text.partition("_")[0],
    "after_blank": lambda text: text.partition("_")[2],
}

_YES_NO = {"0": "Yes", "1": "No"}
_NO_YES = {"0": "No", "1": "Yes"}

TEMPLATES = {
    "sst2": Template(
        "{sentence} It was {label}", {"0": "terrible", "1": "great"}, bare="{sentence} {label}"
    ),
    "rte": Template(
        '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n{label}',
        _YES_NO,
        bare='{premise}\n"{hypothesis}"\n{label}',
    ),
    "cb": Template(
        'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n{label}',
        {"0": "Yes", "1": "No", "2": "Maybe"},
    ),
    "boolq": Template("{passage} {question:capitalized unasked}?\n{label}", _NO_YES),
    "wsc": Template(
        '{text}\nIn the previous sentence, does the pronoun "{span2_text:lower}" refer to '
        "{span1_text}? Yes or No?\n{label}",
        _NO_YES,
    ),
    "wic": Template(
        'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
        "{sentence1}\n{sentence2}\n{label}",
        _NO_YES,
    ),
    "multirc": Template(
        '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? '
        "Yes or No?\n{label}",
        _NO_YES,
    ),
    "copa": Template(
        "{premise:unstopped} {question:conjunction} {label}",
        {"0": "{choice1:uncapitalized}", "1": "{choice2:uncapitalized}"},
        as_classification=False,
    ),
    "winogrande": Template(
        "{sentence:before_blank}{label}",
        {"1": "{option1}{sentence:after_blank}", "2": "{option2}{sentence:after_blank}"},
        label="answer",
        as_classification=False,
    ),
    "record": Cloze("{passage:bulleted}\n- {label}", label="answers"),
    "squad": Question(
        "Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer: {label}",
        label="answers.text",
    ),
    "drop": Question(
        "Passage: {passage}\nQuestion: {question}\nAnswer: {label}", label="answers_spans.spans"
    ),
}
"""By name; labels and columns are those of SuperGLUE, GLUE, WinoGrande, SQuAD, DROP on the hub."""


def find_template(
    name: str,
    *,
    version: int = 0,
    labels: Mapping[str, str] | None = None,
    label: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Template:
    """Return a template.

    Args:
        name: of a known one, or a text with `{label}` and the names of columns in braces.
        version: 1: without cue words.
        labels: value of the label -> candidate; None: a known template's own.
        label: column of the label; None: a known template's own, or `label`.
        columns: field of the template -> column of the dataset, where names differ.

    Raises:
        ConfigError: there is none of the name, or what was given does not go with it.
    """
    if name in TEMPLATES:
        found = TEMPLATES[name]
    elif "{" in name:
        found = Template(name)
    else:
        raise ConfigError(
            f"task.template: unknown template '{name}'{nearest(name, TEMPLATES)} (your own: a text "
            "such as '{sentence} It was {label}')"
        )
    if version == 1:
        if found.bare is None:
            raise ConfigError(
                f"task.version: template '{name}' has no version 1; use 0 (sst2 and rte have one)"
            )
        found = replace(found, text=found.bare)
    if name in TEMPLATES and not found.as_classification and labels is not None:
        raise ConfigError(f"task.labels: have no effect with template '{name}'; leave them out")
    options = found.options if labels is None else labels
    if len(options) < 2 and type(found) is Template:
        raise ConfigError(
            f"task.labels: a template of your own needs two labels, got {len(options)}; such as "
            "{0: terrible, 1: great}"
        )
    found = replace(found, options=options, label=label or found.label)
    try:
        fields = found.fields()
    except ValueError as error:
        raise ConfigError(f"task.template: {error}") from error
    if found.text.count("{label}") != 1 or any("{label" in text for text in options.values()):
        raise ConfigError(
            "task.template: the candidate's place, {label}, must stand in the text once"
        )
    for unknown in sorted(set(columns or {}) - fields):
        raise ConfigError(
            f"task.columns: the template has no field '{unknown}'{nearest(unknown, fields)}"
        )
    return replace(found, columns=dict(columns or {}))
