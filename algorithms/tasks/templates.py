"""Prompts: how a row of a dataset becomes a text for each candidate (arXiv:2402.11592).

A template is a text with fields. `{column}` is what the row holds, without spaces around it;
`{column:lower}` passes it through filters, named below; the candidate stands at `{label}`. Each
candidate is a text with fields itself, known by the value of the label that makes it the right one.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from gossamer.runtime.errors import ConfigError, nearest

__all__ = ["TEMPLATES", "Prompt", "Template", "find_template"]


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
        options: value of the label -> candidate; values are compared as text.
        label: column of the label.
        as_classification: whether training minimises the cross-entropy of the candidates' scores,
            or else the loss of the right one's tokens.
        bare: the text without cue words, where there is one: version 1.
        columns: field -> the dataset's column of that content, where names differ.
    """

    text: str
    options: Mapping[str, str]
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
        """Return a prompt for each candidate, in the order of ``options``."""
        values = {
            name: _Value(str(row[self.columns.get(name, name)]).strip()) for name in self.fields()
        }
        before, _, after = self.text.partition("{label}")
        prompts = []
        for option in self.options.values():
            texts = (part.format_map(values) for part in (before, option, after))
            prompts.append(Prompt(*texts))
        return prompts

    def gold(self, row: Mapping[str, Any]) -> int:
        """Return which candidate is right.

        Raises:
            KeyError: none has the row's label.
        """
        value = str(row[self.label])
        if value not in self.options:
            raise KeyError(value)
        return list(self.options).index(value)


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
}
"""By name; labels are numbered as in SuperGLUE, GLUE and WinoGrande on the hub."""

_GENERATED = {"squad": "generates its answer", "drop": "generates its answer"}
_ABSENT = {**_GENERATED, "record": "has other candidates in every example"}


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
    if name in _ABSENT:
        raise ConfigError(
            f"task.template: '{name}' {_ABSENT[name]}, which is not supported; use "
            f"{', '.join(TEMPLATES)}, or a text of your own"
        )
    if name in TEMPLATES:
        found = TEMPLATES[name]
    elif "{" in name:
        found = Template(name, {})
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
    if len(options) < 2:
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
