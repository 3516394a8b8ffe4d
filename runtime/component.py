"""The base of everything that is named in YAML: a frozen, validated record with behaviour.

An algorithm, an oracle, an optimizer or a task *is* its configuration: its fields are what a user
may write, its docstring and the strings below the fields are the documentation and the JSON
schema, its methods are what it does. State lives elsewhere (in the state that ``init`` returns).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from gossamer.runtime.errors import ConfigError, nearest

__all__ = ["Component", "choose", "named", "validate"]

T = TypeVar("T", bound=BaseModel)


class Component(BaseModel):
    """A frozen record: unknown fields are errors, infinities and NaN too."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        arbitrary_types_allowed=True,
        populate_by_name=True,
    )


def validate(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Build ``cls`` from ``values``; the first error names field, value and fix.

    Args:
        cls: the record to build.
        values: what the user wrote.
        where: the section's name, for the message (``algorithm``).

    Raises:
        ConfigError: ``algorithm.lr: must be greater than 0, got -1``.
    """
    for key, value in values.items():
        field = cls.model_fields.get(key)
        if isinstance(value, bool) and field is not None and _is_number(field.annotation):
            raise ConfigError(
                f"{where}{'.' if where else ''}{key}: must be a number, got "
                f"{str(value).lower()} (YAML reads yes, no, on and off as true and false)"
            )
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(cls, e, where) for e in error.errors())) from None


def choose(given: object, known: Mapping[str, type[T]], where: str) -> T:
    """Return the component that a user named: by its name, or by a section with name and fields.

    Args:
        given: what the user wrote, or the component itself.
        known: name -> class.
        where: the field, for the message (``task.scheme``).

    Raises:
        ConfigError: no such name, or a field of the section is wrong.
    """
    if isinstance(given, tuple(known.values())):
        return cast(T, given)
    values = {"name": given} if isinstance(given, str) else given
    if not isinstance(values, dict) or not isinstance(values.get("name"), str):
        raise ConfigError(
            f"{where}: must be one of {', '.join(known)}, or a section such as "
            f"{{name: {next(iter(known))}}} with its fields, got {given!r}"
        )
    name = values["name"]
    if name not in known:
        kind = where.rpartition(".")[2]
        raise ConfigError(f"{where}.name: unknown {kind} '{name}'{nearest(name, known)}")
    return validate(known[name], values, where)


def named(known: Mapping[str, type[BaseModel]], where: str) -> BeforeValidator:
    """Return what lets a field be written as ``choose`` takes it, with its JSON schema.

    For ``Annotated[A | B, named({"a": A, "b": B}, "task.scheme")]``. A bare name is offered where
    all fields have defaults.
    """
    bare = tuple(
        name
        for name, cls in known.items()
        if not any(field.is_required() for field in cls.model_fields.values())
    )
    sections: Any = Union[tuple(known.values())]  # noqa: UP007
    written: Any = Union[Literal[bare], sections] if bare else sections  # noqa: UP007
    return BeforeValidator(
        lambda given: choose(given, known, where), json_schema_input_type=written
    )


def _is_number(annotation: Any) -> bool:
    """Say whether a type takes numbers but no truth values, of which pydantic makes 0 and 1."""
    if get_origin(annotation) is Annotated:
        return _is_number(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        choices = [c for c in get_args(annotation) if c is not type(None)]
        return all(_is_number(choice) for choice in choices)
    return annotation in (int, float)


def _explain(cls: type[BaseModel], error: Any, where: str) -> str:
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):  # of a section inside, which names its own field
        return str(cause)
    field = ".".join([*([where] if where else []), *map(str, error["loc"])])
    if error["type"] == "extra_forbidden":
        known = [described.alias or name for name, described in cls.model_fields.items()]
        return f"{field}: unknown field" + nearest(str(error["loc"][-1]), known)
    if error["type"] == "missing":
        described = cls.model_fields.get(str(error["loc"][-1]))
        hint = f" ({described.description.strip()})" if described and described.description else ""
        return f"{field}: missing{hint}; add '{error['loc'][-1]}: ...'"
    if error["type"] == "invalid_key":
        return f"{field}: a field's name must be text, got {error['input']!r}"
    given = error["input"]
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if error["type"] in _WHOLE:
        message = "must be a whole number"
        if isinstance(given, str) and _as_whole(given) is not None:
            message += f" (YAML reads {given} as text; write {_as_whole(given)})"
    elif message.startswith(("a ", "an ", "'", "greater", "less", "valid", "finite")):
        message = "must be " + message
    return f"{field}: {message}, got {given!r}"


_WHOLE = ("int_type", "int_parsing", "int_from_float")


def _as_whole(text: str) -> int | None:
    """Return the whole number that ``1e3`` or ``1.0e3`` means."""
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if number.is_integer() else None
