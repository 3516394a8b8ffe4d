"""The base of everything that is named in YAML: a frozen, validated record with behaviour.

An algorithm, an oracle, an optimizer or a task *is* its configuration: its fields are what a user
may write, its docstring and the strings below the fields are the documentation and the JSON
schema, its methods are what it does. State lives elsewhere (in the state that ``init`` returns).
"""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from gossamer.runtime.errors import ConfigError, nearest

__all__ = ["Component", "validate"]

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
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(cls, e, where) for e in error.errors())) from None


def _explain(cls: type[BaseModel], error: Any, where: str) -> str:
    field = ".".join([*([where] if where else []), *map(str, error["loc"])])
    if error["type"] == "extra_forbidden":
        return f"{field}: unknown field" + nearest(str(error["loc"][-1]), cls.model_fields)
    if error["type"] == "missing":
        described = cls.model_fields.get(str(error["loc"][-1]))
        hint = f" ({described.description.strip()})" if described and described.description else ""
        return f"{field}: missing{hint}; add '{error['loc'][-1]}: ...'"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if message.startswith(("a ", "an ", "'", "greater", "less", "valid")):
        message = "must be " + message
    return f"{field}: {message}, got {error['input']!r}"
